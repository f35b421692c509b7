"""Server of the Peers service: answers the other routers from this router's own knowledge. Holds no logic."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from ...core.errors import TwostrokeError
from ...kv.messages import error_to_wire
from ...protos import peers_pb2, peers_pb2_grpc
from ..journal.merged import merged
from ..journal.streams import ResumableStreams
from ..journal.wire import asked_to_wire, piece_to_wire


@dataclass(frozen=True, slots=True)
class PeerHandlers:
    """Answers of this router alone; none of them asks another router."""

    router_id: str
    explain: Callable[[str, str], dict[str, Any] | None]  # of tenant and client's request id
    abort: Callable[[str, str], Awaitable[bool]]  # of the same
    report: Callable[[], dict[str, Any]]  # GET /v1/cluster
    metrics: Callable[[], str]  # OpenMetrics text
    streams: ResumableStreams
    forget: Callable[[str, str], Awaitable[bool]]  # of tenant and client's request id


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

    async def Follow(self, request: peers_pb2.PeerRequest, context: Any) -> AsyncIterator[peers_pb2.JournalItem]:
        """All of a resumable request, as it goes on, or what there is of it now."""
        streams = self._handlers.streams
        entry = streams.journal.find(request.tenant, request.request_id)
        if entry is None or streams.is_leaving:
            return
        yield peers_pb2.JournalItem(request=asked_to_wire(entry.asked), num_proven=entry.num_proven)
        if request.so_far:
            for piece in merged(entry.pieces):
                yield peers_pb2.JournalItem(piece=piece_to_wire(piece))
            if entry.error is not None:
                yield peers_pb2.JournalItem(error=error_to_wire(entry.error))
            elif entry.is_over:
                yield peers_pb2.JournalItem(over=True)
            return
        try:
            async with contextlib.aclosing(streams.read(entry)) as pieces:
                async for piece in pieces:
                    yield peers_pb2.JournalItem(piece=piece_to_wire(piece))
        except TwostrokeError as error:
            yield peers_pb2.JournalItem(error=error_to_wire(error))

    async def Forget(self, request: peers_pb2.PeerRequest, context: Any) -> peers_pb2.PeerFound:
        """Delete a resumable request here."""
        return peers_pb2.PeerFound(found=await self._handlers.forget(request.tenant, request.request_id))

    async def FindKey(self, request: peers_pb2.PeerKey, context: Any) -> peers_pb2.JournaledKey:
        """The request of a tenant's Idempotency-Key; empty if it is not known here."""
        entry = self._handlers.streams.journal.find_key(request.tenant, request.key)
        if entry is None:
            return peers_pb2.JournaledKey()
        return peers_pb2.JournaledKey(request_id=entry.asked.request.request_id, fingerprint=entry.asked.fingerprint)

    async def Metrics(self, request: peers_pb2.PeerQuestion, context: Any) -> peers_pb2.PeerText:
        """All metrics of this router."""
        return peers_pb2.PeerText(router_id=self._handlers.router_id, text=self._handlers.metrics())
