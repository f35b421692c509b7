"""A call under way, as both APIs get it from the front end. Knows no protocol."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass

from ....core.request import Request
from ...journal.cursor import Track
from ...journal.journal import Asked
from ...requests.pieces import OutputDelta
from ..models import ServedModel


@dataclass(frozen=True, slots=True)
class Started:
    """A request under way, or a list of them. `first` has arrived, so no refusal can come any more."""

    requests: tuple[Request, ...]
    model: ServedModel
    first: OutputDelta
    rest: AsyncGenerator[OutputDelta, None]
    track: Track | None = None  # of a resumable one: the pieces begin with the first, also where it is resumed
    asked: Asked | None = None  # of a resumable one

    @property
    def request(self) -> Request:
        """The request, or the first of a list."""
        return self.requests[0]

    async def pieces(self) -> AsyncGenerator[OutputDelta, None]:
        """Yield all pieces in order. Closing the generator cancels the request."""
        try:
            yield self.first
            async for piece in self.rest:
                yield piece
        finally:
            await self.rest.aclose()
