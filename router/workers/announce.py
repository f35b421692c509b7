"""Server of the Announce service, on which workers announce themselves. Knows no request and no session."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from ...core.errors import InvalidRequest
from ...protos import worker_pb2, worker_pb2_grpc
from ..routing.facts import WorkerFacts, WorkerKey
from .wire import worker_from_wire


@dataclass(frozen=True, slots=True)
class AnnounceHandlers:
    """Callbacks of the service to its owner, on the event loop."""

    announced: Callable[[WorkerFacts], None]  # every announcement of a worker that does not leave
    leaving: Callable[[WorkerKey], None]
    ended: Callable[[WorkerKey], None]  # the last of its streams ended
    reported: Callable[[worker_pb2.SupervisorReport], None]


class AnnounceService(worker_pb2_grpc.AnnounceServicer):
    """One stream per worker process; answers every announcement with this router's id."""

    def __init__(self, router_id: str, incarnation: int, handlers: AnnounceHandlers) -> None:
        self._router_id = router_id
        self._incarnation = incarnation
        self._handlers = handlers
        self._streams: Counter[WorkerKey] = Counter()

    async def Announce(
        self,
        request_iterator: AsyncIterator[worker_pb2.Announcement],
        context: grpc.aio.ServicerContext[worker_pb2.Announcement, worker_pb2.AnnounceReply],
    ) -> AsyncIterator[worker_pb2.AnnounceReply]:
        """Serve a worker's announcements until its stream ends."""
        facts: WorkerFacts | None = None
        try:
            async for message in request_iterator:
                try:
                    facts = self._who(message, facts)
                except InvalidRequest as error:
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.message)
                if not message.leaving or message.HasField("worker"):  # a leaving worker may say why
                    self._handlers.announced(facts)
                if message.leaving:
                    self._handlers.leaving(facts.key)
                yield worker_pb2.AnnounceReply(
                    router_id=self._router_id, router_incarnation=self._incarnation, sequence=message.sequence
                )
        finally:
            if facts is not None:
                self._forget(facts.key)

    async def Report(self, request: worker_pb2.SupervisorReport, context: Any) -> worker_pb2.SupervisorReportReply:
        """Take the supervisor's report."""
        self._handlers.reported(request)
        return worker_pb2.SupervisorReportReply()

    def _who(self, message: worker_pb2.Announcement, known: WorkerFacts | None) -> WorkerFacts:
        if not message.HasField("worker"):
            if known is None:
                raise InvalidRequest("the first announcement must say who the worker is", param="worker")
            return known
        facts = worker_from_wire(message.worker)
        if known is None:
            self._streams[facts.key] += 1
        elif facts.key != known.key:
            raise InvalidRequest("a worker cannot become another one on its stream", param="worker")
        return facts

    def _forget(self, key: WorkerKey) -> None:
        self._streams[key] -= 1
        if not self._streams[key]:
            del self._streams[key]
            self._handlers.ended(key)
