"""Both ends of a hand-over in virtual time: the glue of prefill_worker/job.py and decode_worker/pull.py.

Envelopes are real bytes; digests are verified as production does. Knows no request, no router.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from ..core.errors import KvCorrupted, TwostrokeError
from ..core.request import SequenceKey
from ..core.timeline import Timeline
from ..decode_worker.pull import PullOwner
from ..kv.handover import (
    Abort,
    Action,
    AskBind,
    Close,
    Complete,
    EngineBound,
    EngineNotYet,
    GotFirstToken,
    Lost,
    Read,
    Release,
    Send,
    SendFrame,
    Write,
)
from ..kv.handover import (
    End as Ending,
)
from ..kv.handover_receiver import FrameArrived, Receiver
from ..kv.handover_sender import Sender
from ..kv.messages import error_to_wire
from ..kv.section import SectionData
from ..kv.wire import (
    Frame,
    FrameLabel,
    WireError,
    decode_envelope,
    encode_frame,
    encode_message,
)
from ..model import link
from ..model.dispatch import Dispatcher, SequenceEvent
from ..prefill_worker.job import MAX_READS, _why
from ..protos import handover_pb2
from .engine import NUMERICS
from .invariants import Violation
from .network import End
from .store import digests_hold
from .world import Process, Timer, World

SLACK_S = 0.5


@dataclass(frozen=True, slots=True)
class Place:
    """Where a machine runs."""

    world: World
    process: Process
    dispatcher: Dispatcher
    is_bearable: bool  # the weather explains no loss


class Machinery:
    """Carries a machine's actions out in order and calls its tick in time: kv/driver.py without an event loop."""

    def __init__(self, place: Place, machine: Sender | Receiver, end: End, name: str) -> None:
        self.place = place
        self.name = name
        self.is_closed = False  # the machine asked for the stream's end
        self._machine = machine
        self._end = end
        self._todo: list[Action] = []
        self._is_doing = False
        self._timer: Timer | None = None

    def act(self, action: Action) -> None:
        """Carry one action out."""
        raise NotImplementedError

    def do(self, actions: Sequence[Action]) -> None:
        """Carry actions out; those that an answer adds come after the ones before it."""
        self._todo += actions
        if self._is_doing:
            return
        self._is_doing = True
        try:
            while self._todo:
                action = self._todo.pop(0)
                if not isinstance(action, Send) or action.message.WhichOneof("body") not in ("beat",):
                    self.place.world.note(self.place.process, f"{self.name} {described(action)}")
                self.act(action)
        finally:
            self._is_doing = False
        self.rearm()

    def rearm(self) -> None:
        """Set the timer to the machine's next deadline."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due_s = self._machine.next_deadline_s
        if due_s is not None and not self.is_closed:
            world = self.place.world
            self._timer = world.after(max(0.001, due_s - world.now_s()), self.place.process, self._tick)

    def check(self) -> None:
        """R7: nobody listens to silence for longer than agreed."""
        due_s = self._machine.next_deadline_s
        late_s = 0.0 if due_s is None else self.place.world.now_s() - due_s
        if late_s > SLACK_S + self.place.process.frozen_s:
            raise Violation("R7", f"{self.name} waits {late_s:.2f} s longer than it may")

    def _tick(self) -> None:
        self.do(self._machine.tick(self.place.world.now_s()))


def described(action: Action) -> str:
    """An action in a few words."""
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
        case Abort(reason, detail):
            return f"aborts: {reason.value} {detail}"
        case _:
            return type(action).__name__


class SimJob(Machinery):
    """A prompt computed for a decode worker: the glue of prefill_worker/job.py."""

    def __init__(
        self, sender: Sender, submit: link.Submit, end: End, place: Place, over: Callable[[SimJob], None]
    ) -> None:
        super().__init__(place, sender, end, f"{submit.key.request_id}#{submit.key.choice} sender")
        self.sender = sender
        self.submit = submit
        self._over = over
        self._planes: dict[tuple[int, int], tuple[SectionData, ...]] = {}
        self._reads: Counter[tuple[int, int]] = Counter()
        self._is_gone = False  # the engine's Ended came
        end.on_message, end.on_end = self._hear, self._heard_end

    def start(self) -> None:
        """Give the sequence to the engine."""
        self.place.dispatcher.own(self.submit.key, self.handle)
        self.place.dispatcher.send(self.submit)
        self.rearm()

    def handle(self, event: SequenceEvent) -> None:
        """One event of our sequence."""
        now_s = self.place.world.now_s()
        match event:
            case link.Offered(_, cached_tokens):
                self.do(self.sender.started(cached_tokens, now_s))
            case link.Progress(_, num_computed):
                self.do(self.sender.progress(num_computed, now_s))
            case link.TokenNews(_, _, token_ids):  # nobody asks for logprobs here
                self.do(self.sender.first_token(handover_pb2.FirstToken(token_id=token_ids[0]), now_s))
            case link.KvRead(_, token_start, token_count, sections):
                if sections is not None and not self.sender.is_over:
                    self._check(token_start, token_count, sections)
            case link.Ended():
                self._is_gone = True
                self.do(self.sender.failed(error_to_wire(_why(event)), now_s))
            case _:
                pass

    def _check(self, token_start: int, token_count: int, sections: tuple[SectionData, ...]) -> None:
        """Planes leave only if they match the seals that they got at birth."""
        now_s, where = self.place.world.now_s(), (token_start, token_count)
        if digests_hold(sections, token_start, token_count):
            self._planes[where] = sections
            self.do(self.sender.frame_read(token_start, token_count, 8 * token_count, now_s))
            return
        self.place.world.note(self.place.process, f"{self.name}: {token_start}+{token_count} do not match their seals")
        self._reads[where] += 1
        if self._reads[where] < MAX_READS:
            self.place.dispatcher.send(link.ReadKv(self.submit.key, token_start, token_count))
        else:
            error = KvCorrupted(f"tokens {token_start}+{token_count} do not match their seals")
            self.do(self.sender.failed(error_to_wire(error), now_s))

    def _hear(self, envelope: bytes) -> None:
        now_s = self.place.world.now_s()
        try:
            message = decode_envelope(envelope)
            if not isinstance(message, handover_pb2.HandoverUp):
                raise WireError("a message of the other direction")
        except WireError as error:
            self.do(self.sender.garbled(now_s, str(error)))
        else:
            self.do(self.sender.on_message(message, now_s))

    def _heard_end(self) -> None:
        self.do(self.sender.closed(self.place.world.now_s()))

    def act(self, action: Action) -> None:
        """As Job._act."""
        send, key = self.place.dispatcher.send, self.submit.key
        match action:
            case Send(message):
                self._end.send(encode_message(message))
            case SendFrame():
                self._end.send(self._frame(action))
            case Read(token_start, token_count):
                send(link.ReadKv(key, token_start, token_count))
            case EngineBound():
                send(link.PeerBound(key))
            case EngineNotYet():
                send(link.PeerNotYet(key))
            case Release():
                send(link.Release(key))
            case Abort():
                if not self._is_gone:
                    send(link.CancelSequence(key))
            case Close():
                self.is_closed = True
                self._end.finish()
                self._end.is_deaf = True
                self._over(self)
            case _:
                raise AssertionError(action)

    def _frame(self, action: SendFrame) -> bytes:
        sections = self._planes.pop((action.token_start, action.token_count))
        label = FrameLabel(self.sender.label, action.sequence, NUMERICS, action.token_start, action.token_count)
        return encode_frame(label, sections, is_last=action.is_last)


class SimPull(Machinery):
    """One hand-over from one prefill worker: the glue of decode_worker/pull.py, with the surface that a Run sees."""

    prefill_cached_tokens = 0
    refetched_blocks = 0

    def __init__(self, receiver: Receiver, end: End, key: SequenceKey, owner: PullOwner, place: Place) -> None:
        super().__init__(place, receiver, end, f"{key.request_id}#{key.choice} receiver")
        self.receiver = receiver
        self._key = key
        self._owner = owner
        self._frame: Frame | None = None
        end.on_message, end.on_end = self._hear, self._heard_end
        # As a task of its own would: whoever made us knows us by then.
        place.world.after(0.0, place.process, lambda: self.do(receiver.opened(place.world.now_s())))

    @cached_property
    def timeline(self) -> Timeline:
        """Nothing is measured here."""
        return Timeline()

    def bound(self) -> None:
        """The engine has bound blocks for the whole prompt."""
        self.do(self.receiver.bound(self.place.world.now_s()))

    def not_yet(self) -> None:
        """The engine will bind later."""
        self.do(self.receiver.not_yet(self.place.world.now_s()))

    def written(self, token_start: int, token_count: int) -> None:
        """The engine stored a frame."""
        self.do(self.receiver.written(token_start, token_count, self.place.world.now_s()))

    def cancel(self, reason: str) -> None:
        """Nobody wants it any more."""
        self.do(self.receiver.cancel(reason, self.place.world.now_s()))

    def _hear(self, envelope: bytes) -> None:
        now_s = self.place.world.now_s()
        try:
            received = decode_envelope(envelope)
            if isinstance(received, handover_pb2.HandoverUp):
                raise WireError("a message of the other direction")
        except WireError as error:
            self.do(self.receiver.garbled(now_s, str(error)))
            return
        if isinstance(received, handover_pb2.HandoverDown):
            self.do(self.receiver.on_message(received, now_s))
            return
        header = received.header
        is_intact = digests_hold(received.sections, header.token_start, header.token_count)
        if not is_intact:
            self.place.world.note(self.place.process, f"{self.name}: frame #{header.sequence} is damaged")
        self._frame = received
        self.do(self.receiver.on_frame(FrameArrived.of(header, is_intact=is_intact, num_bytes=len(envelope)), now_s))
        self._frame = None

    def _heard_end(self) -> None:
        self.do(self.receiver.closed(self.place.world.now_s()))

    def act(self, action: Action) -> None:
        """As Pull._act."""
        match action:
            case Send(message):
                self._end.send(encode_message(message))
            case Write(_, token_start, token_count):
                assert self._frame is not None, "a Write answers a frame"
                self.place.dispatcher.send(link.WriteKv(self._key, token_start, token_count, self._frame.sections))
            case AskBind():
                self._owner.bind_wanted()
            case GotFirstToken():
                self._owner.first_token_came(action)
            case Complete():
                self._owner.pull_completed()
            case Lost(reason, _, _, detail):
                if self.place.is_bearable and reason not in (Ending.FAILED, Ending.CORRUPTED):
                    raise Violation("L1", f"{self.name}: lost without need: {reason.value} {detail}")
                self._owner.pull_lost(action)
            case Close(now):
                self.is_closed = self.receiver.next_deadline_s is None
                if now:
                    self._end.abort()
                else:
                    self._end.finish()
            case _:
                raise AssertionError(action)


def refused(error: TwostrokeError) -> str:
    """For the transcript."""
    return f"refuses a hand-over: {error.message}"
