"""The two sides of a hand-over, each one production machine with its surroundings as events and actions."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, cast

from ...core.lease import HANDOVER_LEASE
from ...core.request import Role, SequenceKey
from ...decode_worker.order import Order, Peer
from ...decode_worker.outbox import Outbox
from ...decode_worker.pull import KvPullTools
from ...decode_worker.task import DecodeTask
from ...decode_worker.tools import DecodeTaskTools
from ...engine.link import messages as link
from ...kv.handover.carrier import Check, Hear, StreamHost
from ...kv.handover.damage import verify_frame
from ...kv.handover.frames import Frame, WireError, decode_envelope
from ...kv.handover.machine import Action, Label, NumberedStream
from ...kv.handover.receiver import Receiver, ReceiverState
from ...kv.handover.sender import SenderState
from ...prefill_worker.service import PrefillService
from ...prefill_worker.task import PrefillTask, PrefillTaskTools
from ...protos import handover_pb2
from ..workers.cells import DIGEST_KEY, SPEC
from ..workers.dispatcher import SimDispatcher
from ..workers.engine import NUMERICS
from .automaton import Event
from .canonical import canonical
from .given import CELLS, EPOCH, FACTS, PARAMS, PROMPTS, SCOPE, TIMEOUT_S, TOKENS, check_content, sections_of
from .silent import SilentChoice


class StreamFacts(NamedTuple):
    """Facts about a hand-over machine."""

    is_over: bool
    sent: int  # sequence number of its last message
    received: int
    is_waiting: bool  # the peer's silence would end it
    name: str  # of its state


class _Clock:
    def __init__(self) -> None:
        self.at_s = 0.0

    def now_s(self) -> float:
        return self.at_s


class _Timer:
    def __init__(self, act: Callable[[], None]) -> None:
        self.act: Callable[[], None] | None = act

    def cancel(self) -> None:
        self.act = None


class _Stream:
    """One end of a hand-over stream. Implements StreamHost of kv/handover/carrier.py."""

    def __init__(self, owner: _Face, number: int) -> None:
        self.hear: Hear = lambda _: None
        self.timer: _Timer | None = None
        self._owner, self._number = owner, number

    def now_s(self) -> float:
        return self._owner.clock.at_s

    def after(self, delay_s: float, act: Callable[[], None]) -> _Timer:
        timer = _Timer(act)
        if delay_s == 0.0:
            self._owner.soon.append(timer)
        else:
            self.timer = timer
        return timer

    def listen(self, hear: Hear) -> None:
        self.hear = hear

    def send(self, envelope: bytes) -> None:
        self._owner.actions.append(("send", self._number, envelope))

    def close(self, *, now: bool) -> None:
        self._owner.actions.append(("close", self._number, now))

    def check(self, check: Check, answered: Callable[[bool], None]) -> None:
        answered(check.holds())

    def trace(self, action: Action) -> None:
        pass


class _Face:
    """Common part of both sides: clock, engine client, timers. Implements FaceLink."""

    def __init__(self) -> None:
        self.actions: list[Any] = []
        self.clock = _Clock()
        self.soon: deque[_Timer] = deque()
        self.client = SimDispatcher(cast(Any, self))

    def send(self, command: link.Command) -> None:
        self.actions.append(command)

    def _run_soon(self) -> None:
        while self.soon:
            act = self.soon.popleft().act
            if act is not None:
                act()

    def _fire(self, stream: _Stream, at_s: float) -> None:
        self.clock.at_s = at_s
        timer = stream.timer
        if timer is not None and timer.act is not None:
            timer.act()

    def _time(self, kind: str, stream: _Stream, numbered: NumberedStream) -> None:
        if kind == "silent":
            self._fire(stream, numbered.heard_s + HANDOVER_LEASE.silence_s)
        elif kind == "deadline":
            self._fire(stream, numbered.deadline_s)
        else:
            self._fire(stream, numbered.said_s + HANDOVER_LEASE.beat_s)


class DecodeSide(_Face):
    """The task of one order on a decode worker: production's task, pull, receiver and carrier."""

    def __init__(self, num_peers: int, num_resumed: int) -> None:
        super().__init__()
        peers = tuple(Peer(str(peer), 1, f"{peer}:1") for peer in range(num_peers))
        self._outbox, self.is_ended = Outbox(), False
        self.streams: list[_Stream] = []
        self._receiver: Receiver | None = None  # of the last event
        prompt, emitted = PROMPTS[num_resumed], TOKENS[:num_resumed]
        order = Order(SequenceKey("r", 0), EPOCH, prompt, PARAMS, SCOPE, peers, TIMEOUT_S, num_resumed, 0, 1)
        timing, clock = HANDOVER_LEASE, self.clock
        pull = KvPullTools(self.client, cast(Any, None), DIGEST_KEY, SPEC, timing, clock, Counter())
        tools = _Connecting(FACTS, pull, cast(Any, self))
        self.task = DecodeTask(order, SilentChoice(PARAMS, emitted), self._outbox, tools, self._task_ended)

    def _task_ended(self, _: DecodeTask) -> None:
        self.is_ended = True
        self.actions.append(("ended",))

    def connect(self, address: str) -> StreamHost:
        """Open a stream to the peer of this number."""
        self.actions.append(("connect", int(address.partition(":")[0])))
        self.streams.append(_Stream(self, len(self.streams)))
        return self.streams[-1]

    def send(self, command: link.Command) -> None:
        """Implements `FaceLink.send`. Checks K4 of what is stored."""
        if isinstance(command, link.WriteKv):
            start, count = command.token_start, command.token_count
            check_content(start, count, command.sections)
            self.actions.append(("write", start, count))
        else:
            self.actions.append(command)

    def feed(self, event: Event) -> None:
        """Handle an event of the session, the engine, a stream, or time."""
        self.clock.at_s = 0.0
        pull = self.task._pull
        self._receiver = None if pull is None else pull.receiver
        match event:
            case ("start",):
                self.task.start()
            case ("engine", happened):
                self.client._route(happened)
            case ("hear", number, envelope):
                self.streams[number].hear(envelope)
            case ("cancel", reason, verdict):
                self.task.cancel(reason, verdict)
            case (kind,):
                pull = self.task._pull
                if pull is not None:
                    self._time(kind, self.streams[-1], pull.receiver._stream)
        self._run_soon()
        while (output := self._outbox.take()) is not None:
            self.actions.append(("says", output.SerializeToString()))
        if self._receiver is None and self.task._pull is not None:
            self._receiver = self.task._pull.receiver

    def place(self) -> str:
        """State of the receiver that had the last event."""
        pull = self.task._pull
        receiver = self._receiver or (None if pull is None else pull.receiver)
        return "" if receiver is None else receiver.state.value

    def label(self, event: Event) -> str:
        """Name of an event for the receiver of the present pull."""
        pull = self.task._pull
        self._receiver = None if pull is None else pull.receiver
        match event:
            case ("engine", link.Promised()):
                return "open the stream"
            case _ if pull is None:
                return ""
            case ("engine", happened):
                return _ENGINE_LABELS.get(type(happened), "")
            case ("hear", number, envelope):
                return _label_of(envelope, pull.receiver._stream) if number == len(self.streams) - 1 else ""
            case ("cancel", _, _):
                return "cancel"
            case (kind,):
                return _TIME_LABELS.get(kind, "")
        return ""

    def state(self) -> Hashable:
        """Canonical state; every ended task is the same."""
        return "ended" if self.is_ended else (canonical(self.task), len(self.streams), self.client.num_owned)

    def facts(self) -> StreamFacts:
        """Facts about the present pull."""
        pull = self.task._pull
        if pull is None or pull.receiver.is_over:
            return StreamFacts(True, 0, 0, False, "ended" if self.is_ended else "none")
        state, stream = pull.receiver.state, pull.receiver._stream
        waits = state not in (ReceiverState.NEW, ReceiverState.STORING)
        return StreamFacts(False, stream._sent, stream._received, waits, state.value)


class _Connecting(DecodeTaskTools):
    """The production tools of a task, with streams of the search."""

    def connect(self, key: SequenceKey, address: str) -> StreamHost:
        """Implements `DecodeTaskTools.connect`."""
        return cast(Any, self.channels).connect(address)  # type: ignore[no-any-return]


class PrefillSide(_Face):
    """One hand-over stream of a prefill worker: production's service, task, sender and carrier."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = _Stream(self, 0)
        self.job: PrefillTask | None = None
        self._is_closed = False
        self._has_left = False
        tools = PrefillTaskTools(
            self.client, cast(Any, None), DIGEST_KEY, NUMERICS, HANDOVER_LEASE, self.clock, Counter()
        )
        self._service = PrefillService(FACTS, tools, lambda: Role.PREFILL, 8)

    def feed(self, event: Event) -> None:
        """Handle an event of the stream, the engine, or time."""
        self.clock.at_s = 0.0
        num_actions = len(self.actions)
        match event:
            case ("open", envelope):
                self._open(envelope)
            case ("engine", happened):
                self.client._route(happened)
            case ("read", start, count, is_held):
                sections = sections_of(start, count, CELLS) if is_held else None
                assert self.job is not None
                self.client._route(link.KvRead(self.job.key, start, count, sections))
            case ("hear", envelope):
                self.stream.hear(envelope)
            case (kind,):
                if self.job is not None:
                    self._time(kind, self.stream, self.job.sender._stream)
        self._run_soon()
        self._is_closed |= any(action[0] == "close" for action in self.actions[num_actions:] if type(action) is tuple)
        if self._is_closed and self.job is not None and not self._has_left:
            self._has_left = True
            self._service.leave(self.job)  # as a stream's handler returns when its machine closed the stream

    def place(self) -> str:
        """State of the sender."""
        return "" if self.job is None else self.job.sender.state.value

    def label(self, event: Event) -> str:
        """Name of an event for the sender."""
        match event:
            case ("open", envelope):
                return _label_of(envelope, None)
            case _ if self.job is None:
                return ""
            case ("engine", happened):
                return _ENGINE_LABELS.get(type(happened), "")
            case ("read", _, _, _):
                return "planes are read"
            case ("hear", envelope):
                return _label_of(envelope, self.job.sender._stream)
            case (kind,):
                return _TIME_LABELS.get(kind, "")
        return ""

    def _open(self, envelope: bytes) -> None:
        message = decode_envelope(envelope)
        assert isinstance(message, handover_pb2.HandoverUp)
        self.job = self._service.open(message, self.stream)

    def state(self) -> Hashable:
        """Canonical state."""
        if self._is_closed:
            return "closed", self.client.num_owned
        return None if self.job is None else (canonical(self.job), self.client.num_owned)

    def facts(self) -> StreamFacts:
        """Facts about the sender."""
        if self.job is None or self.job.sender.is_over:
            return StreamFacts(True, 0, 0, False, "none" if self.job is None else self.job.sender.state.value)
        stream, state = self.job.sender._stream, self.job.sender.state
        return StreamFacts(False, stream._sent, stream._received, state not in _ENDED_SENDERS, state.value)


_ENDED_SENDERS = (SenderState.RELEASED, SenderState.ABORTED)

# ------------------------------------------------------------------ names of events

_ENGINE_LABELS: dict[type, str] = {
    link.Bound: "blocks are bound",
    link.NotYet: "no room now",
    link.KvWritten: "a frame is stored",
    link.Ended: "the sequence ends",
    link.Offered: "next to run",
    link.StepTokens: "the first token is sampled",
    link.Progress: "tokens are computed",
}
_TIME_LABELS = {"silent": "silence", "deadline": "deadline", "beat": "a beat is due"}


def _label_of(envelope: bytes | None, stream: NumberedStream | None) -> str:
    """Name of an envelope that arrives; `stream`: None before the first one was taken."""
    if envelope is None:
        return "end of stream"
    try:
        message = decode_envelope(envelope)
    except WireError:
        return "garbled"
    if isinstance(message, Frame):
        label, sequence, name = Label.of(message.header), message.header.sequence, "Frame"
        if not verify_frame(message, DIGEST_KEY, SPEC):
            name = "Frame that does not match its digests"
    else:
        label, sequence, body = Label.of(message), message.sequence, message.WhichOneof("body")
        name = str(body).title().replace("_", "")
    received = 0 if stream is None else stream._received
    if label.epoch < EPOCH:
        return "of an older epoch"
    if sequence <= received:
        return "duplicate or late"
    return name if sequence == received + 1 else "gap: lost or overtaken"
