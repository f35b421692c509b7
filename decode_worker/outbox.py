"""What one router is still to be told, merged per choice, bounded in all and per message. Knows no stream."""

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
MAX_PENDING_BYTES = 64 << 20  # logprobs of prompts are most of it
MAX_MESSAGE_BYTES = 8 << 20  # and one choice's part more; gRPC takes 64 MiB (kv/handover/transports/grpc.py)
_TOKEN_BYTES = 8  # of an id and its share of the envelope, for the bounds only
_CHARACTER_BYTES = 4


@dataclass(slots=True)
class _Pending:
    """Tokens of one choice that have not left yet: consecutive, from `first_index` on."""

    first_index: int
    token_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    logprobs: list[common_pb2.TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[common_pb2.TokenLogprobs] = field(default_factory=list)
    num_shown: int = 0
    num_bytes: int = 0  # roughly


class Scores(NamedTuple):
    """What goes with new tokens where logprobs were asked for."""

    logprobs: tuple[TokenLogprobs, ...] = ()  # one per token
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    num_shown: int = 0  # of the choice so far


NO_SCORES = Scores()


class Outbox:
    """Collects what engine steps and hand-overs produce until the writer takes it.

    The writer waits in `wait`; everything that was added before it runs leaves together, so a step's tokens for all
    requests are one message, up to `max_message_bytes`. A router that reads slowly gets fewer and larger messages,
    never a longer queue: tokens of one choice merge, and when the bounds are passed (`is_full`) the session takes no
    new orders.
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
        # Parts of one choice lie in order; only the last one of them grows.
        self._tokens: dict[tuple[SequenceKey, Epoch], deque[_Pending]] = {}
        self._ends: list[worker_pb2.RequestEnd] = []
        self._num_tokens = 0
        self._num_bytes = 0
        self._step = 0
        self._waiting = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    @property
    def is_full(self) -> bool:
        """Whether the router is too far behind to be given more work."""
        is_long = self._num_tokens >= self._max_tokens or len(self._ends) >= self._max_ends
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
        """New tokens of one choice; `first_index` continues what was added before."""
        pending = self._part(key, epoch, first_index)
        assert first_index == pending.first_index + len(pending.token_ids), (key, first_index)
        pending.token_ids.extend(token_ids)
        pending.text.append(text)
        num_bytes = _TOKEN_BYTES * len(token_ids) + _CHARACTER_BYTES * len(text)
        if scores is not NO_SCORES:
            logprobs, prompt_logprobs = logprobs_to_wire(scores.logprobs), logprobs_to_wire(scores.prompt_logprobs)
            pending.logprobs += logprobs
            pending.prompt_logprobs += prompt_logprobs
            pending.num_shown = scores.num_shown
            num_bytes += sum([one.ByteSize() for one in (*logprobs, *prompt_logprobs)])
        pending.num_bytes += num_bytes
        self._num_bytes += num_bytes
        self._num_tokens += len(token_ids)
        self._changed()

    def _part(self, key: SequenceKey, epoch: Epoch, first_index: int) -> _Pending:
        """Where new tokens of a choice go: what grows no longer than half a message, so that one always fits."""
        parts = self._tokens.setdefault((key, epoch), deque())
        if not parts or parts[-1].num_bytes > self._max_message_bytes // 2:
            if parts:
                assert first_index == parts[-1].first_index + len(parts[-1].token_ids), (key, first_index)
            parts.append(_Pending(first_index))
        return parts[-1]

    def add_end(self, end: worker_pb2.RequestEnd) -> None:
        """How a choice ended. Its tokens, if any wait here, leave in the same message or before it."""
        self._ends.append(end)
        self._changed()

    def at_step(self, step: int) -> None:
        """The engine step that the next tokens come from."""
        self._step = step

    async def wait(self) -> None:
        """Return when something waits to leave."""
        await self._waiting.wait()

    async def wait_for_room(self) -> None:
        """Return when the router has caught up."""
        await self._room.wait()

    def take(self) -> worker_pb2.StepOutput | None:
        """What waits, as one message; the rest of it, if it is too large, as the next. None: nothing waits."""
        if not self._waiting.is_set():
            return None
        output = worker_pb2.StepOutput(step=self._step)
        self._take_tokens(output)
        ends, self._ends = self._ends, []
        for end in ends:
            place = SequenceKey(end.request_id, end.choice), epoch_from_wire(end.epoch)
            (self._ends if place in self._tokens else output.ends).append(end)
        if not self._tokens and not self._ends:
            self._waiting.clear()
        if not self.is_full:
            self._room.set()
        return output

    def _take_tokens(self, output: worker_pb2.StepOutput) -> None:
        """Move parts into a message: at least one, and as many as its bound allows."""
        num_bytes = 0
        for (key, epoch), parts in list(self._tokens.items()):
            while parts:
                pending = parts[0]
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
            del self._tokens[key, epoch]

    def _changed(self) -> None:
        self._waiting.set()
        if self.is_full:
            self._room.clear()
