"""Blocks.Keep: the call by which a decode worker has its blocks copied. Knows no engine; copies.py makes the copy."""

from __future__ import annotations

import asyncio

import grpc
from google.protobuf.message import DecodeError

from ...core.errors import InvalidRequest
from ...kv.handover.transports.grpc import ServerContext
from ...protos import handover_pb2
from .copies import Copies


class KeepService:
    """Keeps copies for other workers. The guard has checked before that the caller may ask."""

    def __init__(self, copies: Copies) -> None:
        self._copies = copies

    async def keep(self, request: bytes, context: ServerContext) -> bytes:
        """Handler of Blocks.Keep."""
        answer: asyncio.Future[handover_pb2.KeepReply] = asyncio.get_running_loop().create_future()

        def replied(reply: handover_pb2.KeepReply) -> None:
            if not answer.done():  # else the caller has left
                answer.set_result(reply)

        try:
            task = self._copies.begin(handover_pb2.KeepRequest.FromString(request), replied)
        except (DecodeError, InvalidRequest) as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            raise
        try:
            return (await answer).SerializeToString()
        finally:
            if task is not None:
                task.cancel()  # it matters only if the caller has left
