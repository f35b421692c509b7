"""Output queue towards one router, merged per choice, bounded in total and per message. Knows no stream."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from ..core.request import Epoch, SequenceKey, TokenLogprobs
from ..kv.messages import epoch_from_wire, epoch_to_wire, logprobs_to_wire
from ..protos import common_pb2, worker_pb2

MAX_PENDING_TOKENS = 65_536
MAX_PENDING_ENDS = 4_096
MAX_PENDING_BYTES = 64 << 20  # mostly logprobs of prompts
MAX_MESSAGE_BYTES = 8 << 20  # exceeded by at most one choice's part; gRPC takes 64 MiB (kv/handover/transports/grpc.py)
_TOKEN_BYTES = 8  # estimate for an id and its share of the envelope, used for the bounds only
_CHARACTER_BYTES = 4
_LOGPROB_BYTES = 8  # of a token or of one alternative
_ROWS_PER_TURN = 256  # logprobs of prompt tokens that one turn of the event loop converts: 1.5 ms if each has five


@dataclass(slots=True)
class _Pending:
    """Tokens of one choice that are not sent yet: consecutive, from `first_index` on."""

    first_index: int
    token_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    logprobs: list[common_pb2.TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[common_pb2.TokenLogprobs] = field(default_factory=list)
    unconverted: tuple[TokenLogprobs, ...] = ()  # of the prompt; the part waits until there are none
    num_shown: int = 0
    num_bytes: int = 0  # roughly

    def convert(self, most_rows: int) -> int:
        """Convert logprobs of the prompt, at most `most_rows`; returns how many."""
        now, self.unconverted = self.unconverted[:most_rows], self.unconverted[most_rows:]
        self.prompt_logprobs += logprobs_to_wire(now)
        return len(now)


class Scores(NamedTuple):
    """Logprobs of new tokens, if the request asks for them."""

    logprobs: tuple[TokenLogprobs, ...] = ()  # one per token
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    num_shown: int = 0  # tokens of the choice whose text was sent so far


NO_SCORES = Scores()


class Outbox:
    """Collects the output of engine steps and hand-overs until the writer takes it.

    The writer waits in `wait` and takes everything that was added until then, so a step's tokens of all requests are
    one message, up to `max_message_bytes`. A router that reads slowly gets fewer and larger messages: tokens of one
    choice are merged. When a bound is reached (`is_full`) the session takes no new orders.
    """

    def __init__(
        self,
        max_tokens: int = MAX_PENDING_TOKENS,
        max_ends: int = MAX_PENDING_ENDS,
        *,
        max_bytes: int = MAX_PENDING_BYTES,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self._max_tokens = max_tokens
        self._max_ends = max_ends
        self._max_bytes = max_bytes
        self._max_message_bytes = max_message_bytes
        # Parts of one choice are in order; only the last one grows.
        self._tokens: dict[tuple[SequenceKey, Epoch], deque[_Pending]] = {}
        self._ends: list[worker_pb2.RequestEnd] = []
        self._taken: list[worker_pb2.OrderTaken] = []
        self._num_tokens = 0
        self._num_bytes = 0
        self._step = 0
        self._waiting = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    @property
    def is_empty(self) -> bool:
        """True if nothing waits to be sent."""
        return not self._waiting.is_set()

    @property
    def is_full(self) -> bool:
        """True if a bound is reached: the router reads too slowly to be given more work."""
        is_long = self._num_tokens >= self._max_tokens or len(self._ends) + len(self._taken) >= self._max_ends
        return is_long or self._num_bytes >= self._max_bytes

    def add_tokens(
        self,
        key: SequenceKey,
        epoch: Epoch,
        first_index: int,
        token_ids: tuple[int, ...],
        text: str,
        *,
        scores: Scores = NO_SCORES,
    ) -> None:
        """Add new tokens of one choice; `first_index` must continue the tokens added before."""
        pending = self._part(key, epoch, first_index)
        assert first_index == pending.first_index + len(pending.token_ids), (key, first_index)
        pending.token_ids.extend(token_ids)
        pending.text.append(text)
        num_bytes = _TOKEN_BYTES * len(token_ids) + _CHARACTER_BYTES * len(text)
        if scores is not NO_SCORES:
            pending.logprobs += logprobs_to_wire(scores.logprobs)
            pending.unconverted += scores.prompt_logprobs
            pending.num_shown = scores.num_shown
            num_bytes += _LOGPROB_BYTES * sum([1 + len(one.top) for one in (*scores.logprobs, *scores.prompt_logprobs)])
        pending.num_bytes += num_bytes
        self._num_bytes += num_bytes
        self._num_tokens += len(token_ids)
        self._changed()

    def _part(self, key: SequenceKey, epoch: Epoch, first_index: int) -> _Pending:
        """The part that new tokens of a choice are added to; a part over half a message gets no more."""
        parts = self._tokens.setdefault((key, epoch), deque())
        if not parts or parts[-1].num_bytes > self._max_message_bytes // 2:
            if parts:
                assert first_index == parts[-1].first_index + len(parts[-1].token_ids), (key, first_index)
            parts.append(_Pending(first_index))
        return parts[-1]

    def add_end(self, end: worker_pb2.RequestEnd) -> None:
        """Add the end of a choice. Tokens of it that wait here are sent in the same message or before."""
        self._ends.append(end)
        self._changed()

    def add_taken(self, taken: worker_pb2.OrderTaken) -> None:
        """Add who is about to work on an order. It is sent with the next message, before tokens and ends."""
        self._taken.append(taken)
        self._changed()

    def at_step(self, step: int) -> None:
        """Set the number of the engine step that the next tokens come from."""
        self._step = step

    async def wait(self) -> None:
        """Wait until there is output to send."""
        await self._waiting.wait()

    async def wait_for_room(self) -> None:
        """Wait until the queue is below its bounds."""
        await self._room.wait()

    def take(self) -> worker_pb2.StepOutput | None:
        """The waiting output as one message, up to the size bound; None if there is none, or none is ready.

        Logprobs of many prompt tokens take several calls to convert. Their choice waits meanwhile, the others do not.
        """
        if self.is_empty:
            return None
        output = worker_pb2.StepOutput(step=self._step, taken=self._taken)
        self._taken.clear()
        self._take_tokens(output)
        ends, self._ends = self._ends, []
        for end in ends:
            place = SequenceKey(end.request_id, end.choice), epoch_from_wire(end.epoch)
            (self._ends if place in self._tokens else output.ends).append(end)
        if not self._tokens and not self._ends:
            self._waiting.clear()
        if not self.is_full:
            self._room.set()
        return output if output.tokens or output.ends or output.taken else None

    def _take_tokens(self, output: worker_pb2.StepOutput) -> None:
        """Move parts into a message: at least one, and as many as the size bound allows."""
        num_bytes, rows = 0, _ROWS_PER_TURN
        for (key, epoch), parts in list(self._tokens.items()):
            while parts:
                pending = parts[0]
                rows -= pending.convert(rows)
                if pending.unconverted:
                    break
                if num_bytes and num_bytes + pending.num_bytes > self._max_message_bytes:
                    return
                num_bytes += pending.num_bytes
                self._num_bytes -= pending.num_bytes
                self._num_tokens -= len(pending.token_ids)
                parts.popleft()
                output.tokens.add(
                    request_id=key.request_id,
                    choice=key.choice,
                    epoch=epoch_to_wire(epoch),
                    first_index=pending.first_index,
                    token_ids=pending.token_ids,
                    text="".join(pending.text),
                    logprobs=pending.logprobs,
                    prompt_logprobs=pending.prompt_logprobs,
                    shown_tokens=pending.num_shown,
                )
            if not parts:
                del self._tokens[key, epoch]

    def _changed(self) -> None:
        self._waiting.set()
        if self.is_full:
            self._room.clear()
