"""What both faces do with a call: find the model, validate, run. Knows no protocol."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from ..core.errors import Overloaded
from ..core.request import Request
from ..core.timeline import Instant, Timeline
from .call import Call
from .config import RouterConfig
from .flow import Flow
from .models import ModelDirectory, ServedModel
from .pieces import Piece
from .validate import Limits, authenticate, validate


@dataclass(frozen=True, slots=True)
class Started:
    """A request under way. `first` is there already: whatever could be refused has been."""

    request: Request
    model: ServedModel
    first: Piece
    rest: AsyncGenerator[Piece, None]

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """All pieces in order. Closing it cancels the request."""
        try:
            yield self.first
            async for piece in self.rest:
                yield piece
        finally:
            await self.rest.aclose()


class Front:
    """The door behind the doors: one per router process."""

    def __init__(self, config: RouterConfig, flow: Flow, *, reads_defaults: bool = True) -> None:
        """`reads_defaults`: see `ModelDirectory`."""
        self.flow = flow
        self.limits = Limits.of(config)
        self.models = ModelDirectory(flow, reads_defaults=reads_defaults)
        self._max_reading = config.max_running
        self._num_reading = 0  # calls between their body and admission

    def authenticate(self, api_key: str | None) -> str:
        """The isolation domain of a key. Raises Unauthenticated."""
        return authenticate(api_key, self.limits)

    def explain(self, request_id: str, domain: str) -> dict[str, Any] | None:
        """What is known of a request, for its own tenant only; None: nothing (any more)."""
        explained = self.flow.explain(request_id)
        return explained if explained is not None and explained["isolation_domain"] == domain else None

    async def abort(self, request_id: str, domain: str) -> bool:
        """Cancel a tenant's own running request. False: it has none of that name."""
        return self.explain(request_id, domain) is not None and await self.flow.abort(request_id)

    async def admit(self, call: Call) -> tuple[Request, ServedModel]:
        """Validate and tokenise a call.

        Raises:
            InvalidRequest and its kin, Unauthenticated, Unavailable: see router/validate.py and router/models.py.
            Overloaded: as many calls as may run are being read already.
        """
        self.authenticate(call.api_key)  # before anything is told about models
        if self._num_reading >= self._max_reading:
            raise Overloaded(f"{self._num_reading} requests are being read, the most that are", retry_after_s=1.0)
        self._num_reading += 1
        try:
            model = await self.models.get(call.model)
            return await asyncio.to_thread(validate, call, model, self.limits), model
        finally:
            self._num_reading -= 1

    async def start(self, call: Call) -> Started:
        """Admit a call and run it up to its first piece.

        Raises:
            TwostrokeError: whatever `admit` or `Flow.generate` refuse it for.
        """
        timeline = Timeline()
        timeline.mark(Instant.ARRIVED, self.flow.clock.now_s())
        request, model = await self.admit(call)
        pieces = self.flow.generate(request, timeline)
        try:
            first = await anext(pieces)
        except BaseException:
            await pieces.aclose()
            raise
        return Started(request, model, first, pieces)
