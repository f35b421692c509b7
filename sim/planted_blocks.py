"""Planted bugs of blocks that are copied and fetched between workers: the journal, its offers, copies, fetches."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from ..core.request import SequenceKey
from ..decode_worker import journaling
from ..decode_worker.journal import Journal, Offer
from ..decode_worker.journaling import Journaling
from ..engine.link import messages as link
from ..kv.handover.fetching import BlockFetch
from ..kv.handover.machine import Action, Fetched
from ..worker.blocks.copies import Copies, KeepTask
from .planting import Planted, both, copying, copying_in_bad_weather, instead


def ended_runs_free_the_journal() -> AbstractContextManager[None]:
    """Offers of runs that have ended do not count: more are under way than may be. (It was so once.)"""
    next_, answered = Journal.next, Journal.answered

    def count(self: Journal) -> None:
        self.num_under_way = sum(run.is_offered for run in self._runs.values())

    def counted_next(self: Journal, now_s: float) -> Offer | None:
        count(self)
        return next_(self, now_s)

    def counted_answered(self: Journal, offer: Offer, kept_tokens: int, now_s: float) -> None:
        answered(self, offer, kept_tokens, now_s)
        count(self)

    return both(instead(Journal, "next", counted_next), instead(Journal, "answered", counted_answered))


def offers_cost_nothing() -> AbstractContextManager[None]:
    """An offer is not charged to the bytes per second."""
    original = Journal.next

    def next_(self: Journal, now_s: float) -> Offer | None:
        self._room = self._limits.bytes_per_s
        return original(self, now_s)

    return instead(Journal, "next", next_)


def unanswered_offers_stay() -> AbstractContextManager[None]:
    """An offer of a run that has ended meanwhile is under way for ever."""
    original = Journal.answered

    def answered(self: Journal, offer: Offer, kept_tokens: int, now_s: float) -> None:
        if offer.key in self._runs:
            original(self, offer, kept_tokens, now_s)

    return instead(Journal, "answered", answered)


def ended_runs_stay_in_the_journal() -> AbstractContextManager[None]:
    """A run that is over stays in the journal."""
    return instead(Journaling, "end", lambda *_: None)


def offers_wait_for_ever() -> AbstractContextManager[None]:
    """A buddy that does not answer is waited for without a bound."""
    return instead(journaling, "OFFER_S", 1e9)


def half_blocks_are_offered() -> AbstractContextManager[None]:
    """A block is offered when its last token is known, one step before its KV is computed."""
    original = Journal.grew

    def grew(self: Journal, key: SequenceKey, num_tokens: int) -> None:
        original(self, key, num_tokens + 1)

    return instead(Journal, "grew", grew)


def offers_skip_a_token() -> AbstractContextManager[None]:
    """The first token that is generated is missing in the chain that is offered."""
    original = Journaling.grew

    def grew(self: Journaling, key: SequenceKey, token_ids: Any, *, has_kv: bool) -> None:
        run = self._runs.get(key)
        original(self, key, token_ids, has_kv=has_kv)
        if run is not None and len(run.token_ids) == len(token_ids) > 0:
            run.token_ids.pop(0)

    return instead(Journaling, "grew", grew)


def failed_copies_stay() -> AbstractContextManager[None]:
    """A copy whose fetch failed keeps its blocks until its deadline."""
    original = KeepTask._fetched

    def fetched(self: KeepTask, told: Fetched) -> None:
        if told.end == "complete":
            original(self, told)

    return instead(KeepTask, "_fetched", fetched)


def callers_that_leave_are_served() -> AbstractContextManager[None]:
    """A copy goes on after its caller has left."""
    return instead(KeepTask, "cancel", lambda *_: None)


def failed_copies_count() -> AbstractContextManager[None]:
    """A copy that ends without all blocks counts as being made for ever."""
    original = Copies.begin

    def begin(self: Copies, wanted: Any, replied: Any) -> Any:
        def told(reply: Any) -> None:
            if reply.reason == "not all blocks came":
                self.num_keeping += 1
            replied(reply)

        return original(self, wanted, told)

    return instead(Copies, "begin", begin)


def copies_wait_for_room() -> AbstractContextManager[None]:
    """A copy whose sequence ends before its blocks are bound is never reported."""
    original = KeepTask._handle

    def handle(self: KeepTask, event: Any) -> None:
        if not (isinstance(event, link.Ended) and not self._is_whole and self.fetch is None):
            original(self, event)

    return instead(KeepTask, "_handle", handle)


def silent_sources_are_awaited() -> AbstractContextManager[None]:
    """A fetch waits for a source that says nothing until the request's deadline."""
    original = BlockFetch.tick

    def tick(self: BlockFetch, now_s: float) -> list[Action]:
        return original(self, now_s) if now_s >= self._deadline_s else []

    return instead(BlockFetch, "tick", tick)


BUGS: tuple[Planted, ...] = (
    Planted(ended_runs_free_the_journal, ("Q1",), 100, copying_in_bad_weather),
    Planted(offers_cost_nothing, ("Q1",), 300, copying),
    Planted(unanswered_offers_stay, ("K1",), 100, copying),
    Planted(ended_runs_stay_in_the_journal, ("K1", "K7"), 100, copying),
    Planted(offers_wait_for_ever, ("K1",), 450, copying_in_bad_weather),
    Planted(half_blocks_are_offered, ("K7",), 100, copying),
    Planted(offers_skip_a_token, ("K7",), 100, copying),
    Planted(failed_copies_stay, ("R7",), 100, copying_in_bad_weather),
    Planted(callers_that_leave_are_served, ("R7",), 100, copying_in_bad_weather),
    Planted(failed_copies_count, ("K1",), 100, copying_in_bad_weather),
    Planted(copies_wait_for_room, ("K1",), 100, copying_in_bad_weather),
    Planted(silent_sources_are_awaited, ("R7",), 100, copying_in_bad_weather),
)
