"""What the handlers of all dialects share: a body becomes a request that runs. Holds no logic of a dialect."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ....core.errors import InternalError, TwostrokeError
from ...config import RouterConfig
from ...requests.pieces import OutputDelta
from ..call import GenerateCall
from ..frontend import Frontend
from ..http.callers import caller_of
from ..http.sse import EventStream, until_disconnect
from ..running.started import Started

log = logging.getLogger(__name__)

T = TypeVar("T")
Values = dict[str, Any]
Handler = Callable[[HttpRequest], Awaitable[Response]]


class DialectRoute(NamedTuple):
    """A path of a dialect."""

    path: str
    handler: Handler
    method: str


class Reads(Protocol):
    """Reads and checks a body within the limits of the server, and notes its fields without effect."""

    async def read(self, http: HttpRequest, parse: Callable[[Values], tuple[T, list[str]]]) -> T:
        """The checked body. Raises the errors of the door, of the reading, and of `parse`."""
        ...

    def note_ignored(self, http: HttpRequest, names: Sequence[str]) -> None:
        """Name fields without effect in the response."""
        ...


class Writer(Protocol):
    """Writes a stream in the form of a dialect. Each part is bytes; empty: there is nothing to say."""

    def begin(self) -> bytes:
        """What stands before the first piece."""
        ...

    def piece(self, piece: OutputDelta) -> bytes:
        """What a piece adds."""
        ...

    def end(self) -> bytes:
        """What stands behind the last piece."""
        ...

    def error(self, error: TwostrokeError) -> bytes:
        """The end of a stream that failed."""
        ...


@dataclass(frozen=True, slots=True)
class Door:
    """Starts requests of the dialects."""

    config: RouterConfig
    front: Frontend
    reads: Reads

    async def start(self, http: HttpRequest, call: GenerateCall, name: str, their_names: Mapping[str, str]) -> Started:
        """Run a call up to its first piece, under the name `name`. Raises the errors of `Frontend.start_list`.

        `their_names`: the dialect's names of fields without effect, by OpenAI's, where they differ.
        """
        http.state.request_id = name  # also for errors: `explain` knows the request by it
        starting = self.front.start_list(name, [self.timed(http, call)], caller_of(http).arrived_s)
        started = await until_disconnect(http, starting)
        names = started.request.ignored_fields
        self.reads.note_ignored(http, [their_names.get(name, name) for name in names])
        return started

    def timed(self, http: HttpRequest, call: GenerateCall) -> GenerateCall:
        """The call with its caller's deadline."""
        timeout_s = caller_of(http).timeout_s
        return call if timeout_s is None else replace(call, timeout_s=timeout_s)

    def stream(self, started: Started, writer: Writer, content_type: str) -> Response:
        """The response that gives out a request's pieces as they come."""
        response = EventStream(_written(started, writer), {}, self.config.slow_client_s, source=started.rest)
        response.headers["content-type"] = content_type
        return response

    async def collect(self, http: HttpRequest, started: Started, take: Callable[[OutputDelta], None]) -> None:
        """Take all pieces of a request; the client's leaving ends it. Raises the error that ends the request."""
        try:
            await until_disconnect(http, _taken(started, take))
        except BaseException:
            await started.rest.aclose()  # of a request whose pieces nobody began to take
            raise


async def _taken(started: Started, take: Callable[[OutputDelta], None]) -> None:
    pieces = started.pieces()
    try:
        async for piece in pieces:
            take(piece)
    finally:
        await pieces.aclose()


async def _written(started: Started, writer: Writer) -> AsyncGenerator[bytes, None]:
    """Yield the parts of a stream; an error in it becomes its last part."""
    pieces = started.pieces()
    try:
        if begun := writer.begin():
            yield begun
        async for piece in pieces:
            if written := writer.piece(piece):
                yield written
        yield writer.end()
    except TwostrokeError as error:
        yield writer.error(error)
    except Exception:
        log.exception("request %s failed within its stream", started.request.request_id)
        yield writer.error(InternalError("the request failed; the router's log has more"))
    finally:
        await pieces.aclose()
