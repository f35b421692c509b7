"""Planted bugs of the hand-over: its machines, their carrier, and how workers carry out the actions.

Those that name a report were shipped by other projects: KV was wrong, or blocks or requests were lost.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakSet

from ..decode_worker import pull
from ..decode_worker.pull import KvPull
from ..decode_worker.task import DecodeTask as DecodeRun
from ..kv.handover.carrier import Carrier, CheckLine
from ..kv.handover.machine import Action, GotFirstToken, HandoverEnd, Label, Lost, MessageVerdict, NumberedStream, Send
from ..kv.handover.plane_channel import OfferedMemory, RingPool
from ..kv.handover.receiver import FrameArrived, Receiver, ReceiverState
from ..kv.handover.sender import Sender, SenderState
from ..kv.section import SectionData
from ..prefill_worker.task import PrefillTask
from .planting import Planted, both, damaging, freezing, instead, leaving, sharing


def digests_are_not_checked() -> AbstractContextManager[None]:
    """The decode worker accepts every frame as intact."""
    return instead(pull, "verify_frame", lambda *_: True)


def planes_leave_though_they_mismatch() -> AbstractContextManager[None]:
    """The prefill worker sends the planes that it read although they do not match their seals."""
    original = PrefillTask._judge

    def judge(self: PrefillTask, place: tuple[int, int], sections: tuple[SectionData, ...], matches: bool) -> None:
        original(self, place, sections, True)

    return instead(PrefillTask, "_judge", judge)


def duplicates_are_accepted() -> AbstractContextManager[None]:
    """A message that was accepted before is accepted again."""
    original = NumberedStream.admit

    def admit(self: NumberedStream, label: Label, sequence: int, now_s: float) -> MessageVerdict:
        verdict = original(self, label, sequence, now_s)
        return MessageVerdict.ACCEPT if verdict is MessageVerdict.DROP else verdict

    return instead(NumberedStream, "admit", admit)


def refetch_is_ignored() -> AbstractContextManager[None]:
    """The prefill worker does not send a damaged range again."""
    return instead(Sender, "_refetch", lambda self, wanted, now_s: [])


def slot_of_a_damaged_frame_is_kept() -> AbstractContextManager[None]:
    """The decode worker asks for a damaged frame again, but does not free the frame's slot."""
    original = Receiver._refetch

    def refetch(self: Receiver, frame: FrameArrived, units: range, now_s: float) -> list[Action]:
        actions = original(self, frame, units, now_s)
        if not any(isinstance(action, Lost) for action in actions):
            self._stream._sent -= 1  # the number of the removed message is used again
            actions.pop()
        return actions

    return instead(Receiver, "_refetch", refetch)


def silence_is_ignored() -> AbstractContextManager[None]:
    """A silent peer is waited for until the request's deadline."""
    original = Sender._abort

    def abort(self: Sender, reason: Any, now_s: float, *rest: Any) -> list[Action]:
        actions = original(self, reason, now_s, *rest)
        return [a for a in actions if type(a).__name__ != "Abort"] if reason in ("silent", "closed") else actions

    return instead(Sender, "_abort", abort)


def first_token_is_sampled_again() -> AbstractContextManager[None]:
    """After a fall-back, the first token that the client already has is sampled again."""
    original = DecodeRun.pull_lost

    def pull_lost(self: DecodeRun, lost: Lost) -> None:
        original(self, Lost(lost.reason, lost.stored_upto, None, lost.detail, lost.error_code, lost.error_message))

    return instead(DecodeRun, "pull_lost", pull_lost)


def older_epochs_are_admitted() -> AbstractContextManager[None]:
    """A message of an older dispatch is accepted as one of the current dispatch."""
    original = NumberedStream.admit

    def admit(self: NumberedStream, label: Label, sequence: int, now_s: float) -> MessageVerdict:
        return original(self, self.label if label.epoch < self.label.epoch else label, sequence, now_s)

    return instead(NumberedStream, "admit", admit)


def frames_are_overtaken_by_what_follows() -> AbstractContextManager[None]:
    """Messages behind a frame are handled while the frame's digests are still being verified."""
    return instead(CheckLine, "_must_wait", lambda self: False)


def the_timer_is_set_once() -> AbstractContextManager[None]:
    """The timer of a machine is set for its first deadline only, never for later ones."""
    original = Carrier.rearm
    armed: WeakSet[Carrier] = WeakSet()

    def rearm(self: Carrier) -> None:
        if self not in armed:
            armed.add(self)
            original(self)

    return instead(Carrier, "rearm", rearm)


def rings_are_not_given_back_after_a_cancel() -> AbstractContextManager[None]:
    """The ring of a hand-over that was cancelled stays lent for ever."""
    original = KvPull._give_back

    def give_back(self: KvPull, *, is_orderly: bool = False, has_failed: bool = False) -> None:
        if self.receiver.state is not ReceiverState.CANCELLED:
            original(self, is_orderly=is_orderly, has_failed=has_failed)

    return instead(KvPull, "_give_back", give_back)


def slots_are_freed_before_they_are_stored() -> AbstractContextManager[None]:
    """The slot of a verified frame is freed at once: the next frame is written over it before the engine stores it."""
    take, written = Receiver._take, Receiver.written

    def take_and_free(self: Receiver, frame: FrameArrived, units: range, now_s: float) -> list[Action]:
        actions = take(self, frame, units, now_s)
        if self.state is ReceiverState.RECEIVING:
            self._writing[frame.token_start, frame.token_count] = None
            self._unsaid_free.append(frame.slot)
            actions += self._say_free(now_s)
        return actions

    def not_freed_again(self: Receiver, token_start: int, token_count: int, now_s: float) -> list[Action]:
        before = self._stream._sent
        actions = written(self, token_start, token_count, now_s)
        freed = [a for a in actions if isinstance(a, Send) and a.message.WhichOneof("body") == "slot_free"]
        self._stream._sent = before if freed else self._stream._sent
        self._unsaid_free.clear()
        return [action for action in actions if action not in freed]

    return both(instead(Receiver, "_take", take_and_free), instead(Receiver, "written", not_freed_again))


# ------------------------------------------------------------------ shipped by other projects


def a_hit_is_trimmed_on_one_side() -> AbstractContextManager[None]:
    """Prefill does not send the prefix that it has cached itself, as if decode had it too (vllm#48633 C3)."""
    original = Sender.started

    def started(self: Sender, cached_tokens: int, now_s: float) -> list[Action]:
        self._next = max(self._next, cached_tokens - cached_tokens % 16)
        return original(self, cached_tokens, now_s)

    return instead(Sender, "started", started)


class _NoOwner:
    """Owner of a hand-over whose request is over."""

    def bind_wanted(self) -> None:
        """Implements `PullOwner.bind_wanted`."""

    def first_token_came(self, first: GotFirstToken) -> None:
        """Implements `PullOwner.first_token_came`."""

    def pull_completed(self) -> None:
        """Implements `PullOwner.pull_completed`."""

    def pull_lost(self, lost: Lost) -> None:
        """Implements `PullOwner.pull_lost`."""


def a_registration_outlives_its_request() -> AbstractContextManager[None]:
    """A hand-over of a cancelled request continues, and its frames are written (vllm#48633 C1)."""

    def cancel(self: KvPull, reason: str) -> None:
        self._owner = _NoOwner()

    return instead(KvPull, "cancel", cancel)


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

    def pull_completed(self: DecodeRun) -> None:
        self._finish_pull()

    return instead(DecodeRun, "pull_completed", pull_completed)


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
    Planted(digests_are_not_checked, ("K4",), 300),
    Planted(planes_leave_though_they_mismatch, ("K4",), 150, damaging),
    Planted(duplicates_are_accepted, ("L1",), 800),
    Planted(refetch_is_ignored, ("L1",), 450),
    Planted(slot_of_a_damaged_frame_is_kept, ("L1",), 800),
    Planted(silence_is_ignored, ("R7",), 100),
    Planted(first_token_is_sampled_again, ("R3",), 800),
    Planted(older_epochs_are_admitted, ("L1",), 550),
    Planted(frames_are_overtaken_by_what_follows, ("L1",), 300),
    Planted(the_timer_is_set_once, ("R7",), 550),
    Planted(rings_are_not_given_back_after_a_cancel, ("K1",), 300, sharing),
    Planted(slots_are_freed_before_they_are_stored, ("K4",), 1100, sharing),
    Planted(a_hit_is_trimmed_on_one_side, ("L1",), 850),
    Planted(a_registration_outlives_its_request, ("K1", "K3", "R7", "L1"), 200),
    Planted(beats_are_not_checked, ("R7",), 100, freezing),
    Planted(a_failed_read_is_not_reported, ("L1", "R7"), 400, damaging),
    Planted(the_source_is_freed_when_all_is_sent, ("L1", "K3"), 1100),
    Planted(rings_leave_quarantine_at_the_first_error, ("K3", "K4"), 150, leaving),
    Planted(completions_are_dropped, ("L1", "R7"), 150),
    Planted(a_beat_renews_another_generation, ("L1",), 700),
)
