"""Tokens and ends of an engine's sequences, and the outbox of events and store operations. Knows no commands."""

from __future__ import annotations

from collections import Counter

from ..core.request import SequenceKey
from .cache_manager import KvCacheManager
from .link.messages import Ended, Event
from .plan import SequenceStep
from .scheduler import Scheduler
from .sequence import PendingFinish, Sequence
from .stopping import finish_reason
from .store_ops import StoreOp


class SequenceLifecycle:
    """The scheduler with its sequences, the outbox, and the only way to end a sequence."""

    def __init__(self, scheduler: Scheduler, eos_ids: frozenset[int]) -> None:
        self.scheduler = scheduler
        self.counters: Counter[str] = Counter()
        self.outbox: list[Event | StoreOp] = []
        self.in_step: frozenset[SequenceKey] = frozenset()  # sequences of the running step: their blocks must stay
        self._eos_ids = eos_ids

    @property
    def holdings(self) -> KvCacheManager:
        """The blocks of all sequences."""
        return self.scheduler.holdings

    def get(self, key: SequenceKey) -> Sequence | None:
        """A live sequence whose end is not decided, or None."""
        sequence = self.scheduler.by_key.get(key)
        return None if sequence is None or sequence.doom is not None else sequence

    def accept(self, sequence: Sequence, token_id: int) -> PendingFinish | None:
        """Append a generated token; returns the end that it causes, or None."""
        sequence.tokens.append(token_id)
        sequence.scores = None  # the face has them, or the peer's face
        reason = finish_reason(token_id, sequence.num_generated, sequence.params, self._eos_ids)
        return None if reason is None else PendingFinish(reason)

    def accept_drafts(
        self, sequence: Sequence, step: SequenceStep, token_ids: tuple[int, ...], doom: PendingFinish | None
    ) -> tuple[PendingFinish | None, tuple[int, ...]]:
        """After the first of a step's tokens, append the others, as far as the sequence goes.

        The KV of the accepted drafts is computed; blocks that hold only rejected ones are given back. `doom`: by the
        first token. Returns the end of the sequence, and the tokens that belong to it.
        """
        num_taken = 1
        while doom is None and num_taken < len(token_ids):
            doom = self.accept(sequence, token_ids[num_taken])
            num_taken += 1
        num_accepted = num_taken - 1
        sequence.num_computed = step.end + num_accepted
        self.holdings.trim(sequence, len(sequence.tokens))
        assert sequence.drafting is not None, f"{step.key} has drafts of nobody"
        sequence.drafting.judge(len(step.draft_ids), num_accepted, sequence.num_generated)
        self.counters["spec_decode_num_drafts"] += 1
        self.counters["spec_decode_num_draft_tokens"] += len(step.draft_ids)
        self.counters["spec_decode_num_accepted_tokens"] += num_accepted
        self.counters[f"{sequence.drafting.name}_draft_tokens"] += len(step.draft_ids)
        self.counters[f"{sequence.drafting.name}_accepted_tokens"] += num_accepted
        return doom, token_ids[:num_taken]

    def drop_drafts(self, sequence: Sequence) -> None:
        """A step with drafts sampled nothing: give back what was taken for them, and judge nothing."""
        if sequence.drafting is not None and sequence.drafting.num_under_way:
            sequence.drafting.num_under_way = 0
            self.holdings.trim(sequence, len(sequence.tokens))

    def end(self, sequence: Sequence, doom: PendingFinish) -> None:
        """End a sequence now, or after the running step if that computes it."""
        if sequence.key in self.in_step:
            sequence.doom = sequence.doom or doom
        else:
            self.finish(sequence, doom)

    def finish(self, sequence: Sequence, doom: PendingFinish) -> None:
        """Free a sequence and report its end to the face."""
        self.scheduler.remove(sequence)
        self._say_ended(_ended(sequence.key, doom, sequence))

    def refuse(self, key: SequenceKey, doom: PendingFinish) -> None:
        """Report the end of a `Submit` that was refused."""
        self._say_ended(_ended(key, doom))

    def _say_ended(self, ended: Ended) -> None:
        self.counters[f"ended_{ended.error_code or ended.reason.value}"] += 1
        self.outbox.append(ended)

    def collect_news(self) -> None:
        """Add the changes of the prefix cache to the outbox."""
        news = self.holdings.news()
        if news is not None:
            self.outbox.append(news)

    def drain(self) -> list[Event | StoreOp]:
        """Take all events and store operations since the last call, in order."""
        outbox, self.outbox = self.outbox, []
        return outbox


def _ended(key: SequenceKey, doom: PendingFinish, sequence: Sequence | None = None) -> Ended:
    told = (doom.reason, doom.error_code, doom.error_message)
    if sequence is None:
        return Ended(key, *told)
    drafting = sequence.drafting
    guesses = (0, 0, "")
    if drafting is not None and drafting.num_drafted:
        guesses = (drafting.num_drafted, drafting.num_accepted, drafting.name)
    return Ended(key, *told, sequence.cached_tokens, sequence.preemptions, *guesses, sequence.began_s)
