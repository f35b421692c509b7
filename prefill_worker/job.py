"""One prompt computed for a decode worker: carries out what the sending machine decides. Knows no router, no text."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from ..core.clock import Clock
from ..core.errors import InternalError, KvCorrupted, TwostrokeError, from_code
from ..core.life import Life, forget
from ..core.request import FinishReason, SequenceKey
from ..core.timeline import Instant, Timeline
from ..kv.driver import Driver
from ..kv.handover import (
    Abort,
    Action,
    Close,
    EngineBound,
    EngineNotYet,
    Read,
    Release,
    Send,
    SendFrame,
    Timing,
)
from ..kv.handover_sender import Sender
from ..kv.messages import error_to_wire, instants_to_wire, logprobs_to_wire
from ..kv.section import SectionData
from ..kv.transport import ByteStream
from ..kv.wire import FrameLabel, WireError, decode_envelope, encode_frame, encode_message, verify_sections
from ..model import link
from ..model.dispatch import Dispatcher, SequenceEvent
from ..protos import handover_pb2

log = logging.getLogger(__name__)

MAX_READS = 2  # of the same planes: once more when they do not match their seals


@dataclass(frozen=True, slots=True)
class JobTools:
    """What all jobs of a worker share."""

    dispatcher: Dispatcher
    executor: Executor  # verifies digests; numpy frees the interpreter meanwhile
    digest_key: int
    numerics_class: bytes
    timing: Timing
    clock: Clock
    counters: Counter[str]
    ended: Callable[[Life], None] = forget  # hears of every job that is over


class Job:
    """From an accepted Open until its stream and its sequence are gone."""

    def __init__(self, sender: Sender, submit: link.Submit, stream: ByteStream, tools: JobTools) -> None:
        self._sender = sender
        self._submit = submit
        self._stream = stream
        self._tools = tools
        self._timeline = Timeline()
        self._seen_at_s = tools.clock.now_s()
        self._planes: dict[tuple[int, int], tuple[SectionData, ...]] = {}  # read, waiting to be sent
        self._reads: Counter[tuple[int, int]] = Counter()  # mismatching reads of each range
        self._verifying: set[asyncio.Task[None]] = set()
        self._in_order = asyncio.Lock()  # leading tokens leave first: only a gapless beginning is worth keeping
        self._close: Close | None = None
        self._over = asyncio.Event()
        self._gone = asyncio.Event()  # the engine's Ended
        self._todo: list[Action] = []
        self._is_doing = False
        self._driver = Driver(stream, lambda: sender.next_deadline_s, self._tick)

    @property
    def key(self) -> SequenceKey:
        """Its name inside this worker."""
        return self._submit.key

    async def run(self) -> None:
        """Compute and send; returns when the stream may be closed. The sequence's blocks are freed or about to be."""
        tools = self._tools
        tools.dispatcher.own(self.key, self.handle)
        tools.dispatcher.send(self._submit)
        self._driver.rearm()
        reader = asyncio.create_task(self._read())
        over = asyncio.create_task(self._over.wait())
        try:
            await asyncio.wait([over])
            await self._driver.flush()
        finally:
            self._do(self._sender.closed(self._now_s()))  # the stream was cancelled from outside: give everything back
            self._driver.stop()
            tasks = [reader, over, *self._verifying]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self) -> None:
        while (envelope := await self._stream.receive()) is not None:
            try:
                message = decode_envelope(envelope)
                if not isinstance(message, handover_pb2.HandoverUp):
                    raise WireError("a message of the other direction")
            except WireError as error:
                self._tools.counters["handover_garbled"] += 1
                self._do(self._sender.garbled(self._now_s(), str(error)))
            else:
                self._do(self._sender.on_message(message, self._now_s()))
        self._do(self._sender.closed(self._now_s()))

    # ------------------------------------------------------------------ the engine's events

    def handle(self, event: SequenceEvent) -> None:
        """One event of our sequence."""
        now_s = self._now_s()
        match event:
            case link.Offered(_, cached_tokens):
                self._timeline.mark(Instant.OFFERED, now_s)
                self._do(self._sender.started(cached_tokens, now_s))
            case link.Progress(_, num_computed, began, began_s):
                if began:
                    self._mark_began(began_s, now_s)
                self._do(self._sender.progress(num_computed, now_s))
            case link.TokenNews():
                self._mark_began(event.began_s, now_s)  # before the news of its progress, after a single chunk
                self._timeline.mark(Instant.PREFILLED, now_s)
                self._do(self._sender.first_token(self._first_token(event), now_s))
            case link.KvRead(_, token_start, token_count, sections):
                if sections is not None and not self._sender.is_over:
                    task = asyncio.create_task(self._check(token_start, token_count, sections))
                    self._verifying.add(task)
                    task.add_done_callback(self._verifying.discard)
            case link.Ended():
                self._gone.set()
                self._tools.ended(self._life(event, now_s))
                self._do(self._sender.failed(error_to_wire(_why(event)), now_s))
            case _:
                log.debug("%s: %s is nothing to a job", self.key, type(event).__name__)

    def _mark_began(self, began_s: float | None, now_s: float) -> None:
        self._timeline.mark(Instant.PREFILL_BEGAN, now_s if began_s is None else began_s)

    def _life(self, event: link.Ended, now_s: float) -> Life:
        """What it leaves in this worker's metrics. A job is a sequence that wants one token."""
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

    async def _check(self, token_start: int, token_count: int, sections: tuple[SectionData, ...]) -> None:
        """Planes leave only if they match the seals that they got at birth."""
        loop, tools = asyncio.get_running_loop(), self._tools
        async with self._in_order:
            matches = await loop.run_in_executor(
                tools.executor, verify_sections, sections, token_start, token_count, tools.digest_key
            )
        place = (token_start, token_count)
        if matches:
            self._planes[place] = sections
            size_bytes = sum(section.num_bytes for section in sections)
            self._do(self._sender.frame_read(token_start, token_count, size_bytes, self._now_s()))
            return
        self._reads[place] += 1
        tools.counters["kv_corrupted_reads"] += 1
        log.warning("%s: tokens %d+%d do not match their seals", self.key, token_start, token_count)
        if self._reads[place] < MAX_READS:
            tools.dispatcher.send(link.ReadKv(self.key, token_start, token_count))
        else:
            error = KvCorrupted(f"tokens {token_start}+{token_count} do not match their seals on the prefill worker")
            self._do(self._sender.failed(error_to_wire(error), self._now_s()))

    # ------------------------------------------------------------------ the machine

    def _tick(self) -> None:
        self._do(self._sender.tick(self._now_s()))

    def _do(self, actions: Sequence[Action]) -> None:
        """Carry actions out in order; those that an answer adds come after the ones before it."""
        self._todo += actions
        if self._is_doing:
            return
        self._is_doing = True
        try:
            while self._todo:
                self._act(self._todo.pop(0))
        finally:
            self._is_doing = False
        self._driver.rearm()

    def _act(self, action: Action) -> None:
        send = self._tools.dispatcher.send
        match action:
            case Send(message):
                if message.WhichOneof("body") == "started":
                    self._timeline.mark(Instant.STARTED, self._now_s())
                self._driver.put(encode_message(message))
            case SendFrame():
                self._driver.put(self._frame(action))
            case Read(token_start, token_count):
                send(link.ReadKv(self.key, token_start, token_count))
            case EngineBound():
                send(link.PeerBound(self.key))
            case EngineNotYet():
                send(link.PeerNotYet(self.key))
            case Release():
                send(link.Release(self.key))
            case Abort(reason):
                self._tools.counters[f"handover_aborted_{reason.value}"] += 1
                if not self._gone.is_set():
                    send(link.CancelSequence(self.key))
            case Close():
                self._close = action
                self._over.set()
            case _:
                raise AssertionError(action)

    def _frame(self, action: SendFrame) -> bytes:
        sections = self._planes.pop((action.token_start, action.token_count))
        label = FrameLabel(
            self._sender.label, action.sequence, self._tools.numerics_class, action.token_start, action.token_count
        )
        return encode_frame(label, sections, is_last=action.is_last)

    def _now_s(self) -> float:
        return self._tools.clock.now_s()


def _why(event: link.Ended) -> TwostrokeError:
    if event.reason is FinishReason.ERROR:
        return from_code(event.error_code, event.error_message)
    return InternalError(f"the sequence ended ({event.reason.value}) before its hand-over")
