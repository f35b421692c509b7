"""One hand-over from one prefill worker: carries out what the receiving machine decides. Knows no text, no router."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Protocol

from ..core.clock import Clock
from ..core.life import Life, forget
from ..core.request import SequenceKey
from ..core.timeline import Instant, Timeline
from ..kv.driver import Driver
from ..kv.handover import Action, AskBind, Close, Complete, End, GotFirstToken, Lost, Send, Timing, Write
from ..kv.handover_receiver import FrameArrived, Receiver
from ..kv.messages import adopt_instants
from ..kv.spec import HASH_BLOCK_TOKENS, KvSpec
from ..kv.transport import ClientStream
from ..kv.wire import Frame, WireError, decode_envelope, encode_message, verify_frame
from ..model.dispatch import Dispatcher
from ..model.link import WriteKv
from ..protos import handover_pb2
from .speed import Arrival, HandoverSpeed

log = logging.getLogger(__name__)

INLINE_BYTES = 64 << 10  # smaller frames are verified on the loop: a thread's round trip costs more


@dataclass(frozen=True, slots=True)
class PullTools:
    """What all hand-overs of a worker share."""

    dispatcher: Dispatcher
    executor: Executor  # verifies digests; numpy frees the interpreter meanwhile
    digest_key: int
    kv_spec: KvSpec
    timing: Timing
    clock: Clock
    counters: Counter[str]
    speed: HandoverSpeed = field(default_factory=HandoverSpeed)
    ended: Callable[[Life], None] = forget  # hears of every run that is over


class PullOwner(Protocol):
    """Who wants the KV: the run of one choice. Called on the loop; must not block."""

    def bind_wanted(self) -> None:
        """Have the engine bind, and answer with `Pull.bound` or `Pull.not_yet`."""
        ...

    def first_token_came(self, first: GotFirstToken) -> None:
        """Forward it."""
        ...

    def pull_completed(self) -> None:
        """All KV is stored, and the first token known."""
        ...

    def pull_lost(self, lost: Lost) -> None:
        """No more will come."""
        ...


class Pull:
    """Runs from its making until the machine is over and the stream is closed."""

    def __init__(
        self, receiver: Receiver, stream: ClientStream, engine_key: SequenceKey, owner: PullOwner, tools: PullTools
    ) -> None:
        self.receiver = receiver
        self.timeline = Timeline()  # ours and the peer's instants of this hand-over
        self.prefill_cached_tokens = 0
        self.refetched_blocks = 0  # hash blocks
        self._stream = stream
        self._engine_key = engine_key
        self._owner = owner
        self._tools = tools
        self._arrivals: list[Arrival] = []
        self._frame: Frame | None = None  # the one that the machine is looking at
        self._close: Close | None = None
        self._over = asyncio.Event()
        self._opened_at_s = tools.clock.now_s()
        self._todo: list[Action] = []
        self._is_doing = False
        self._driver = Driver(stream, lambda: receiver.next_deadline_s, self._tick)
        self._task = asyncio.create_task(self._run(), name=f"pull {engine_key.request_id}")

    # ------------------------------------------------------------------ from the run

    def bound(self) -> None:
        """The engine has bound blocks for the whole prompt."""
        self._do(self.receiver.bound(self._now_s()))

    def not_yet(self) -> None:
        """The engine will bind later."""
        self._do(self.receiver.not_yet(self._now_s()))

    def written(self, token_start: int, token_count: int) -> None:
        """The engine stored a frame."""
        self._do(self.receiver.written(token_start, token_count, self._now_s()))

    def cancel(self, reason: str) -> None:
        """Nobody wants it any more."""
        self._do(self.receiver.cancel(reason, self._now_s()))

    async def closed(self) -> None:
        """Wait until the stream is gone."""
        await asyncio.wait([self._task])

    # ------------------------------------------------------------------ the stream

    async def _run(self) -> None:
        reader = asyncio.create_task(self._read())
        over = asyncio.create_task(self._over.wait())
        try:
            self._do(self.receiver.opened(self._now_s()))
            await asyncio.wait([over])
            await self._driver.flush()
            if self._close is not None and not self._close.now:
                await self._stream.finish()
                await asyncio.wait([reader], timeout=self._tools.timing.silence_s)
        finally:
            self._driver.stop()
            self._stream.close()
            for task in (reader, over):
                task.cancel()
            await asyncio.gather(reader, over, return_exceptions=True)

    async def _read(self) -> None:
        while (envelope := await self._stream.receive()) is not None:
            try:
                await self._take(envelope)
            except WireError as error:
                self._tools.counters["handover_garbled"] += 1
                self._do(self.receiver.garbled(self._now_s(), str(error)))
        self._do(self.receiver.closed(self._now_s()))

    async def _take(self, envelope: bytes) -> None:
        received = decode_envelope(envelope)
        if isinstance(received, handover_pb2.HandoverDown):
            self._note(received)
            self._do(self.receiver.on_message(received, self._now_s()))
        elif isinstance(received, Frame):
            is_intact = await self._verify(received, len(envelope))
            arrived = FrameArrived.of(received.header, is_intact=is_intact, num_bytes=len(envelope))
            self._frame = received
            self._do(self.receiver.on_frame(arrived, self._now_s()))
            self._frame = None
        else:
            raise WireError("a message of the other direction")

    async def _verify(self, frame: Frame, size_bytes: int) -> bool:
        key, spec = self._tools.digest_key, self._tools.kv_spec
        if size_bytes <= INLINE_BYTES:
            is_intact = verify_frame(frame, key, spec)
        else:
            loop = asyncio.get_running_loop()
            is_intact = await loop.run_in_executor(self._tools.executor, verify_frame, frame, key, spec)
        now_s = self._now_s()
        if is_intact:
            self.timeline.mark(Instant.FIRST_FRAME, now_s)
            self._arrivals.append(Arrival(now_s, size_bytes))
        else:
            self._tools.counters["kv_corrupted_frames"] += 1
            log.warning("%s: frame %d did not match its digests", self._engine_key, frame.header.sequence)
        return is_intact

    def _note(self, message: handover_pb2.HandoverDown) -> None:
        """What the machine does not need but `explain` shows."""
        body = message.WhichOneof("body")
        if body == "started":
            self.prefill_cached_tokens = message.started.cached_tokens
        elif body == "first_token":
            adopt_instants(self.timeline, message.first_token.timeline, self._opened_at_s)
        elif body == "done":
            adopt_instants(self.timeline, message.done.timeline, self._opened_at_s)

    # ------------------------------------------------------------------ the machine

    def _tick(self) -> None:
        self._do(self.receiver.tick(self._now_s()))

    def _do(self, actions: Sequence[Action]) -> None:
        """Carry actions out in order; those that an owner's answer adds come after the ones before it."""
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
        match action:
            case Send(message):
                if isinstance(message, handover_pb2.HandoverUp) and message.HasField("refetch"):
                    self.refetched_blocks += -(-message.refetch.token_count // HASH_BLOCK_TOKENS)
                self._driver.put(encode_message(message))
            case Write(_, token_start, token_count):
                assert self._frame is not None, "a Write answers a frame"
                sections = self._frame.sections
                self._tools.dispatcher.send(WriteKv(self._engine_key, token_start, token_count, sections))
            case AskBind():
                self._owner.bind_wanted()
            case GotFirstToken():
                self._owner.first_token_came(action)
            case Complete():
                self.timeline.mark(Instant.LAST_FRAME, self._now_s())
                prefilled_s = self.timeline.at_s(Instant.PREFILLED)
                if prefilled_s is not None:
                    self._tools.speed.observe(self._arrivals, prefilled_s)
                self._owner.pull_completed()
            case Lost(reason):
                self._tools.counters[f"handover_lost_{reason.value}"] += 1
                self._owner.pull_lost(action)
            case Close():
                self._close = action
                self._over.set()
            case _:
                raise AssertionError(action)

    def _now_s(self) -> float:
        return self._tools.clock.now_s()


REFUSALS = (End.FAILED, End.CLOSED, End.SILENT, End.PROTOCOL, End.CORRUPTED)
"""Ends of a hand-over that another peer, or we ourselves, may make good. The others are the request's own end."""
