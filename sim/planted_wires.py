"""Planted bugs of wires: paired channels and their quarantine, and windows, ranks."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from ..core.errors import RankLost
from ..decode_worker.pull import KvPull
from ..engine import commands, rank_store
from ..engine.rank_store import SlicedStore
from ..engine.store_ops import WriteOp
from ..kv import slices, windows
from ..kv.cache.prefix import PrefixCache
from ..kv.handover.paired_channel import PairedChannel
from ..kv.handover.paired_link import Free, LinkAction, LinkState, SourceEnd, _End
from ..kv.handover.paired_transfers import DestinationTransfers, Took
from ..kv.handover.shards import Slice
from ..kv.section import SectionData
from ..kv.slices import RankSlices
from ..kv.spec import WindowedLayers
from ..kv.windows import WINDOW_STEP
from ..prefill_worker.paired_peers import AcceptedChannels
from .planting import Planted, instead
from .planting_wires import pairing, ranking, ranking_swaps, windowing


def slots_leave_quarantine_at_the_first_error() -> AbstractContextManager[None]:
    """After an error the slots of all transfers are free, though siblings are still read (vllm PR#56104)."""
    original = _End.failed

    def failed(self: _End, reason: str) -> list[LinkAction]:
        actions = original(self, reason)
        return [*actions, *(Free(slot) for slot in sorted(self.quarantined))] if actions else []

    return instead(_End, "failed", failed)


def channels_are_gone_when_they_fail() -> AbstractContextManager[None]:
    """A channel's memory is given back when it fails, not when the library has let go (vllm#48633 C1)."""
    is_gone = property(lambda self: self.end.state is not LinkState.OPEN)
    return instead(PairedChannel, "is_gone", is_gone)


def sent_slots_are_free_when_posted() -> AbstractContextManager[None]:
    """A slot takes the next planes as soon as its send is posted, before the library has read it."""
    original = SourceEnd.ready

    def ready(self: SourceEnd, transfer: int, now_s: float) -> list[LinkAction]:
        actions = original(self, transfer, now_s)
        slots = [self._posted[transfer][0].slot] if transfer in self._posted else []
        return [*actions, *(Free(slot) for slot in slots)]

    return instead(SourceEnd, "ready", ready)


def hanging_transfers_are_awaited() -> AbstractContextManager[None]:
    """An operation that never ends is waited for without a bound."""
    return instead(_End, "next_deadline_s", property(lambda _: None))


def lost_transfers_are_not_told() -> AbstractContextManager[None]:
    """Who waits for the planes of a channel that failed is not told (vllm#48633 C2, vllm PR#50754)."""
    original = DestinationTransfers._turned

    def turned(self: DestinationTransfers) -> None:
        if self._end.state is LinkState.OPEN:
            original(self)

    return instead(DestinationTransfers, "_turned", turned)


def keys_outlive_their_hand_overs() -> AbstractContextManager[None]:
    """A hand-over that was cancelled stays a receiver of its channel for ever."""
    original = KvPull.cancel

    def cancel(self: KvPull, reason: str) -> None:
        self._pair = None
        original(self, reason)

    return instead(KvPull, "cancel", cancel)


def headers_that_come_twice_take_the_claim() -> AbstractContextManager[None]:
    """The second header of a transfer waits for planes that the first one gets. (It was so once.)"""
    original = DestinationTransfers.claim

    def claim(self: DestinationTransfers, key: int, transfer: int, took: Took) -> None:
        self._handovers[key].last_claimed = 0
        original(self, key, transfer, took)

    return instead(DestinationTransfers, "claim", claim)


def channels_are_counted_for_ever() -> AbstractContextManager[None]:
    """The memory of a channel that is over counts on, until no other channel is accepted."""
    return instead(AcceptedChannels, "over", lambda *_: None)


# ------------------------------------------------------------------ windows


def windows_are_a_step_short() -> AbstractContextManager[None]:
    """A hand-over leaves out the oldest tokens of a window."""
    original = windows.first_needed

    def first_needed(windowed: WindowedLayers | None, start: int) -> int:
        found = original(windowed, start)
        return found if windowed is None or found + WINDOW_STEP > start else found + WINDOW_STEP

    return instead(windows, "first_needed", first_needed)


def blocks_without_windows_pass_for_whole() -> AbstractContextManager[None]:
    """The engine does not note that KV came without its windowed layers."""
    return instead(commands, "lacks_windows", lambda *_: False)


def matches_ignore_windows() -> AbstractContextManager[None]:
    """The cache publishes blocks without windowed layers as whole ones."""
    original = PrefixCache.publish

    def publish(self: PrefixCache, *place: Any, **_: Any) -> Any:
        return original(self, *place[:4])

    return instead(PrefixCache, "publish", publish)


# ------------------------------------------------------------------ ranks


def lost_ranks_are_forgiven() -> AbstractContextManager[None]:
    """Work counts that a rank did not do, because it is gone."""
    original = rank_store.together

    def together(group: Any, work: Any, *ended: Any) -> Any:
        result = None

        def noted() -> Any:
            nonlocal result
            result = work()
            return result

        try:
            return original(group, noted, *ended)
        except RankLost:
            return result

    return instead(rank_store, "together", together)


def one_rank_is_written() -> AbstractContextManager[None]:
    """Planes of a hand-over are stored at the first rank only."""

    def write(self: SlicedStore, op: WriteOp) -> None:
        self._mine.write(replace(op, sections=self._slices.taken_apart(op.sections)[0]))

    return instead(SlicedStore, "write", write)


def one_rank_is_swapped_in() -> AbstractContextManager[None]:
    """A preempted sequence comes back at the first rank only."""
    return instead(SlicedStore, "swap_in", lambda self, op: self._mine.swap_in(op))


def heads_are_counted_from_the_model_s_first() -> AbstractContextManager[None]:
    """A rank gets its heads under their numbers in the whole model."""
    original = slices._cut

    def cut(section: SectionData, piece: Slice, first_head: int) -> SectionData | None:
        return original(section, piece, 0)

    return instead(slices, "_cut", cut)


def ranks_get_each_other_s_heads() -> AbstractContextManager[None]:
    """Slices go to the ranks in another order than their heads."""
    original = RankSlices.taken_apart

    def taken_apart(self: RankSlices, sections: Any) -> Any:
        return original(self, sections)[::-1]

    return instead(RankSlices, "taken_apart", taken_apart)


BUGS: tuple[Planted, ...] = (
    Planted(slots_leave_quarantine_at_the_first_error, ("K3",), 100, pairing),
    Planted(channels_are_gone_when_they_fail, ("K3",), 100, pairing),
    Planted(sent_slots_are_free_when_posted, ("K3",), 100, pairing),
    Planted(hanging_transfers_are_awaited, ("L1", "K1", "R7"), 150, pairing),
    Planted(lost_transfers_are_not_told, ("L1", "R7"), 600, pairing),
    Planted(keys_outlive_their_hand_overs, ("K1",), 100, pairing),
    Planted(headers_that_come_twice_take_the_claim, ("L1",), 300, pairing),
    Planted(channels_are_counted_for_ever, ("K1",), 100, pairing),
    Planted(windows_are_a_step_short, ("K4",), 200, windowing),
    Planted(blocks_without_windows_pass_for_whole, ("K4", "K7"), 100, windowing),
    Planted(matches_ignore_windows, ("K4", "K7"), 100, windowing),
    Planted(lost_ranks_are_forgiven, ("R13",), 100, ranking),
    Planted(one_rank_is_written, ("K4",), 100, ranking),
    Planted(one_rank_is_swapped_in, ("K4",), 100, ranking_swaps),
    Planted(heads_are_counted_from_the_model_s_first, ("K4",), 100, ranking),
    Planted(ranks_get_each_other_s_heads, ("K4",), 100, ranking),
)
