"""One prompt computed for a decode worker: carries out the sender machine's actions. Knows no router, no text."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial

from ..core.clock import Clock
from ..core.errors import InternalError, KvCorrupted, TwostrokeError, from_code
from ..core.lease import Lease
from ..core.life import Life, forget
from ..core.request import FinishReason, SequenceKey
from ..core.timeline import Instant, Timeline
from ..engine.adapters import AdapterTable
from ..engine.link import messages as link
from ..engine.link.client import EngineClient, SequenceEvent
from ..kv.handover.carrier import Carrier, Check, CheckLine, StreamHost
from ..kv.handover.damage import verify_sections
from ..kv.handover.exported import CountersExport
from ..kv.handover.frames import FrameApart, FrameLabel, WireError, decode_envelope, encode_frame, encode_message
from ..kv.handover.machine import Abort, Action, Close, EngineBound, EngineNotYet, Read, ReleaseBlocks, Send, SendFrame
from ..kv.handover.plane_channel import OpenMemory, PlaneMemory, PlaneSlot, SendingEnd
from ..kv.handover.sender import Sender
from ..kv.handover.sources import FetchedBlocks
from ..kv.messages import error_to_wire, instants_to_wire, logprobs_to_wire
from ..kv.section import PlaneBuffer, SectionData
from ..protos import handover_pb2
from .returns import BeginReturn, Lacked, UnderWay, no_returns

log = logging.getLogger(__name__)

MAX_READS = 2  # of the same planes: they are read once more if they do not match their seals


def _no_pair(number: int) -> SendingEnd | None:
    del number
    return None


@dataclass(frozen=True, slots=True)
class PrefillTaskTools:
    """Dependencies shared by all jobs of a worker."""

    dispatcher: EngineClient
    executor: Executor  # verifies digests
    digest_key: int
    numerics_class: bytes
    timing: Lease
    clock: Clock
    counters: Counter[str]
    ended: Callable[[Life], None] = forget  # called for every job that is over
    open_memory: OpenMemory | None = None  # maps a peer's shared memory; None: this worker cannot
    pair: Callable[[int], SendingEnd | None] = _no_pair  # the open paired channel of a number
    begin_return: BeginReturn = no_returns  # fetches blocks that other workers hold
    adapters: AdapterTable = field(default_factory=AdapterTable)  # of this worker


class PrefillTask:
    """One hand-over, from an accepted Open until its stream and its sequence have ended. The host reads the stream."""

    def __init__(
        self,
        sender: Sender,
        submit: link.Submit,
        host: StreamHost,
        tools: PrefillTaskTools,
        memory: PlaneMemory | None = None,
        *,
        pair: SendingEnd | None = None,
        lacked: Lacked | None = None,
    ) -> None:
        """`memory`: the peer's ring that the sender shares; closed at the end of the hand-over. `pair`: its channel.

        `lacked`: blocks of the prompt that are fetched from other workers before the sequence begins; None: none are.
        """
        self.sender = sender
        self.memory = memory
        self._pair = pair
        self._slots: dict[tuple[int, int], int] = {}  # of the ring, by the range that is read into it
        self._submit = submit
        self._host = host
        self._tools = tools
        self._timeline = Timeline()
        self._seen_at_s = host.now_s()
        self._planes: dict[tuple[int, int], tuple[SectionData, ...]] = {}  # verified, about to be sent
        self._mismatches: Counter[tuple[int, int]] = Counter()  # reads of each range that did not match its seals
        self._lacked = lacked
        self._returning: UnderWay | None = None
        self._is_live = False  # the engine has the sequence
        export = CountersExport(sender.counters, "prefill", tools.counters)
        self._carrier = Carrier(sender, host, self._act, export.update)
        # In order, so that leading tokens are sent first: decode can use only a prefix without gaps.
        self._read_planes: CheckLine[link.KvRead] = CheckLine(host, self._check_of, lambda _: None)
        host.listen(self._take)

    @property
    def key(self) -> SequenceKey:
        """Name of the sequence inside this worker."""
        return self._submit.key

    @property
    def adapter_slot(self) -> int:
        """Slot of its adapter, held for this job by its owner; 0: none."""
        return self._submit.adapter_slot

    def start(self) -> None:
        """Submit the sequence to the engine, after the blocks that other workers give."""
        if self._lacked is not None:
            self._returning = self._tools.begin_return(self._lacked, self._returned)
        if self._returning is None:
            self._begin()
        self._carrier.rearm()

    def _begin(self) -> None:
        self._is_live = True
        self._tools.dispatcher.own(self.key, self.handle)
        self._tools.dispatcher.send(self._submit)

    def _returned(self, came: FetchedBlocks) -> None:
        self._returning = None
        if not self.sender.is_over:
            self.sender.fetched(came)
            self._begin()

    def leave(self) -> None:
        """The stream has ended: give back all blocks that are not given back yet."""
        self._close_memory()
        self._carrier.do(self.sender.closed(self._host.now_s()))

    def _take(self, envelope: bytes | None) -> None:
        now_s = self._host.now_s()
        if envelope is None:
            self._carrier.do(self.sender.closed(now_s))
            return
        try:
            message = decode_envelope(envelope)
            if not isinstance(message, handover_pb2.HandoverUp):
                raise WireError("a message of the other direction")
        except WireError as error:
            self._tools.counters["handover_garbled"] += 1
            self._carrier.do(self.sender.garbled(now_s, str(error)))
        else:
            if message.HasField("refetch"):
                self._pair = None  # what was lost or damaged once takes the stream, also if we do not know why yet
            self._carrier.do(self.sender.on_message(message, now_s))

    # ------------------------------------------------------------------ the engine's events

    def handle(self, event: SequenceEvent) -> None:
        """Handle one event of this job's sequence."""
        now_s = self._host.now_s()
        match event:
            case link.Offered(_, cached_tokens):
                self._timeline.mark(Instant.OFFERED, now_s)
                self._carrier.do(self.sender.started(cached_tokens, now_s))
            case link.Progress(_, num_computed, began, began_s):
                if began:
                    self._mark_began(began_s, now_s)
                self._carrier.do(self.sender.progress(num_computed, now_s))
            case link.TokenNews():
                self._mark_began(event.began_s, now_s)  # before the news of its progress, after a single chunk
                self._timeline.mark(Instant.PREFILLED, now_s)
                self._carrier.do(self.sender.first_token(self._first_token(event), now_s))
            case link.KvRead():
                self._read_planes.put(event)
            case link.Ended():
                self._is_live = False
                self._tools.ended(self._life(event, now_s))
                self._carrier.do(self.sender.failed(error_to_wire(_why(event)), now_s))
            case _:
                log.debug("%s: %s is nothing to a job", self.key, type(event).__name__)

    def _mark_began(self, began_s: float | None, now_s: float) -> None:
        self._timeline.mark(Instant.PREFILL_BEGAN, now_s if began_s is None else began_s)

    def _life(self, event: link.Ended, now_s: float) -> Life:
        """Metrics of this job. A job is a sequence that wants one token."""
        prefilled_s = self._timeline.at_s(Instant.PREFILLED)
        is_done = event.reason is FinishReason.STOP  # its blocks were released
        return Life(
            prompt_tokens=len(self._submit.prompt_ids),
            max_tokens=self._submit.params.max_tokens,
            generated=(0 if prefilled_s is None else 1,),
            reasons=(FinishReason.LENGTH if is_done else event.reason,),
            phases=self._timeline.phases(self._seen_at_s),
            ttft_s=None if prefilled_s is None else prefilled_s - self._seen_at_s,
            e2e_s=now_s - self._seen_at_s,
            cached_tokens=event.cached_tokens,
            computed_tokens=len(self._submit.prompt_ids) - event.cached_tokens,
        )

    def _first_token(self, news: link.TokenNews) -> handover_pb2.FirstToken:
        first = handover_pb2.FirstToken(
            token_id=news.token_ids[0],
            timeline=instants_to_wire(self._timeline, self._seen_at_s),
            prompt_logprobs=logprobs_to_wire(news.prompt_logprobs),
        )
        for logprobs in logprobs_to_wire(news.logprobs):
            first.logprobs.CopyFrom(logprobs)
        return first

    def _check_of(self, read: link.KvRead) -> Check | None:
        """Check that planes match the seals made when they were written; only then are they sent."""
        sections = read.sections
        if sections is None or self.sender.is_over:
            return None
        place = (read.token_start, read.token_count)
        size_bytes = sum(section.num_bytes for section in sections if section.found is None)
        holds = partial(verify_sections, sections, *place, self._tools.digest_key)
        return Check(holds, size_bytes, partial(self._judge, place, sections))

    def _judge(self, place: tuple[int, int], sections: tuple[SectionData, ...], matches: bool) -> None:
        """Planes were checked: send them, or read them once more, or fail the hand-over."""
        tools = self._tools
        if self.sender.is_over:
            return
        if matches:
            self._planes[place] = sections
            size_bytes = sum(section.num_bytes for section in sections)
            self._carrier.do(self.sender.frame_read(*place, size_bytes, self._host.now_s()))
            return
        self._mismatches[place] += 1
        tools.counters["kv_corrupted_reads"] += 1
        log.warning("%s: tokens %d+%d do not match their seals", self.key, *place)
        if self._mismatches[place] < MAX_READS:
            self._read(*place)
        else:
            error = KvCorrupted(f"tokens {place[0]}+{place[1]} do not match their seals on the prefill worker")
            self._carrier.do(self.sender.failed(error_to_wire(error), self._host.now_s()))

    # ------------------------------------------------------------------ the machine

    def _act(self, action: Action) -> None:
        send = self._tools.dispatcher.send
        match action:
            case Send(message):
                if message.WhichOneof("body") == "started":
                    self._timeline.mark(Instant.STARTED, self._host.now_s())
                self._host.send(encode_message(message))
            case SendFrame():
                self._host.send(self._frame(action))
            case Read(token_start, token_count, slot):
                if slot is not None:
                    self._slots[token_start, token_count] = slot
                self._read(token_start, token_count)
            case EngineBound():
                send(link.PeerBound(self.key))
            case EngineNotYet():
                send(link.PeerNotYet(self.key))
            case ReleaseBlocks():
                self._close_memory()
                send(link.Release(self.key))
            case Abort(reason):
                self._close_memory()
                self._tools.counters[f"handover_aborted_{reason.value}"] += 1
                if self._returning is not None:
                    self._returning.cancel()
                if self._is_live:
                    send(link.CancelSequence(self.key))
            case Close(now):
                self._host.close(now=now)
            case _:
                raise AssertionError(action)

    def _read(self, token_start: int, token_count: int) -> None:
        """Have the engine read planes, into their slot if they have one."""
        slot = self._slots.get((token_start, token_count))
        into = None if slot is None or self.memory is None else PlaneBuffer(self.memory.slot(slot))
        without = self.sender.leaves_out_windows(token_start, token_count)
        self._tools.dispatcher.send(link.ReadKv(self.key, token_start, token_count, without, into))

    def _close_memory(self) -> None:
        if self.memory is not None:
            self.memory.close()
            self.memory = None

    def _frame(self, action: SendFrame) -> bytes:
        place = action.token_start, action.token_count
        sections, slot = self._planes.pop(place), None
        if action.slot is not None:
            assert self.memory is not None, "a frame leaves after the end"
            del self._slots[place]
            slot = PlaneSlot(action.slot, self.memory.slot(action.slot))
        label = FrameLabel(
            self.sender.label, action.sequence, self._tools.numerics_class, action.token_start, action.token_count
        )
        if self._pair is not None:
            frame = FrameApart(label, sections, is_last=action.is_last)
            key = self.sender.order.pair_key
            return frame.encode(self._pair.send(key, frame.planes, frame.num_bytes))
        return encode_frame(label, sections, is_last=action.is_last, slot=slot)


def _why(event: link.Ended) -> TwostrokeError:
    if event.reason is FinishReason.ERROR:
        return from_code(event.error_code, event.error_message)
    return InternalError(f"the sequence ended ({event.reason.value}) before its hand-over")
