"""One end of a hand-over stream in virtual time. Production code drives it: `KvPull`, `PrefillTask`, their carrier.

Envelopes are real bytes; kv/handover/frames.py verifies digests. Knows no request, no router, no engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...core.request import Epoch
from ...kv.handover.carrier import Check, Hear
from ...kv.handover.frames import encode_message
from ...kv.handover.machine import (
    Abort,
    Action,
    AskBlocks,
    Fetched,
    HandoverEnd,
    Label,
    Lost,
    Read,
    Send,
    SendFrame,
    Write,
)
from ...protos import handover_pb2
from ..invariants import Violation
from ..network import End
from ..world import Process, Timer, World

SLACK_S = 0.5
EXPLAINED = (HandoverEnd.FAILED, HandoverEnd.CORRUPTED)  # a hand-over may end with these in any weather


@dataclass(frozen=True, slots=True)
class Place:
    """Process in which a hand-over machine runs, and the faults there."""

    world: World
    process: Process
    is_bearable: bool  # no fault of the schedule explains a lost hand-over
    check_s: float  # duration of verifying digests; 0: done at once
    stray: float  # probability that a message of an older dispatch is sent first


class SimHost:
    """Implements StreamHost of kv/handover/carrier.py."""

    def __init__(self, place: Place, end: End, name: str, closed: Callable[[], None] | None = None) -> None:
        """`closed` is called when the machine closes the stream; only the side that accepted the stream gives it."""
        self.name = name
        # Called with each frame sent; returns the memory of its planes if they are beside the stream.
        self.sends: Callable[[SendFrame, bytes], memoryview | None] = lambda frame, envelope: None
        self.heard: Callable[[], None] = lambda: None  # called after each message, and after the end
        self._place = place
        self._end = end
        self._closed = closed
        self._frame: SendFrame | None = None  # the frame that is sent next

    def now_s(self) -> float:
        """Implements `StreamHost.now_s`."""
        return self._place.world.now_s()

    def after(self, delay_s: float, act: Callable[[], None]) -> Timer:
        """Implements `StreamHost.after`."""
        return self._place.world.after(delay_s, self._place.process, act)

    def listen(self, hear: Hear) -> None:
        """Implements `StreamHost.listen`."""

        def take(message: Any) -> None:
            hear(message)
            self.heard()

        self._end.on_message, self._end.on_end = take, lambda: take(None)

    def send(self, envelope: bytes) -> None:
        """Implements `StreamHost.send`; first passes a frame to `sends`."""
        if self._frame is not None:
            self._end.planes = self.sends(self._frame, envelope)
            self._frame = None
        self._end.send(envelope)
        self._end.planes = None

    def close(self, *, now: bool) -> None:
        """Implements `StreamHost.close`."""
        if self._closed is not None:
            self._end.finish()
            self._end.is_deaf = True
            self._closed()
        elif now:
            self._end.abort()
        else:
            self._end.finish()

    def hold(self, is_held: bool) -> None:
        """Implements `FetchHost.hold`: messages wait nowhere here, so all of them come."""

    def check(self, check: Check, answered: Callable[[bool], None]) -> None:
        """Implements `StreamHost.check`."""
        if self._place.check_s:
            self.after(self._place.check_s, lambda: answered(check.holds()))
        else:
            answered(check.holds())

    def trace(self, action: Action) -> None:
        """Implements `StreamHost.trace`."""
        place = self._place
        match action:
            case Send(message):
                self._stray(message)
                if message.WhichOneof("body") == "beat":
                    return
            case SendFrame():
                self._frame = action
            case Lost(reason, _, _, detail) if place.is_bearable and reason not in EXPLAINED:
                raise Violation("L1", f"{self.name}: lost without need: {reason.value} {detail}")
        place.world.note(place.process, f"{self.name} {described(action)}")

    def check_deadline(self, due_s: float | None) -> None:
        """Check R7: the machine waits for a silent peer no longer than its own deadline allows."""
        late_s = 0.0 if due_s is None else self.now_s() - due_s
        if late_s > SLACK_S + self._place.process.frozen_s:
            raise Violation("R7", f"{self.name} waits {late_s:.2f} s longer than it may")

    def _stray(self, message: handover_pb2.HandoverUp | handover_pb2.HandoverDown) -> None:
        """Sometimes send a beat of an older dispatch, under the number of the message that leaves next."""
        if not self._place.world.chance(self._place.stray) or message.WhichOneof("body") == "open":
            return
        label = Label.of(message)
        older = Label(label.request_id, label.choice, Epoch(label.epoch.incarnation - 1, label.epoch.counter))
        say = older.up if isinstance(message, handover_pb2.HandoverUp) else older.down
        self._end.send(encode_message(say(message.sequence, handover_pb2.HandoverBeat())))


class SimFetchHost(SimHost):
    """Implements FetchHost of decode_worker/fetch.py. The request travels as a value, as gRPC protects it."""

    def __init__(self, place: Place, end: End, name: str) -> None:
        super().__init__(place, end, name)
        self.fetched: Callable[[], None] = lambda: None  # called when the fetch is over

    def trace(self, action: Action) -> None:
        """Implements `StreamHost.trace`."""
        super().trace(action)
        if isinstance(action, Fetched):
            self.fetched()

    def send(self, envelope: bytes) -> None:
        """Implements `StreamHost.send`."""
        self._end.send(handover_pb2.FetchRequest.FromString(envelope))


def described(action: Action) -> str:
    """Short description of an action, for the transcript."""
    match action:
        case Send(message):
            return f"sends {message.WhichOneof('body')} #{message.sequence}"
        case SendFrame(sequence, start, count):
            return f"sends frame #{sequence} {start}+{count}"
        case Read(start, count):
            return f"reads {start}+{count}"
        case Write(_, start, count):
            return f"writes {start}+{count}"
        case Lost(reason, stored_upto, first_token, detail):
            return f"lost: {reason.value}, stored {stored_upto}, first token {first_token} {detail}"
        case AskBlocks(identities, first_token):
            return f"asks for {len(identities)} blocks from {first_token}"
        case Fetched(end, stored_upto, detail):
            return f"fetched: {end}, stored {stored_upto} {detail}"
        case Abort(reason, detail):
            return f"aborts: {reason.value} {detail}"
        case _:
            return type(action).__name__
