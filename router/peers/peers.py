"""Client of the other routers of a cluster: asks all of them at once, with a deadline. Knows no request, no worker."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import grpc
import grpc.aio

from ...core.inside import InsideChannel
from ...core.tls.callers import Caller
from ...core.tls.identity import TlsIdentity
from ...kv.handover.transports.grpc import CHANNEL_OPTIONS
from ...protos import peers_pb2, peers_pb2_grpc

log = logging.getLogger(__name__)

ANSWER_S = 1.0  # a router that does not answer within this time is left out
MAX_ANSWER_BYTES = 16 << 20

Reply = TypeVar("Reply")
_FAILURES = (grpc.RpcError, grpc.aio.UsageError, grpc.aio.InternalError, TimeoutError)


class Peers:
    """The other routers, by the host:port of their internal ports. Without any, every answer is empty."""

    def __init__(self, addresses: Sequence[str], key: bytes, tls: TlsIdentity | None = None) -> None:
        """`key`: kv.keys.proof_key, the same as theirs; `tls`: our certificates. Connects at the first question."""
        self._addresses = tuple(addresses)
        self._key = key
        self._tls = tls
        self._channels: dict[str, InsideChannel] = {}

    def __len__(self) -> int:
        return len(self._addresses)

    async def explain(self, tenant: str, request_id: str) -> dict[str, Any] | None:
        """The report about a tenant's request of the first router that knows it; None: none does."""
        asked = peers_pb2.PeerRequest(tenant=tenant, request_id=request_id)
        for reply in await self._ask_all(lambda stub: stub.Explain(asked, timeout=ANSWER_S)):
            if reply.json and (report := _json_object(reply.json)) is not None:
                return report
        return None

    async def abort(self, tenant: str, request_id: str) -> bool:
        """Cancel a tenant's running request wherever it is. False: no router has it."""
        asked = peers_pb2.PeerRequest(tenant=tenant, request_id=request_id)
        return any(reply.found for reply in await self._ask_all(lambda stub: stub.Abort(asked, timeout=ANSWER_S)))

    async def reports(self) -> list[dict[str, Any]]:
        """The reports of all routers that answer, in the order of their addresses."""
        question = peers_pb2.PeerQuestion()
        replies = await self._ask_all(lambda stub: stub.Report(question, timeout=ANSWER_S))
        return [report for reply in replies if (report := _json_object(reply.json)) is not None]

    async def metrics(self) -> list[tuple[str, str]]:
        """Name and metrics (OpenMetrics text) of all routers that answer."""
        question = peers_pb2.PeerQuestion()
        replies = await self._ask_all(lambda stub: stub.Metrics(question, timeout=ANSWER_S))
        return [(reply.router_id, reply.text) for reply in replies]

    async def close(self) -> None:
        """Close all connections."""
        channels, self._channels = list(self._channels.values()), {}
        await asyncio.gather(*(channel.close() for channel in channels), return_exceptions=True)

    async def _ask_all(self, ask: Callable[[Any], Awaitable[Reply]]) -> list[Reply]:
        replies = await asyncio.gather(*(self._ask(address, ask) for address in self._addresses))
        return [reply for reply in replies if reply is not None]

    async def _ask(self, address: str, ask: Callable[[Any], Awaitable[Reply]]) -> Reply | None:
        channel = self._channels.get(address)
        if channel is None:
            options = [*CHANNEL_OPTIONS, ("grpc.max_receive_message_length", MAX_ANSWER_BYTES)]
            channel = InsideChannel(address, self._key, options, self._tls, Caller.ROUTER)
            self._channels[address] = channel
        stub: Any = peers_pb2_grpc.PeersStub(channel)
        try:
            async with asyncio.timeout(ANSWER_S + 0.5):  # also for the proof of its answer
                return await ask(stub)
        except _FAILURES as error:
            log.debug("router at %s: no answer: %s", address, error)
            return None


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
