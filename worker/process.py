"""The worker process: one engine, both services, one port. Its role is data. Builds and binds; decides nothing."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import grpc.aio

from .. import __version__
from ..core.clock import Clock, MonotonicClock
from ..core.discovery.source import AddressSource
from ..core.errors import ConfigError, DeviceFault, InternalError
from ..core.guard import Guard
from ..core.lease import HANDOVER_LEASE, Lease
from ..core.ports import bindable_host, check_port, target
from ..core.request import Role
from ..core.tls.callers import Caller
from ..core.tls.identity import TlsIdentity, add_port
from ..engine.adapters import AdapterBounds, AdapterTable
from ..engine.link import messages as link
from ..engine.link.client import EngineClient
from ..kv.handover import pairing
from ..kv.handover.transports.grpc import SERVER_OPTIONS, Channels, ServerContext, handlers
from ..kv.keys import proof_key
from ..kv.messages import role_to_wire, spec_to_wire
from ..protos import common_pb2, worker_pb2_grpc
from .adapters import WorkerAdapters
from .announcer import Announcer
from .blocks.departure import hand_back_after_s
from .build import build_engine
from .built import BuiltEngine
from .codec.fallback import CodecFallback
from .codec.streams import Streams
from .faces.faces import FaceHost, Faces
from .gpu.export import to_wire
from .gpu.nvml import Library
from .gpu.verdict import Verdict
from .gpu.watch import GpuWatch
from .health import Health, enable_reflection
from .metrics import WorkerMetrics, pages
from .scrape import ScrapeServer
from .service import WorkerService
from .settings import WorkerSettings
from .state_memory import refuse_role

log = logging.getLogger(__name__)

CAPABILITIES = (
    *pairing.CAPABILITIES,
    "blocks.fetch.1",
    "blocks.keep.1",
    "blocks.return.1",
    "orders.confirm.1",
    "session.1",
)
READY_S = 600.0  # longest time to load and warm up a large model
PORT_REMEDY = "--port, or 0 for any"
LINGER_S = 2.0  # longest time after a drain that was asked for, in which others fetch what was given back
STOP_S = 5.0  # longest time for the engine's last step
TOLD_S = 1.0  # longest time for the routers to hear that this worker drains and comes back


class WorkerProcess:
    """One worker: `start` it, `stop` it. Several can run in one process (tests, the in-process launcher)."""

    def __init__(
        self,
        settings: WorkerSettings,
        clock: Clock | None = None,
        timing: Lease | None = None,
        nvml: Library | None = None,
        sources: Sequence[AddressSource] = (),
    ) -> None:
        """`nvml`: a module of pynvml's shape; None: pynvml, if it is installed. `sources`: of further routers."""
        self.settings = settings
        self._sources = tuple(sources)
        self.role = settings.role
        self.incarnation = time.time_ns()
        self.ended = asyncio.Event()  # the engine has ended, by `stop` or by its own fault
        self.fault: DeviceFault | None = None  # why the worker ended itself, for a reason that lies in its GPU
        self.counters: Counter[str] = Counter()
        self.metrics_address = ""  # host:port of GET /metrics and /health, after `start`; empty: none
        self._clock = clock or MonotonicClock()
        self._timing = timing or HANDOVER_LEASE
        self._port = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._executor = ThreadPoolExecutor(max_workers=2, thread_name_prefix="digest")
        self._proof_key = proof_key(settings.cluster_key)
        self._tls = TlsIdentity(settings.tls, Caller.WORKER) if settings.tls else None
        self._channels = Channels(self._proof_key, self._tls)
        self._guard = Guard(self._proof_key, settings.worker_id, self._count_refusal, self._tls)
        self._room: BuiltEngine | None = None
        self._faces: Faces | None = None
        self._server: grpc.aio.Server | None = None
        self._scrapes: ScrapeServer | None = None
        self._announcer: Announcer | None = None
        self._is_stopping = False
        self._nvml = nvml
        self._gpu: GpuWatch | None = None
        self.streams = Streams()
        self.fallback: CodecFallback | None = None  # of this worker's cache, when its guard says so
        self._serving: EngineClient | None = None  # of the engine whose end is this worker's
        self._drains_by_order = False

    @property
    def clock(self) -> Clock:
        """Its clock."""
        return self._clock

    @property
    def address(self) -> str:
        """host:port of all services; known after `start`."""
        return target(self.settings.host, self._port)

    @property
    def readiness(self) -> str:
        """One line for the operator: address, model, and the routers that the worker announces itself to."""
        settings = self.settings
        routers = ", ".join((*settings.routers, *(f"all of {source.name}" for source in self._sources)))
        return (
            f"{settings.worker_id} ({self.role.value}) is ready with {settings.model_name} at {self.address}; "
            f"it takes work from the routers that it announces itself to: {routers}"
        )

    @property
    def is_draining(self) -> bool:
        """True if orders are refused."""
        return self.faces.decode.is_draining

    @property
    def room(self) -> BuiltEngine:
        """The engine with its link and facts; known after `start`."""
        assert self._room is not None, "start first"
        return self._room

    @property
    def faces(self) -> Faces:
        """The services of the engine that there is now; known after `start`."""
        assert self._faces is not None, "start first"
        return self._faces

    # ------------------------------------------------------------------ life

    async def start(self) -> None:
        """Load the model, warm up, bind the port, announce. Returns when the worker serves.

        Raises:
            CheckpointError, DoesNotFit, ConfigError: the worker cannot be started with these settings.
            DeviceCordoned: its GPU is unfit.
            InternalError: the engine did not become ready.
        """
        check_port(self._host(), self.settings.port, PORT_REMEDY)  # first, because loading can take minutes
        self._gpu = await GpuWatch.start(self.settings, self._clock, self._on_gpu, self._nvml)
        room = self._room = await asyncio.to_thread(build_engine, self.settings, self._clock)
        log.info("%s computes with %s", self.settings.worker_id, room.facts.model.numerics_description)
        log.info("%s: %s", self.settings.worker_id, room.pool_size.arithmetic)
        self._facts, self.dispatcher = room.facts, EngineClient(room.link)
        self._make_lasting(room)
        await self._serve(room)
        if room.fallback is not None and room.loaded is not None:
            self.fallback = CodecFallback(self, room.fallback, room.loaded)
        for module in self.settings.model.lora_modules:
            await self.adapters.load(module.name, module.path)
        await self._bind()
        self._tasks.append(asyncio.create_task(self.health.keep()))
        self._announcer = self._announcing()
        if self.metrics_address:
            url = f"http{'s' if self._tls else ''}://{self.metrics_address}/metrics"
            log.info("%s exports metrics at %s", self.settings.worker_id, url)
        log.info("%s (%s) serves at %s", self.settings.worker_id, self.role.value, self.address)

    async def stop(self, grace_s: float) -> None:
        """Tell the routers, drain, end the engine, free all resources; `grace_s` bounds all of it but the last step.

        Idempotent.
        """
        if self._is_stopping:
            return
        self._is_stopping = True
        end_s = self._clock.now_s() + grace_s
        if self.fallback is not None:
            await self.fallback.close()
        if self._announcer is not None:
            await self._announcer.leave()  # first, so that no router sends new work while the running work ends
        if self._server is not None:
            await self.drain(
                hand_back_after_s(grace_s, self._running_bytes(), self.faces.pull.speed.bytes_per_s), end_s
            )
        if self._server is not None:
            await self._server.stop(0.2)
        if self._scrapes is not None:
            await self._scrapes.close()
        if self._room is not None:
            self._room.link.send(link.Stop())
            if not await asyncio.to_thread(self._room.engine.join, STOP_S):
                log.error("%s: the engine's last step did not end within %.0f s", self.settings.worker_id, STOP_S)
            await asyncio.to_thread(self._room.close)
            await self.faces.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._gpu is not None:
            await self._gpu.close()
        await self._channels.close()
        self._executor.shutdown(wait=False)

    async def drain(self, timeout_s: float, end_s: float | None = None) -> int:
        """Take no new work, let running work end for `timeout_s`, then hand back the rest; returns its number.

        Other workers fetch the blocks of what was handed back until `end_s`; None: for at most LINGER_S.
        """
        self._drains_by_order = True
        return await self.drain_faces(timeout_s, end_s)

    async def drain_faces(self, timeout_s: float, end_s: float | None = None) -> int:
        """As `drain`, but faces that take the place of these take new work."""
        faces = self.faces
        handed_back = await faces.drain(timeout_s)
        if handed_back:
            with suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._all_ended()
            left_s = LINGER_S if end_s is None else end_s - self._clock.now_s()
            not_fetched = await faces.departing.wait(left_s)
            log.info("%s: %d handed back, %d of them not fetched", self.settings.worker_id, handed_back, not_fetched)
        return handed_back

    def undrain(self) -> None:
        """Take new work again, after a `drain` that nobody needs any more.

        Raises:
            ConfigError: the process ends, so it cannot.
        """
        if self._is_stopping or self.fault is not None or self.ended.is_set():
            raise ConfigError(f"{self.settings.worker_id} ends already; start it again")
        self._drains_by_order = False
        if not self.health.is_changing:  # else the faces that come take work
            self.faces.undrain()
        log.info("%s takes work again: its drain was undone", self.settings.worker_id)
        self._announce()

    def set_role(self, role: Role) -> None:
        """Change the role: another policy, announced to the routers. Running work continues.

        Raises:
            ConfigError: the model is not served in this role.
        """
        model = self._facts.model
        if model.has_states:
            refuse_role(model.name, role)
        self.role = role
        if self._room is not None:
            self._room.link.send(link.SetRole(role))
        log.info("%s is %s from now on", self.settings.worker_id, role.value)
        self._announce()

    # ------------------------------------------------------------------ who we are

    def info(self) -> common_pb2.WorkerInfo:
        """This worker's info for Announce, Describe and Welcome."""
        facts = self._facts
        model = facts.model
        return common_pb2.WorkerInfo(
            worker_id=facts.worker_id,
            incarnation=self.incarnation,
            role=role_to_wire(self.role),
            address=self.address,
            capabilities=CAPABILITIES,
            model=common_pb2.ModelInfo(
                name=model.name,
                weights_fingerprint=model.weights_fingerprint,
                numerics_class=model.numerics_class,
                numerics_description=model.numerics_description,
                max_model_len=model.max_model_len,
                vocab_size=model.vocab_size,
                kv_spec=spec_to_wire(model.kv_spec),
                deterministic=model.deterministic,
                path=model.directory,
                cache_codec=model.cache_codec,
                fell_back_from=model.fell_back_from,
            ),
            num_kv_blocks=facts.num_blocks,
            block_tokens=facts.block_tokens,
            max_num_seqs=facts.max_num_seqs,
            max_batch_tokens=facts.max_batch_tokens,
            release=__version__,
            pid=os.getpid(),
            metrics_address=self.metrics_address,
            tensor_parallel_size=facts.num_ranks,
            gpus=self._gpus(),
            adapters=self.adapters.messages(),
            changes_codec_to="" if self.fallback is None else self.fallback.changes_to,
        )

    # ------------------------------------------------------------------ another engine in the place of this one

    async def begin_change(self) -> None:
        """Tell the routers that this worker drains and comes back, and that to probes this is no fault."""
        self.health.is_changing = True
        if self._announcer is not None:
            await self._announcer.tell(self.info(), TOLD_S)

    async def retire(self) -> None:
        """End the engine, after a drain: its faces are closed, and nothing here refers to it any more.

        Raises:
            InternalError: its last step does not end.
        """
        room = self.room
        self._serving = None
        room.link.send(link.Stop())
        if not await asyncio.to_thread(room.engine.join, STOP_S):
            raise InternalError(f"the engine's last step did not end within {STOP_S:.0f} s")
        await asyncio.to_thread(room.close)
        await self.faces.close()
        self._room = None

    async def install(self, room: BuiltEngine) -> None:
        """Serve with another engine, under another incarnation.

        Raises:
            InternalError: it does not become ready.
        """
        self.incarnation = time.time_ns()
        self._facts, self.dispatcher = room.facts, EngineClient(room.link)
        self.health.follow(self.dispatcher)
        self.adapters.follow(self.dispatcher)
        self._metrics.describe_cache(room.facts, room.pool_size)
        await self._serve(room)
        room.link.send(link.SetRole(self.role))  # it may have changed since the engine was begun

    async def abandon(self, room: BuiltEngine) -> None:
        """Give up an engine that did not become ready; another one takes its place."""
        room.link.send(link.Stop())
        if not await asyncio.to_thread(room.engine.join, STOP_S):
            raise InternalError(f"an engine that did not become ready did not end within {STOP_S:.0f} s")
        await self.faces.close()
        self._room = None

    async def end_change(self) -> None:
        """Announce the other engine; routers and peers open their streams anew."""
        self.health.is_changing = False
        if self._drains_by_order:
            self.faces.refuse_work()
        before, self._announcer = self._announcer, self._announcing()
        if before is not None:
            await before.end()
        self.streams.end()

    # ------------------------------------------------------------------ inside

    def _announcing(self) -> Announcer:
        announcer = Announcer(self.settings.routers, self.info(), self._proof_key, sources=self._sources, tls=self._tls)
        announcer.start()
        return announcer

    def _make_lasting(self, room: BuiltEngine) -> None:
        """Parts that stay when the engine is replaced."""
        facts, model = room.facts, self.settings.model
        self._metrics = WorkerMetrics(self.settings, facts, room.pool_size, self.counters, self._sources)
        bounds = AdapterBounds(model.max_loras, model.max_lora_bytes) if model.serves_adapters else AdapterBounds()
        table = AdapterTable(bounds, self._drop_adapter)
        self._metrics.adapters = lambda: table.served
        self.adapters = WorkerAdapters(table, self.dispatcher, room.read_adapter, facts.model.name, self._announce)
        self.health = Health(self.dispatcher, self._clock, lambda: self.is_draining)

    def _drop_adapter(self, slot: int) -> None:
        self.dispatcher.drop_adapter(slot)  # of the engine that there is then

    async def _serve(self, room: BuiltEngine) -> None:
        """Start an engine with faces of its own. Returns when it is ready.

        Raises:
            InternalError: it does not become ready.
        """
        self._room, self._faces = room, self._made_faces(room)
        room.engine.start()
        dispatching = asyncio.create_task(self._dispatch(self.dispatcher))
        self._tasks.append(dispatching)
        await self._ready(dispatching)
        self._serving = self.dispatcher

    def _made_faces(self, room: BuiltEngine) -> Faces:
        host = FaceHost(
            self.settings,
            self._clock,
            self._timing,
            self.counters,
            self._executor,
            self._channels,
            self.adapters.table,
            self._metrics.ended,
            self._host(),
            has_certificates=self._tls is not None,
            incarnation=self.incarnation,
            role=lambda: self.role,
            is_draining=lambda: self.is_draining,
            address=lambda: self.address,
            gpus=self._gpus,
        )
        return Faces(room, self.dispatcher, host)

    def _gpus(self) -> tuple[common_pb2.GpuState, ...]:
        return () if self._gpu is None else (to_wire(self._gpu.state()),)

    def _on_gpu(self, verdict: Verdict) -> None:
        """A new verdict on the GPU: tell the routers; if the GPU is unfit, end this worker, once."""
        self._announce()
        if verdict.ends_process and self.fault is None:
            assert self._gpu is not None
            self.fault = self._gpu.fault()
            self._tasks.append(asyncio.create_task(self._give_up_gpu(verdict)))

    def _announce(self) -> None:
        """Tell the routers what has changed. Before the worker announces itself, nobody needs to know."""
        if self._announcer is not None:
            self._announcer.update(self.info())

    async def _give_up_gpu(self, verdict: Verdict) -> None:
        """Let running work end where the verdict allows it, then end."""
        assert self._gpu is not None
        if verdict.lets_work_end and self._server is not None:
            await self.drain(self.settings.drain_timeout_s)
        await self._gpu.settled()
        self.fault = self._gpu.fault()
        self.ended.set()

    async def _dispatch(self, dispatcher: EngineClient) -> None:
        try:
            await dispatcher.run()
        finally:
            if dispatcher is self._serving:
                self.ended.set()
                if not self._is_stopping:
                    log.error("%s: the engine has ended", self.settings.worker_id)

    async def _ready(self, dispatching: asyncio.Task[None]) -> None:
        ready = asyncio.create_task(self.health.wait_ready())
        ended = asyncio.create_task(self.ended.wait())
        try:
            await asyncio.wait([ready, ended, dispatching], timeout=READY_S, return_when=asyncio.FIRST_COMPLETED)
            if not ready.done() or dispatching.done():
                raise self.fault or InternalError("the engine did not become ready; its log has more")
        finally:
            for task in (ready, ended):
                task.cancel()

    async def _bind(self) -> None:
        host, port = self._host(), self.settings.port
        server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=[self._guard])
        server.add_generic_rpc_handlers(
            handlers(self._transfer, self._pair, self._fetch, self._keep)  # of the faces that there are then
        )
        worker_pb2_grpc.add_WorkerServicer_to_server(WorkerService(self), server)
        self.health.add_to(server)
        enable_reflection(server)
        wanted = target(host, port)
        try:
            self._port = add_port(server, wanted, self._tls.server_credentials() if self._tls else None)
        except RuntimeError as error:
            check_port(host, port, PORT_REMEDY)  # raises with the reason, if it finds one
            raise ConfigError(f"{wanted} cannot be bound: {error}") from None
        self._guard.audience = self.address
        await server.start()
        self._server = server
        if self.settings.metrics_port is not None:
            gpu = self._gpu.state if self._gpu is not None else lambda: None
            served = pages(self._metrics, lambda: self.dispatcher.last_load, self.health, self._is_known, gpu)
            context = self._tls.http_context() if self._tls else None
            self._scrapes = ScrapeServer(served, self.settings.metrics_keys, context=context)
            self.metrics_address = await self._scrapes.start(host, self.settings.metrics_port)

    async def _transfer(self, messages: AsyncIterator[bytes], context: ServerContext) -> None:
        await self.faces.prefill.transfer(messages, context)

    async def _pair(self, messages: AsyncIterator[bytes], context: ServerContext) -> None:
        with self.streams.running():
            await self.faces.pairing.pair(messages, context)

    async def _fetch(self, request: bytes, context: ServerContext) -> AsyncIterator[bytes]:
        async for piece in self.faces.fetch.fetch(request, context):
            yield piece

    async def _keep(self, request: bytes, context: ServerContext) -> bytes:
        return await self.faces.keep.keep(request, context)

    def _host(self) -> str:
        """The host to bind.

        Raises:
            ConfigError: the address is public, there are no certificates, and `insecure` is not set.
        """
        is_safe = self.settings.insecure or self.settings.tls is not None
        return bindable_host(self.settings.host, "--host", insecure=is_safe)

    def _is_known(self) -> bool:
        """True if a router knows this worker, so that it can be chosen for requests."""
        return self._announcer is not None and self._announcer.num_answering > 0

    def _count_refusal(self) -> None:
        self.counters["calls_refused"] += 1

    def _running_bytes(self) -> int:
        """KV of the sequences that run, by the last beat."""
        load, facts = self.dispatcher.last_load, self._facts
        return 0 if load is None else load.running_context_tokens * facts.model.kv_spec.bytes_per_token

    async def _all_ended(self) -> None:
        while self.dispatcher.num_owned:
            await self.dispatcher.next_end()
