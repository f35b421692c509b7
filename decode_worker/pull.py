"""One hand-over from one prefill worker: carries out the receiver machine's actions. Knows no text, no router."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from ..core.clock import Clock
from ..core.lease import Lease
from ..core.life import Life, forget
from ..core.request import SequenceKey
from ..core.timeline import Instant, Timeline
from ..engine.link.client import EngineClient
from ..engine.link.messages import WriteKv
from ..kv.handover.carrier import Carrier, Check, CheckLine, StreamHost
from ..kv.handover.damage import verify_frame
from ..kv.handover.exported import CountersExport
from ..kv.handover.frames import Frame, WireError, decode_envelope, encode_message, transfer_of
from ..kv.handover.machine import Action, AskBind, Close, Complete, GotFirstToken, HandoverEnd, Lost, Send, Write
from ..kv.handover.plane_channel import GLOO, SHM, LentRing, PairedPeers, ReceivingEnd, RingPool
from ..kv.handover.receiver import FrameArrived, Receiver
from ..kv.handover.sources import NOTHING_FETCHED, FetchedBlocks
from ..kv.messages import adopt_instants
from ..kv.spec import HASH_BLOCK_TOKENS, KvSpec
from ..protos import handover_pb2
from .speed import Arrival, HandoverSpeed, rate_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Offer:
    """What an order offers for the planes of its frames, besides the stream. The pull gives it back."""

    ring: LentRing | None = None
    pair: ReceivingEnd | None = None
    pair_key: int = 0
    why_nothing: str = ""  # empty if nothing is wanted


NOTHING = Offer()


@dataclass(slots=True)
class _Arrival:
    """An envelope (None: the stream's end) and, of a frame by a paired channel, its header and planes."""

    envelope: bytes | None
    header: handover_pb2.FrameHeader | None = None
    planes: memoryview | None = None
    is_whole: bool = False  # nothing more comes for it

    @property
    def is_lost(self) -> bool:
        """True if a transfer should have brought its planes and did not."""
        return self.is_whole and self.header is not None and self.planes is None


@dataclass(frozen=True, slots=True)
class KvPullTools:
    """Dependencies shared by all hand-overs of a worker."""

    dispatcher: EngineClient
    executor: Executor  # verifies digests
    digest_key: int
    kv_spec: KvSpec
    timing: Lease
    clock: Clock
    counters: Counter[str]
    speed: HandoverSpeed = field(default_factory=HandoverSpeed)
    ended: Callable[[Life], None] = forget  # called for every run that is over
    rings: RingPool | None = None  # shared memory for peers on this host; None: all planes come over the stream
    pairs: PairedPeers | None = None  # paired channels; None: none are offered


class PullOwner(Protocol):
    """Owner of a pull: the run of one choice. Called on the loop; must not block."""

    def bind_wanted(self) -> None:
        """Ask the engine to bind blocks, and answer with `KvPull.bound` or `KvPull.not_yet`."""
        ...

    def first_token_came(self, first: GotFirstToken) -> None:
        """Forward the first token."""
        ...

    def pull_completed(self) -> None:
        """All KV is stored, and the first token is known."""
        ...

    def pull_lost(self, lost: Lost) -> None:
        """The hand-over failed; no more KV will come."""
        ...


class KvPull:
    """One hand-over, from the order to the machine's end. The host reads the stream; all calls come on its loop."""

    def __init__(
        self,
        receiver: Receiver,
        host: StreamHost,
        engine_key: SequenceKey,
        owner: PullOwner,
        tools: KvPullTools,
        *,
        offer: Offer = NOTHING,
    ) -> None:
        """`offer`: what the receiver's order offers for the planes."""
        self.receiver = receiver
        self.transport_reason = offer.why_nothing  # why planes take the stream
        self.bytes_per_s = 0.0  # of the frames that came after the prompt was computed
        self.timeline = Timeline()  # ours and the peer's instants of this hand-over
        self.prefill_cached_tokens = 0
        self.prefill_fetched = NOTHING_FETCHED  # part of those that the prefill worker had cached
        self.refetched_blocks = 0  # hash blocks
        self._host = host
        self._engine_key = engine_key
        self._owner = owner
        self._tools = tools
        self._ring = offer.ring
        self._pair, self._pair_key = offer.pair, offer.pair_key
        self._arrivals: list[Arrival] = []
        self._frame: Frame | None = None  # the one that the machine is handling
        self._opened_at_s = host.now_s()
        export = CountersExport(receiver.counters, "decode", tools.counters)
        self._carrier = Carrier(receiver, host, self._act, export.update)
        self._arrived: deque[_Arrival] = deque()  # the first one waits for its planes; bounded by the frames' slots
        self._envelopes: CheckLine[_Arrival] = CheckLine(host, self._check_of, self._take)
        host.listen(self._arrive)
        host.after(0.0, self._open)  # later, because the owner does not have its reference to this object yet

    # ------------------------------------------------------------------ from the run

    def bound(self) -> None:
        """The engine has bound blocks for the whole prompt."""
        self._carrier.do(self.receiver.bound(self._host.now_s()))

    def not_yet(self) -> None:
        """The engine will bind later."""
        self._carrier.do(self.receiver.not_yet(self._host.now_s()))

    def written(self, token_start: int, token_count: int) -> None:
        """The engine stored a frame."""
        self._carrier.do(self.receiver.written(token_start, token_count, self._host.now_s()))

    def cancel(self, reason: str) -> None:
        """End the hand-over; its result is no longer wanted."""
        self._carrier.do(self.receiver.cancel(reason, self._host.now_s()))
        self._give_back()  # also if the stream was closed before, and no action follows

    # ------------------------------------------------------------------ the stream

    def _open(self) -> None:
        self._carrier.do(self.receiver.opened(self._host.now_s()))

    def _arrive(self, envelope: bytes | None) -> None:
        """Handle an envelope after all earlier ones, and after the planes that a transfer brings."""
        pair = self._pair if self.receiver.transport == GLOO and not self.receiver.is_over else None
        header = None if envelope is None or pair is None else transfer_of(envelope)
        arrival = _Arrival(envelope, header, is_whole=header is None)
        self._arrived.append(arrival)
        if header is not None and pair is not None:
            pair.claim(self._pair_key, header.transfer, partial(self._took, arrival))
        self._hand_on()

    def _took(self, arrival: _Arrival, planes: memoryview | None) -> None:
        arrival.planes, arrival.is_whole = planes, True
        self._hand_on()

    def _hand_on(self) -> None:
        while self._arrived and self._arrived[0].is_whole:
            self._envelopes.put(self._arrived.popleft())

    def _check_of(self, arrival: _Arrival) -> Check | None:
        """The check of a frame's digests; None: it is no frame, its planes are lost, or nothing more is wanted."""
        envelope = arrival.envelope
        if envelope is None or self.receiver.is_over or arrival.is_lost:
            return None
        try:
            frame = self._decoded(arrival)
        except WireError:
            return None  # `_take` comes to it in its turn
        if not isinstance(frame, Frame):
            return None
        tools = self._tools
        is_apart = frame.slot is not None or arrival.planes is not None
        size_bytes = len(envelope) + (len(frame.planes) if is_apart else 0)
        holds = partial(verify_frame, frame, tools.digest_key, tools.kv_spec, self.receiver.windows_from)
        return Check(holds, size_bytes, partial(self._judge, frame, size_bytes))

    def _decoded(self, arrival: _Arrival) -> handover_pb2.HandoverDown | Frame:
        assert arrival.envelope is not None, "the end is no envelope"
        ring = self._ring if self.receiver.transport == SHM else None
        memory = None if ring is None else ring.memory
        received = decode_envelope(arrival.envelope, memory=memory, planes=arrival.planes)
        if isinstance(received, handover_pb2.HandoverUp):
            raise WireError("a message of the other direction")
        return received

    def _take(self, arrival: _Arrival) -> None:
        """Handle an envelope that is no frame, or one whose planes are lost, after all earlier ones."""
        now_s = self._host.now_s()
        if arrival.envelope is None or self.receiver.is_over:
            self._carrier.do(self.receiver.closed(now_s))
            return
        if arrival.is_lost:
            # The paired channel has failed: the planes are asked for once more, and take the stream.
            assert arrival.header is not None
            self._tools.counters["handover_transfers_lost"] += 1
            size_bytes = len(arrival.envelope)
            lost = FrameArrived.of(arrival.header, is_intact=False, num_bytes=size_bytes)
            self._carrier.do(self.receiver.on_frame(lost, now_s))
            return
        try:
            received = self._decoded(arrival)
        except WireError as error:
            self._tools.counters["handover_garbled"] += 1
            self._carrier.do(self.receiver.garbled(now_s, str(error)))
            return
        assert isinstance(received, handover_pb2.HandoverDown), "frames are checked"
        self._note(received)
        self._carrier.do(self.receiver.on_message(received, now_s))
        if received.HasField("started") and self.receiver.transport != SHM:
            self._give_back_ring(is_orderly=True)  # the peer has not mapped it

    def _judge(self, frame: Frame, size_bytes: int, is_intact: bool) -> None:
        """Pass a frame to the machine after its digests were checked."""
        now_s = self._host.now_s()
        if self.receiver.is_over:  # by a frame before it
            self._carrier.do(self.receiver.closed(now_s))
            return
        if is_intact:
            self._tools.counters["handover_decode_transfers"] += bool(frame.header.transfer)
            self.timeline.mark(Instant.FIRST_FRAME, now_s)
            self._arrivals.append(Arrival(now_s, size_bytes))
        else:
            self._tools.counters["kv_corrupted_frames"] += 1
            log.warning("%s: frame %d did not match its digests", self._engine_key, frame.header.sequence)
        self._frame = frame
        arrived = FrameArrived.of(frame.header, is_intact=is_intact, num_bytes=size_bytes)
        self._carrier.do(self.receiver.on_frame(arrived, now_s))
        self._frame = None

    def _note(self, message: handover_pb2.HandoverDown) -> None:
        """Keep facts that `explain` shows and the machine does not need."""
        body = message.WhichOneof("body")
        if body == "started":
            started = message.started
            self.prefill_cached_tokens = started.cached_tokens
            self.prefill_fetched = FetchedBlocks(started.fetched_tokens, started.fetched_from, started.fetch_end)
            self.transport_reason = self.transport_reason or message.started.transport_reason
        elif body == "first_token":
            adopt_instants(self.timeline, message.first_token.timeline, self._opened_at_s)
        elif body == "done":
            adopt_instants(self.timeline, message.done.timeline, self._opened_at_s)

    # ------------------------------------------------------------------ the machine

    def _act(self, action: Action) -> None:
        match action:
            case Send(message):
                if isinstance(message, handover_pb2.HandoverUp) and message.HasField("refetch"):
                    self.refetched_blocks += -(-message.refetch.token_count // HASH_BLOCK_TOKENS)
                self._host.send(encode_message(message))
            case Write(_, token_start, token_count):
                assert self._frame is not None, "a Write answers a frame"
                sections = self._frame.sections
                self._tools.dispatcher.send(WriteKv(self._engine_key, token_start, token_count, sections))
            case AskBind():
                self._owner.bind_wanted()
            case GotFirstToken():
                self._owner.first_token_came(action)
            case Complete():
                self.timeline.mark(Instant.LAST_FRAME, self._host.now_s())
                prefilled_s = self.timeline.at_s(Instant.PREFILLED)
                if prefilled_s is not None:
                    self._tools.speed.observe(self._arrivals, prefilled_s)
                    self.bytes_per_s = rate_of(self._arrivals, prefilled_s)
                self._give_back(is_orderly=self.receiver.is_orderly)
                self._owner.pull_completed()
            case Lost(reason):
                self._tools.counters[f"handover_lost_{reason.value}"] += 1
                is_wrong = reason in (HandoverEnd.CORRUPTED, HandoverEnd.PROTOCOL)
                self._give_back(has_failed=is_wrong and self.receiver.transport == SHM)
                self._owner.pull_lost(action)
            case Close(now):
                self._host.close(now=now)
            case _:
                raise AssertionError(action)

    def _give_back(self, *, is_orderly: bool = False, has_failed: bool = False) -> None:
        """Give back all that the order offered; only the first call of a hand-over has an effect."""
        if self._pair is not None:
            self._pair.close_key(self._pair_key)
        self._give_back_ring(is_orderly=is_orderly, has_failed=has_failed)

    def _give_back_ring(self, *, is_orderly: bool, has_failed: bool = False) -> None:
        if self._ring is not None:
            self._ring.give_back(is_orderly=is_orderly, has_failed=has_failed)
            self._ring = None


REFUSALS = (
    HandoverEnd.FAILED,
    HandoverEnd.CLOSED,
    HandoverEnd.SILENT,
    HandoverEnd.PROTOCOL,
    HandoverEnd.CORRUPTED,
    HandoverEnd.TRANSPORT,
)
"""Ends of a hand-over after which another peer or this worker may prefill. The other ends also end the request."""
