"""The router process: the flow, both client APIs, and the internal port for workers' announcements."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Generator, Sequence
from typing import Any, cast

import grpc
import grpc.aio
import uvicorn
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ..core.board import Board
from ..core.discovery.source import AddressSource
from ..core.errors import ConfigError, DeviceFault
from ..core.foreground import Stop, Stopped, first, leave, orphaned, unless
from ..core.metrics import count_sources
from ..core.ports import bindable_host, bound_socket, check_port, target
from ..core.process_settings import give_large_memory_back, keep_present_objects, switch_often
from ..core.tls.callers import Caller
from ..core.tls.config import TlsConfig
from ..core.tls.face import FaceTls
from ..core.tls.identity import TlsIdentity, add_port
from ..kv.keys import identity_key, journal_key, proof_key
from ..protos import inference_pb2, inference_pb2_grpc, peers_pb2_grpc
from .api.frontend import Frontend
from .api.grpc.guard import SPARE_CALLS, Guard
from .api.grpc.service import InferenceService
from .api.http.app import make_app
from .api.http.connections import Connections, connections_within, raise_file_limit
from .api.http.selector import TieredLoop, running_tiers
from .api.kserve.service import SERVICE as KSERVE
from .api.kserve.service import KserveService
from .config import RouterConfig
from .peers.joined import live_workers
from .peers.peers import Peers
from .peers.service import PeerHandlers, PeerService
from .ports import PORT_REMEDIES, check_ports
from .requests.flow import Flow

_INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
_GRPC_OPTIONS = (
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
)
_INTERNAL_OPTIONS = (
    *_GRPC_OPTIONS,
    ("grpc.so_reuseport", 0),  # a second router on the port must fail, not share it silently
    ("grpc.max_concurrent_streams", 4096),
    ("grpc.server_handshake_timeout_ms", 5_000),
)
_CLIENTS_OPTIONS = (
    *_GRPC_OPTIONS,
    ("grpc.max_allowed_incoming_connections", 4096),
    ("grpc.server_handshake_timeout_ms", 5_000),
    ("grpc.max_connection_idle_ms", 60_000),  # without a call; clients reconnect by themselves
    ("grpc.keepalive_time_ms", 30_000),  # detects clients that vanished without closing
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.max_metadata_size", 8 << 10),
    ("grpc.absolute_max_metadata_size", 16 << 10),
    ("grpc.http2.lookahead_bytes", 16 << 10),  # buffered per stream that is not read yet
    ("grpc.http2.bdp_probe", 0),  # with probes these windows would grow to megabytes
)
JOIN_S = 5.0  # a router that starts beside others waits for their workers: each announces itself every 2 s at least
LAST_READ_S = 2.0  # for clients to read what a stopping router has sent
ACCEPTS = 2  # connections that the event loop accepts per turn (asyncio's `backlog`)
BACKLOG = 2048  # connections that wait in the system to be accepted


class RouterProcess:
    """One router: `start` it, `stop` it. Ports are those of the settings."""

    def __init__(
        self,
        settings: RouterConfig,
        cluster_key: str,
        *,
        reads_defaults: bool = True,
        tls: TlsConfig | None = None,
        sources: Sequence[AddressSource] = (),
    ) -> None:
        """`reads_defaults`: whether a checkpoint's sampling defaults count (model.generation_config).

        `sources`: of other routers beyond router.peers, without this one.

        `tls`: certificates for the links to workers (cluster.tls); None: these links are not encrypted.

        Raises:
            ConfigError: a certificate cannot be read, or is not valid for a router now.
        """
        self.fault: DeviceFault | None = None  # always: a router computes on no device
        self.ended = asyncio.Event()  # the HTTP server has ended, by `stop` or by its own fault
        self._settings = settings
        self._tls = TlsIdentity(tls, Caller.ROUTER) if tls else None
        proof = proof_key(cluster_key)
        self._flow = Flow(settings, identity_key(cluster_key), proof_key=proof, tls=self._tls)
        self._peers = Peers(settings.peers, proof, self._tls, sources)
        if sources:
            board = Board(self._flow.metrics.registry, (), lambda: count_sources(board, sources))
        self._front = Frontend(settings, self._flow, self._peers, reads_defaults=reads_defaults)
        if settings.journal_url is not None:
            self._front.use_store(settings.journal_url, journal_key(cluster_key))
        self._guard = Guard(settings, self._front.authenticate, (_INFERENCE, KSERVE), self._front.room)
        self._health = health.aio.HealthServicer()
        self._servers: list[grpc.aio.Server] = []
        self._clients: grpc.aio.Server | None = None  # of them, the one for clients
        self._connections: Connections | None = None
        self._http: uvicorn.Server | None = None
        self._http_task: asyncio.Task[None] | None = None

    @property
    def readiness(self) -> str:
        """One line for the operator: the addresses, and where workers announce themselves."""
        settings = self._settings
        scheme = "https" if settings.ssl_certfile else "http"
        return (
            f"router is ready: HTTP at {scheme}://{target(settings.host, settings.port)}, gRPC at "
            f"{target(settings.host, settings.grpc_port)}; it waits for workers at "
            f"{target(settings.internal_host, settings.internal_port)}"
        )

    async def start(self) -> None:
        """Bind all ports, then serve.

        Raises:
            ConfigError: a port is in use; the message names it.
        """
        settings = self._settings
        num_files = raise_file_limit()
        check_ports(settings)  # all of them before any is bound
        host = bindable_host(settings.host, "router.host", insecure=settings.may_be_public)
        face = None
        if settings.ssl_certfile:
            face = FaceTls(settings.ssl_certfile, settings.ssl_keyfile, settings.ssl_ca_certs)
        is_safe = settings.insecure or self._tls is not None
        inside = bindable_host(settings.internal_host, "router.internal_host", insecure=is_safe)
        listener = bound_socket(host, settings.port, PORT_REMEDIES["port"], shared=settings.shared_ports)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await self._flow.start()
        self._front.keys.start()
        self._peers.start()
        inner = self._tls.server_credentials() if self._tls else None
        internal = self._flow.internal_server(_INTERNAL_OPTIONS)
        peers_pb2_grpc.add_PeersServicer_to_server(PeerService(self._for_peers()), internal)
        await self._serve(internal, inside, "internal_port", inner)
        await self._hear_workers()
        options = [
            *_CLIENTS_OPTIONS,
            # 0: a second router on the port must fail, not share it silently. 1: gRPC sets SO_REUSEPORT itself.
            ("grpc.so_reuseport", int(settings.shared_ports)),
            ("grpc.max_receive_message_length", settings.max_body_bytes),
            ("grpc.max_concurrent_streams", settings.max_running + SPARE_CALLS),  # of one connection: more wait there
        ]
        clients = grpc.aio.server(interceptors=[self._guard], options=options)
        inference_pb2_grpc.add_InferenceServicer_to_server(InferenceService(self._front), clients)
        clients.add_generic_rpc_handlers((KserveService(self._front, strict=settings.strict).handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, clients)
        reflection.enable_server_reflection((_INFERENCE, health.SERVICE_NAME, reflection.SERVICE_NAME), clients)
        self._clients = clients
        await self._serve(clients, host, "grpc_port", face.grpc_credentials() if face else None)
        for service in ("", _INFERENCE):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        most = connections_within(settings.max_connections, num_files)
        connections = Connections(most, settings.slow_client_s, running_tiers(), face.http_context() if face else None)
        config = uvicorn.Config(
            make_app(settings, self._front),
            http=cast(Any, connections.protocol),
            ws="none",
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_keep_alive=75,
            backlog=ACCEPTS,
        )
        self._connections = connections
        connections.pace([listener.fileno()])
        self._http = _HttpServer(config)
        self._http_task = asyncio.create_task(self._http.serve([listener]))
        self._http_task.add_done_callback(lambda _: self.ended.set())

    async def stop(self, grace_s: float) -> None:
        """Refuse new requests, let the running ones end within `grace_s`, then close all servers and connections."""
        await self._health.enter_graceful_shutdown()
        leaving = asyncio.create_task(self._leave_ports(grace_s))
        await self._flow.drain(grace_s)
        await self._front.leave()
        await self._flow.close()
        await self._front.close()
        await self._front.keys.close()
        if self._http and self._http_task:
            self._http.should_exit = True
            if self._connections:
                self._connections.close_handshakes()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await asyncio.shield(self._http_task)
            self._http.force_exit = True
            with contextlib.suppress(TimeoutError, asyncio.CancelledError):
                async with asyncio.timeout(1.0):
                    await self._http_task
        # All requests are over, and a client may still be reading the end of one.
        graces = [LAST_READ_S if server is self._clients else 0.5 for server in self._servers]
        stopping = (server.stop(grace) for server, grace in zip(self._servers, graces, strict=True))
        await asyncio.gather(*stopping, self._peers.close())
        await leaving
        self._guard.close()
        self._front.grammars.close()

    async def _leave_ports(self, grace_s: float) -> None:
        """Listen no more on ports that other routers share, so that they take all new connections meanwhile."""
        if self._settings.shared_ports and self._http is not None and self._clients is not None:
            if self._connections is not None:
                self._connections.pace([])
            for listening in getattr(self._http, "servers", ()):  # it has none before it has started
                listening.close()
            await self._clients.stop(grace_s)  # its connections are told to go; their calls run on

    async def _hear_workers(self) -> None:
        """Before clients come, wait for the workers that the other routers have, for at most `JOIN_S`.

        The kernel deals connections out to every router that listens, so one without workers would refuse its share.
        """
        loop = asyncio.get_running_loop()
        end_s = loop.time() + JOIN_S
        expected = {name for report in await self._peers.reports() for name in live_workers(report)}
        while not expected <= live_workers(self._flow.cluster()) and loop.time() < end_s:
            await self._flow.members.wait_for_change(end_s - loop.time())

    def _for_peers(self) -> PeerHandlers:
        front, flow = self._front, self._flow
        return PeerHandlers(
            flow.router_id,
            front.explain_here,
            front.abort_here,
            self._report,
            front.metrics_here,
            front.streams,
            front.resumables.forget_here,
        )

    def _report(self) -> dict[str, Any]:
        """`Frontend.report` for the other routers, which may ask before this one is open for clients."""
        report = self._front.report()
        if self._http is None or not self._http.started:
            report["router"]["state"] = "starting"
        return report

    async def _serve(
        self, server: grpc.aio.Server, host: str, name: str, credentials: grpc.ServerCredentials | None = None
    ) -> None:
        settings = self._settings
        port = getattr(settings, name)
        try:
            add_port(server, target(host, port), credentials)
        except RuntimeError as error:
            is_shared = settings.shared_ports and name == "grpc_port"
            check_port(host, port, PORT_REMEDIES[name], shared=is_shared)  # raises with the reason, if it finds one
            raise ConfigError(f"port {port} cannot be bound: {error}") from None
        await server.start()
        self._servers.append(server)


def prepared_loop() -> asyncio.AbstractEventLoop:
    """The event loop of a router, with two tiers of events, in a process that is prepared for it."""
    give_large_memory_back()
    switch_often()
    return TieredLoop()


def run_router(process: RouterProcess, grace_s: float, parent_pid: int | None = None) -> None:
    """Main function of a router process: serve until SIGTERM, SIGINT or the parent's death, then drain.

    Raises:
        SystemExit: with 1, if the HTTP server ended by its own fault.
    """
    with asyncio.Runner(loop_factory=prepared_loop) as runner:
        runner.run(_run(process, grace_s, parent_pid))


async def _run(process: RouterProcess, grace_s: float, parent_pid: int | None) -> None:
    stop = Stop()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.hear, number)
    try:
        await process.start()
    except BaseException:
        await process.stop(0.0)
        raise
    if parent_pid is None:  # started by hand, or by a system that keeps the output
        print(process.readiness, file=sys.stderr, flush=True)
    keep_present_objects()
    await first(process.ended.wait(), stop.asked.wait(), orphaned(parent_pid))
    is_broken = process.ended.is_set()
    try:
        await unless(stop.asked_again, process.stop(0.0 if is_broken else grace_s))
    except Stopped:
        leave(stop.exit_code)
    if is_broken:
        raise SystemExit(1)


class _HttpServer(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen with a backlog larger than the number of connections accepted per turn."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(BACKLOG)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave signals to the process: uvicorn must not handle them."""
        yield
