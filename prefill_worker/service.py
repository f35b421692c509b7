"""Prefill service of a worker's face: hand-over streams in, jobs for the engine. One per worker, on one event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass, replace

from ..core.errors import InvalidRequest, Overloaded, PairRefused, TransportUnavailable, TwostrokeError, Unavailable
from ..core.request import Role, SequenceKey
from ..engine.facts import FaceFacts
from ..engine.link import messages as link
from ..engine.link.draining import Draining
from ..kv.handover.carrier import StreamHost
from ..kv.handover.driver import Driver
from ..kv.handover.frames import WireError, decode_envelope, encode_message, tokens_per_frame, tokens_per_slot
from ..kv.handover.machine import Label
from ..kv.handover.pairing import CAPABILITIES, why_refused
from ..kv.handover.plane_channel import GLOO, GRPC, PlaneMemory, SendingEnd, UnusableMemory
from ..kv.handover.sender import Sender, refuse
from ..kv.handover.sources import sources_from_wire
from ..kv.handover.transports.grpc import ByteStream, ServerContext, ServerStream
from ..kv.messages import error_to_wire, sampling_from_wire, scope_from_wire, spec_from_wire
from ..kv.recent_prompts import RecentPrompts
from ..kv.spec import KvSpec
from ..protos import handover_pb2
from .returns import Lacked
from .task import PrefillTask, PrefillTaskTools

log = logging.getLogger(__name__)

RETRY_S = 1.0


class PrefillService:
    """All hand-overs that this worker computes for decode workers.

    Every end of a stream gives its blocks back: the machine's own ends, a peer that cancels or dies (the handler
    is cancelled), silence (the machine's timer), and the deadline of a drain.
    """

    def __init__(self, facts: FaceFacts, tools: PrefillTaskTools, role: Callable[[], Role], max_streams: int) -> None:
        self.draining = Draining()
        self._facts = facts
        self._tools = tools
        self._role = role
        self._max_streams = max_streams
        self._jobs: dict[SequenceKey, PrefillTask] = {}
        self._tasks: set[asyncio.Task[None]] = set()  # one per stream that has a job
        self._prompts = RecentPrompts(facts.namer)
        self._count = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def is_draining(self) -> bool:
        """True if new hand-overs are refused."""
        return self.draining.is_on

    def undrain(self) -> None:
        """Take hand-overs again."""
        self.draining.undo()

    @property
    def num_running(self) -> int:
        """Number of hand-overs under way."""
        return len(self._jobs)

    async def transfer(self, _: AsyncIterator[bytes], context: ServerContext) -> None:
        """Handler of Handover.Transfer."""
        await self.serve(ServerStream(context))

    async def serve(self, stream: ByteStream) -> None:
        """Serve one hand-over, from its Open to its end."""
        message = await self._first(stream)
        if message is None:
            return
        driver = Driver(stream, self._tools.clock, self._tools.executor)
        job = self.open(message, driver)
        task = asyncio.current_task()
        assert task is not None, "serve runs in a task"
        if job is not None:
            self._tasks.add(task)
        try:
            await driver.run()
        finally:
            self._tasks.discard(task)
            if job is not None:
                self.leave(job)

    def open(self, message: handover_pb2.HandoverUp, host: StreamHost) -> PrefillTask | None:
        """Start the job of an opening message; `leave` must follow. None: it was refused, and the peer was told why."""
        try:
            job = self._accept(message, host)
        except TwostrokeError as error:
            self._tools.counters["handovers_refused"] += 1
            log.info("hand-over of %s refused: %s", message.request_id, error)
            host.send(encode_message(refuse(message, error_to_wire(error))))
            host.close(now=True)
            return None
        self._jobs[job.key] = job
        self._idle.clear()
        job.start()
        return job

    def leave(self, job: PrefillTask) -> None:
        """A job's stream has ended: its remaining blocks are given back."""
        job.leave()
        self._tools.adapters.release(job.adapter_slot)
        del self._jobs[job.key]
        if not self._jobs:
            self._idle.set()

    async def drain(self, timeout_s: float) -> int:
        """Refuse new hand-overs and let the running ones end for `timeout_s`; returns the number cancelled then."""
        return self.cancel_all() if await self.draining.until(self._idle, timeout_s) else 0

    def cancel_all(self) -> int:
        """Cancel all streams that have a job; returns their number."""
        for task in self._tasks:
            task.cancel()
        return len(self._tasks)

    # ------------------------------------------------------------------ inside

    async def _first(self, stream: ByteStream) -> handover_pb2.HandoverUp | None:
        """The opening message; None if none came in time, or a malformed one."""
        try:
            async with asyncio.timeout(self._tools.timing.silence_s):
                envelope = await stream.receive()
            message = None if envelope is None else decode_envelope(envelope)
        except (TimeoutError, WireError) as error:
            log.warning("a hand-over stream did not open: %s", error or "silence")
            return None
        return message if isinstance(message, handover_pb2.HandoverUp) else None

    def _accept(self, message: handover_pb2.HandoverUp, host: StreamHost) -> PrefillTask:
        """Make the job of an order.

        Raises:
            TwostrokeError: the order cannot be carried out.
        """
        if self.is_draining:
            raise Unavailable("the worker is draining", retry_after_s=RETRY_S)
        if self._role() is Role.COMBINED:
            raise Unavailable("this worker is combined and takes no hand-overs", retry_after_s=RETRY_S)
        if len(self._jobs) >= self._max_streams:
            raise Overloaded(f"{len(self._jobs)} hand-overs are under way", retry_after_s=RETRY_S)
        facts, tools = self._facts, self._tools
        now_s = tools.clock.now_s()
        frame_tokens = tokens_per_frame(facts.model.kv_spec, facts.frame_bytes)
        sender = Sender(message, frame_tokens, facts.frame_slots, tools.timing, now_s)
        self._check_compatible(sender.order)
        submit, sources = self._submit(sender, now_s), sources_from_wire(sender.order.block_sources)
        pair = self._paired(sender)
        memory = None if pair is not None else self._share(sender, frame_tokens)
        try:
            slot = tools.adapters.hold(sender.order.adapter)  # last: what follows cannot fail
        except TwostrokeError:
            if memory is not None:
                memory.close()
            raise
        submit = replace(submit, adapter_slot=slot)
        lacked = None
        if sources:
            key = SequenceKey(sender.label.request_id, sender.label.choice)
            lacked = Lacked(key, scope_from_wire(sender.order), submit, sources)
        return PrefillTask(sender, submit, host, tools, memory, pair=pair, lacked=lacked)

    def _paired(self, sender: Sender) -> SendingEnd | None:
        """Have the sender use the paired channel that the peer offers; None: it offers none that is open here."""
        own = self._facts.transport.required
        pair = self._tools.pair(sender.order.pair) if sender.order.pair and own in ("", GLOO) else None
        if pair is not None:
            sender.pair()
        return pair

    def _share(self, sender: Sender, frame_tokens: int) -> PlaneMemory | None:
        """Map the peer's ring, and have the sender use it; None: planes travel over the stream.

        Raises:
            TransportUnavailable: the peer or this worker requires more than there is.
        """
        order = sender.order
        required = {order.required_transport, self._facts.transport.required} - {""}
        try:
            memory = self._mapped(order)
        except UnusableMemory as error:
            if required - {GRPC}:
                raise TransportUnavailable(
                    f"{', '.join(sorted(required))} is required for KV, and cannot be used: {error}",
                    param="required_transport",
                    retry_after_s=RETRY_S,
                ) from None
            sender.decline(str(error))
            return None
        tokens = tokens_per_slot(self._facts.model.kv_spec, memory.slot_bytes)
        sender.share(memory.slots, min(frame_tokens, tokens))
        return memory

    def _mapped(self, order: handover_pb2.Open) -> PlaneMemory:
        wanted = self._facts.transport.wanted
        if order.pair:
            raise UnusableMemory("the paired channel is not open on the prefill worker")
        if not order.HasField("shared_memory"):
            raise UnusableMemory("the peer offers no shared memory")
        if not self._facts.transport.may_share or self._tools.open_memory is None:
            raise UnusableMemory(f"this prefill worker's cache.transport is {wanted}")
        size = order.shared_memory.slot_bytes
        if not tokens_per_slot(self._facts.model.kv_spec, size):
            raise UnusableMemory(f"slots of {size} bytes hold no hash block")
        return self._tools.open_memory(order.shared_memory)

    def _check_compatible(self, order: handover_pb2.Open) -> None:
        facts, model = self._facts, self._facts.model
        if (order.deterministic or model.deterministic) and order.numerics_class != model.numerics_class:
            raise PairRefused(
                f"numerics class {order.numerics_class.hex()} is not ours ({model.numerics_class.hex()}: "
                f"{model.numerics_description}); deterministic mode pairs equal ones only",
                param="numerics_class",
            )
        ours = _Side(CAPABILITIES, model.kv_spec, facts.num_ranks)
        theirs = _Side(order.capabilities, spec_from_wire(order.kv_spec), max(1, order.tensor_parallel_size))
        refused = why_refused(ours, theirs)
        if refused is not None:
            raise refused

    def _submit(self, sender: Sender, now_s: float) -> link.Submit:
        order = sender.order
        asked_ids = tuple(order.prompt_ids)
        self._facts.model.check_prompt(asked_ids)
        params = sampling_from_wire(order.sampling)
        self._facts.model.check_sampling(params)
        prompt_ids, names = self._prompts.name(sender.label.request_id, asked_ids, scope_from_wire(order))
        if order.identity_root != names.root:
            raise InvalidRequest(
                f"identity_root is {order.identity_root.hex()}, ours {names.root.hex()}: cluster key, weights, "
                "numerics or adapter differ, so this KV is not the peer's",
                param="identity_root",
            )
        return link.Submit(
            key=self._engine_key(sender.label),
            source=link.Source.FOR_PEER,
            prompt_ids=prompt_ids,
            identities=names.identities,
            identity_root=names.root,
            params=params,
            num_emitted=order.emitted_tokens,
            priority=order.priority,
            deadline_s=now_s + order.timeout_ms / 1000,
        )

    def _engine_key(self, label: Label) -> SequenceKey:
        """Name unique in this worker: a request may come again before its older hand-over has ended."""
        self._count += 1
        return SequenceKey(f"{label.request_id}/p{self._count}", label.choice)


@dataclass(frozen=True, slots=True)
class _Side:
    """One worker of a pair whose weights and numerics were compared already. Implements `HandoverSide`."""

    capabilities: Collection[str]
    kv_spec: KvSpec
    num_ranks: int
    numerics: bytes = b""
