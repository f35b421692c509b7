"""Planted bugs of wires: paired channels and their quarantine."""

from __future__ import annotations

from contextlib import AbstractContextManager

from ..decode_worker.pull import KvPull
from ..kv.handover.paired_channel import PairedChannel
from ..kv.handover.paired_link import Free, LinkAction, LinkState, SourceEnd, _End
from ..kv.handover.paired_transfers import DestinationTransfers, Took
from ..prefill_worker.paired_peers import AcceptedChannels
from .planting import Planted, instead
from .planting_wires import pairing


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


BUGS: tuple[Planted, ...] = (
    Planted(slots_leave_quarantine_at_the_first_error, ("K3",), 100, pairing),
    Planted(channels_are_gone_when_they_fail, ("K3",), 100, pairing),
    Planted(sent_slots_are_free_when_posted, ("K3",), 100, pairing),
    Planted(hanging_transfers_are_awaited, ("L1", "K1", "R7"), 150, pairing),
    Planted(lost_transfers_are_not_told, ("L1", "R7"), 600, pairing),
    Planted(keys_outlive_their_hand_overs, ("K1",), 100, pairing),
    Planted(headers_that_come_twice_take_the_claim, ("L1",), 300, pairing),
    Planted(channels_are_counted_for_ever, ("K1",), 100, pairing),
)
