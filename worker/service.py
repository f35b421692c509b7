"""gRPC service Worker: passes every call to the part that answers it. Holds no logic."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc

from ..client.status import to_rpc_status
from ..core.errors import ConfigError, InvalidRequest, TwostrokeError
from ..kv.messages import role_from_wire
from ..protos import common_pb2, worker_pb2, worker_pb2_grpc

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from .process import WorkerProcess


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """Service of one worker for its routers."""

    def __init__(self, worker: WorkerProcess) -> None:
        self._worker = worker

    async def Session(self, _: Any, context: Any) -> None:  # type: ignore[override]
        """Serve one router: orders up, tokens down."""
        with self._worker.streams.running():
            await self._worker.faces.decode.session(context, self._worker.info())

    async def Describe(self, _: worker_pb2.DescribeRequest, context: Any) -> common_pb2.WorkerInfo:
        """This worker's info."""
        return self._worker.info()

    async def Watch(self, _: worker_pb2.WatchRequest, context: Any) -> AsyncIterator[worker_pb2.WatchEvent]:
        """Stream KV events and load reports."""
        with self._worker.streams.running():
            async for event in self._worker.faces.watchers.watch():
                yield event

    async def SetRole(self, request: worker_pb2.SetRoleRequest, context: Any) -> common_pb2.WorkerInfo:
        """Change the role; running work continues."""
        try:
            role = role_from_wire(request.role)
        except InvalidRequest as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        try:
            self._worker.set_role(role)
        except ConfigError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        return self._worker.info()

    async def LoadAdapter(self, request: worker_pb2.LoadAdapterRequest, context: Any) -> common_pb2.WorkerInfo:
        """Hold an adapter and serve it under a name."""
        try:
            await self._worker.adapters.load(
                request.name, request.path, request.digest, replace=request.replace, asked=True
            )
        except TwostrokeError as error:
            await context.abort_with_status(to_rpc_status(error))
        except Exception as error:  # files may be broken in ways that nobody has thought of
            log.exception("the adapter in %s could not be loaded", request.path[:200])
            broken = InvalidRequest(f"{request.path[:200]} cannot be loaded: {error!r}"[:500], param="lora_path")
            await context.abort_with_status(to_rpc_status(broken))
        return self._worker.info()

    async def UnloadAdapter(self, request: worker_pb2.UnloadAdapterRequest, context: Any) -> common_pb2.WorkerInfo:
        """Serve a name no longer."""
        try:
            self._worker.adapters.unload(request.name)
        except TwostrokeError as error:
            await context.abort_with_status(to_rpc_status(error))
        return self._worker.info()

    async def Drain(self, request: worker_pb2.DrainRequest, context: Any) -> worker_pb2.DrainResponse:
        """Refuse new work and let running work end until the timeout."""
        cancelled = await self._worker.drain(request.timeout_ms / 1000)
        if not self._worker.is_draining:
            await context.abort(grpc.StatusCode.ABORTED, "the drain was undone; the worker takes work again")
        return worker_pb2.DrainResponse(empty=cancelled == 0, cancelled=cancelled)

    async def Undrain(self, _: worker_pb2.UndrainRequest, context: Any) -> common_pb2.WorkerInfo:
        """Take new work again."""
        try:
            self._worker.undrain()
        except ConfigError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        return self._worker.info()
