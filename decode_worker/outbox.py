"""What one router is still to be told, merged per choice and bounded. Knows no stream and no engine."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import NamedTuple

from ..core.request import Epoch, SequenceKey, TokenLogprobs
from ..kv.messages import epoch_to_wire, logprobs_to_wire
from ..protos import common_pb2, worker_pb2

MAX_PENDING_TOKENS = 65_536
MAX_PENDING_ENDS = 4_096


@dataclass(slots=True)
class _Pending:
    """Tokens of one choice that have not left yet: consecutive, from `first_index` on."""

    first_index: int
    token_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    logprobs: list[common_pb2.TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[common_pb2.TokenLogprobs] = field(default_factory=list)
    num_shown: int = 0


class Scores(NamedTuple):
    """What goes with new tokens where logprobs were asked for."""

    logprobs: tuple[TokenLogprobs, ...] = ()  # one per token
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    num_shown: int = 0  # of the choice so far


NO_SCORES = Scores()


class Outbox:
    """Collects what engine steps and hand-overs produce until the writer takes it all in one message.

    The writer waits in `wait`; everything that was added before it runs leaves together, so a step's tokens for all
    requests are one message. A router that reads slowly gets fewer and larger messages, never a longer queue: tokens
    of one choice merge, and when the bounds are passed (`is_full`) the session takes no new orders.
    """

    def __init__(self, max_tokens: int = MAX_PENDING_TOKENS, max_ends: int = MAX_PENDING_ENDS) -> None:
        self._max_tokens = max_tokens
        self._max_ends = max_ends
        self._tokens: dict[tuple[SequenceKey, Epoch], _Pending] = {}
        self._ends: list[worker_pb2.RequestEnd] = []
        self._news: list[worker_pb2.RequestNews] = []
        self._num_tokens = 0
        self._step = 0
        self._waiting = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    @property
    def is_full(self) -> bool:
        """Whether the router is too far behind to be given more work."""
        return self._num_tokens >= self._max_tokens or len(self._ends) >= self._max_ends

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
        pending = self._tokens.setdefault((key, epoch), _Pending(first_index))
        assert first_index == pending.first_index + len(pending.token_ids), (key, first_index)
        pending.token_ids.extend(token_ids)
        pending.text.append(text)
        if scores is not NO_SCORES:
            pending.logprobs += logprobs_to_wire(scores.logprobs)
            pending.prompt_logprobs += logprobs_to_wire(scores.prompt_logprobs)
            pending.num_shown = scores.num_shown
        self._num_tokens += len(token_ids)
        self._changed()

    def add_end(self, end: worker_pb2.RequestEnd) -> None:
        """How a choice ended. Its tokens, if any wait here, leave in the same message."""
        self._ends.append(end)
        self._changed()

    def add_news(self, key: SequenceKey, epoch: Epoch, what: str) -> None:
        """An instant that the router may want to know. Forgotten when the router is far behind."""
        if len(self._news) < self._max_ends:
            self._news.append(
                worker_pb2.RequestNews(
                    request_id=key.request_id, choice=key.choice, epoch=epoch_to_wire(epoch), what=what
                )
            )
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
        """Everything that waits, as one message; None when nothing does."""
        if not self._waiting.is_set():
            return None
        output = worker_pb2.StepOutput(step=self._step, ends=self._ends, news=self._news)
        for (key, epoch), pending in self._tokens.items():
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
        self._tokens, self._ends, self._news, self._num_tokens = {}, [], [], 0
        self._waiting.clear()
        self._room.set()
        return output

    def _changed(self) -> None:
        self._waiting.set()
        if self.is_full:
            self._room.clear()
