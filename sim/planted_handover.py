"""Planted bugs of the hand-over: its machines, their carrier, and how workers carry out the actions."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakSet

from ..decode_worker import pull
from ..decode_worker.pull import KvPull
from ..decode_worker.task import DecodeTask as DecodeRun
from ..kv.handover.carrier import Carrier, CheckLine
from ..kv.handover.machine import Action, Label, Lost, MessageVerdict, NumberedStream, Send
from ..kv.handover.receiver import FrameArrived, Receiver, ReceiverState
from ..kv.handover.sender import Sender
from ..kv.section import SectionData
from ..prefill_worker.task import PrefillTask
from .planting import Planted, both, damaging, instead, sharing


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
)
