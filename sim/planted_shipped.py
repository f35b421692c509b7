"""Planted bugs that other projects have shipped: wrong KV, lost blocks, lost requests."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from ..decode_worker.pull import KvPull
from ..decode_worker.task import DecodeTask
from ..kv.handover.machine import Action, HandoverEnd, MessageVerdict, NumberedStream
from ..kv.handover.plane_channel import OfferedMemory, RingPool
from ..kv.handover.sender import Sender, SenderState
from ..kv.section import SectionData
from ..prefill_worker.task import PrefillTask
from .planting import Planted, damaging, freezing, instead, leaving


def a_hit_is_trimmed_on_one_side() -> AbstractContextManager[None]:
    """Prefill does not send the prefix that it has cached itself, as if decode had it too (vllm#48633 C3)."""
    original = Sender.started

    def started(self: Sender, cached_tokens: int, now_s: float) -> list[Action]:
        self._next = max(self._next, cached_tokens - cached_tokens % 16)
        return original(self, cached_tokens, now_s)

    return instead(Sender, "started", started)


def a_registration_outlives_its_request() -> AbstractContextManager[None]:
    """A hand-over of a cancelled request continues, and its frames are written (vllm#48633 C1)."""
    return instead(KvPull, "cancel", lambda self, reason: None)


def beats_are_not_checked() -> AbstractContextManager[None]:
    """A peer without a sign of life is waited for until the request's deadline (vllm#48633 L1)."""
    original = NumberedStream.overdue

    def overdue(self: NumberedStream, now_s: float) -> HandoverEnd | None:
        found = original(self, now_s)
        return None if found is HandoverEnd.SILENT else found

    return instead(NumberedStream, "overdue", overdue)


def a_failed_read_is_not_reported() -> AbstractContextManager[None]:
    """Planes that cannot be read are not sent, and decode is not told (vllm#48633 C2, vllm PR#50754)."""
    original = PrefillTask._judge

    def judge(self: PrefillTask, place: tuple[int, int], sections: tuple[SectionData, ...], matches: bool) -> None:
        if matches:
            original(self, place, sections, matches)

    return instead(PrefillTask, "_judge", judge)


def the_source_is_freed_when_all_is_sent() -> AbstractContextManager[None]:
    """Prefill gives its blocks back before decode has verified them (vllm PR#55470)."""

    def perhaps_release(self: Sender) -> list[Action]:
        self._verified = self._num_tokens if self.state is SenderState.DONE else self._verified
        return original(self)

    original = Sender._perhaps_release
    return instead(Sender, "_perhaps_release", perhaps_release)


def rings_leave_quarantine_at_the_first_error() -> AbstractContextManager[None]:
    """A ring is lent again though the peer's write may still be under way (vllm PR#56104)."""
    original = RingPool.take_back

    def take_back(self: RingPool, ring: OfferedMemory, peer: str, *, is_orderly: bool) -> None:
        original(self, ring, peer, is_orderly=True)

    return instead(RingPool, "take_back", take_back)


def completions_are_dropped() -> AbstractContextManager[None]:
    """The engine is not told that a prompt's KV is complete (vllm PR#58188)."""

    def pull_completed(self: DecodeTask) -> None:
        self._finish_pull()

    return instead(DecodeTask, "pull_completed", pull_completed)


def a_beat_renews_another_generation() -> AbstractContextManager[None]:
    """A beat of an older dispatch is taken for one of the present: its number counts (vllm#53095)."""
    original = NumberedStream.admit

    def admit(self: NumberedStream, label: Any, sequence: int, now_s: float) -> MessageVerdict:
        verdict = original(self, label, sequence, now_s)
        if label.epoch < self.label.epoch:
            self._received = max(self._received, sequence)
        return verdict

    return instead(NumberedStream, "admit", admit)


BUGS = (
    Planted(a_hit_is_trimmed_on_one_side, ("L1",), 450),
    Planted(a_registration_outlives_its_request, ("K1", "K3", "R7"), 150),
    Planted(beats_are_not_checked, ("R7",), 100, freezing),
    Planted(a_failed_read_is_not_reported, ("L1", "R7"), 300, damaging),
    Planted(the_source_is_freed_when_all_is_sent, ("L1", "K3"), 500),
    Planted(rings_leave_quarantine_at_the_first_error, ("K3", "K4"), 3500, leaving),
    Planted(completions_are_dropped, ("L1", "R7"), 150),
    Planted(a_beat_renews_another_generation, ("L1",), 700),
)
