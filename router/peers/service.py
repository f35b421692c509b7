"""Server of the Peers service: answers the other routers from this router's own knowledge. Holds no logic."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from ...protos import peers_pb2, peers_pb2_grpc


@dataclass(frozen=True, slots=True)
class PeerHandlers:
    """Answers of this router alone; none of them asks another router."""

    router_id: str
    explain: Callable[[str, str], dict[str, Any] | None]  # of tenant and client's request id
    abort: Callable[[str, str], Awaitable[bool]]  # of the same
    report: Callable[[], dict[str, Any]]  # GET /v1/cluster
    metrics: Callable[[], str]  # OpenMetrics text


class PeerService(peers_pb2_grpc.PeersServicer):
    """One per router, on its internal port, behind its guard."""

    def __init__(self, handlers: PeerHandlers) -> None:
        self._handlers = handlers

    async def Explain(self, request: peers_pb2.PeerRequest, context: Any) -> peers_pb2.PeerJson:
        """Report about a tenant's request; empty if it is not known here."""
        report = self._handlers.explain(request.tenant, request.request_id)
        return peers_pb2.PeerJson(json="" if report is None else json.dumps(report))

    async def Abort(self, request: peers_pb2.PeerRequest, context: Any) -> peers_pb2.PeerFound:
        """Cancel a tenant's running request."""
        return peers_pb2.PeerFound(found=await self._handlers.abort(request.tenant, request.request_id))

    async def Report(self, request: peers_pb2.PeerQuestion, context: Any) -> peers_pb2.PeerJson:
        """Report about the cluster as this router sees it."""
        return peers_pb2.PeerJson(json=json.dumps(self._handlers.report()))

    async def Metrics(self, request: peers_pb2.PeerQuestion, context: Any) -> peers_pb2.PeerText:
        """All metrics of this router."""
        return peers_pb2.PeerText(router_id=self._handlers.router_id, text=self._handlers.metrics())
