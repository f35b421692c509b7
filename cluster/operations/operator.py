"""Calls to workers and routers that only who manages the cluster may make. Knows no process and decides nothing."""

from __future__ import annotations

import grpc.aio

from ...core.errors import Unavailable
from ...core.inside import InsideChannel
from ...core.request import Role
from ...core.tls.callers import Caller
from ...core.tls.config import TlsConfig
from ...core.tls.identity import TlsIdentity
from ...kv.keys import proof_key
from ...kv.messages import role_to_wire
from ...protos import worker_pb2, worker_pb2_grpc

CALL_S = 5.0  # for an answer that waits for nothing; what remains of a drain's call after its own deadline


class Operator:
    """The cluster's key, and an operator's certificate where the links inside have certificates."""

    def __init__(self, key: str, tls: TlsConfig | None) -> None:
        self._key = proof_key(key)
        self._tls = tls

    async def set_role(self, address: str, role: Role) -> None:
        """Give a worker another role.

        Raises:
            Unavailable: it did not answer, the keys differ, or it refuses our certificate.
            ConfigError: there is no valid certificate of an operator.
        """
        async with self._channel(address) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            try:
                await stub.SetRole(worker_pb2.SetRoleRequest(role=role_to_wire(role)), timeout=CALL_S)
            except grpc.aio.AioRpcError as error:
                raise Unavailable(f"the worker at {address} did not change its role: {error.details()}") from None

    async def drain(self, address: str, timeout_s: float) -> int:
        """Have a worker take no new work, and wait until it has none; what runs at the timeout is cancelled there.

        Routers let cancelled streams go on at other workers. Returns the number of those.

        Raises:
            Unavailable, ConfigError: as for `set_role`.
        """
        async with self._channel(address) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            request = worker_pb2.DrainRequest(timeout_ms=round(timeout_s * 1000))
            try:
                response = await stub.Drain(request, timeout=timeout_s + CALL_S)
            except grpc.aio.AioRpcError as error:
                raise Unavailable(f"the worker at {address} does not drain: {error.details()}") from None
        return int(response.cancelled)

    async def undrain(self, address: str) -> None:
        """Have a worker that drains take new work again.

        Raises:
            Unavailable, ConfigError: as for `set_role`; or it ends already.
        """
        async with self._channel(address) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            try:
                await stub.Undrain(worker_pb2.UndrainRequest(), timeout=CALL_S)
            except grpc.aio.AioRpcError as error:
                raise Unavailable(f"the worker at {address} drains on: {error.details()}") from None

    async def report(self, router: str, report: worker_pb2.SupervisorReport) -> None:
        """Tell a router (host:port of its internal port) what the supervisor wants.

        Raises:
            Unavailable, ConfigError: as for `set_role`.
        """
        async with self._channel(router, Caller.ROUTER) as channel:
            stub = worker_pb2_grpc.AnnounceStub(channel)
            try:
                await stub.Report(report, timeout=CALL_S)
            except grpc.aio.AioRpcError as error:
                raise Unavailable(f"the router at {router} takes no report: {error.details()}") from None

    def _channel(self, address: str, callee: Caller = Caller.WORKER) -> InsideChannel:
        tls = TlsIdentity(self._tls, Caller.OPERATOR) if self._tls else None
        return InsideChannel(address, self._key, tls=tls, callee=callee)
