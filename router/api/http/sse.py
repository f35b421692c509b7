"""Event streams to HTTP clients, which end as soon as the client leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from ....core.errors import Cancelled

T = TypeVar("T")

PART_ITEMS = 64  # items of a list that are encoded at once, each with about twenty likely tokens

# Characters that JSON allows unescaped, but that end a line for readers with Unicode line splitting.
_LINE_END = re.compile("[\x85\u2028\u2029]")


def to_json(value: Any) -> bytes:
    """Encode a value as JSON on one line, for every definition of a line end.

    A lone surrogate, which UTF-8 cannot encode, becomes its JSON escape: an error may name what a client sent.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _LINE_END.sub(lambda end: f"\\u{ord(end[0]):04x}", text).encode("utf-8", "backslashreplace")


def to_json_in_parts(value: Any) -> bytes:
    """Encode a long value in parts, so that none holds the interpreter for long; call it outside the event loop."""
    if isinstance(value, dict):
        return b"{%s}" % b",".join(to_json(name) + b":" + to_json_in_parts(inner) for name, inner in value.items())
    if isinstance(value, list) and len(value) > PART_ITEMS:
        parts = (value[start : start + PART_ITEMS] for start in range(0, len(value), PART_ITEMS))
        return b"[%s]" % b",".join(to_json(part)[1:-1] for part in parts)
    if isinstance(value, list):
        return b"[%s]" % b",".join(map(to_json_in_parts, value))
    return to_json(value)


def event(value: Any, event_id: str | None = None) -> bytes:
    """Encode one server-sent event; `event_id`: what clients send back as Last-Event-ID."""
    head = b"" if event_id is None else b"id: %s\n" % event_id.encode()
    return head + b"data: " + to_json(value) + b"\n\n"


class JsonAnswer(JSONResponse):
    """JSON response, from a value or from its encoded bytes."""

    def render(self, content: Any) -> bytes:
        """Encode the content with `to_json`, unless it is encoded already."""
        return content if isinstance(content, bytes) else to_json(content)


class EventStream(Response):
    """A text/event-stream over an async generator, closed when the client leaves or reads nothing for `stall_s`.

    `source`: generator behind the events. It is closed too, because closing events that never began does not close it.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        headers: dict[str, str],
        stall_s: float,
        source: AsyncGenerator[Any, None] | None = None,
    ) -> None:
        super().__init__(headers=headers | {"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.headers["content-type"] = "text/event-stream; charset=utf-8"
        self._events = events
        self._source = source
        self._stall_s = stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until they end or the client leaves."""
        sending = asyncio.create_task(self._send(send))
        leaving = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            sending.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):  # OSError: the socket closed, or stalls
                await sending
            await self._events.aclose()
            if self._source is not None:
                await self._source.aclose()

    async def _send(self, send: Send) -> None:
        async with asyncio.timeout(self._stall_s):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events:
            async with asyncio.timeout(self._stall_s):
                await send({"type": "http.response.body", "body": event, "more_body": True})
        async with asyncio.timeout(self._stall_s):
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def until_disconnect(http: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
    """Run `work`; cancel it when the client leaves first.

    Raises:
        Cancelled: the client left. The error goes to the log only.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnected(http.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Cancelled("the client closed the connection")
        return working.result()
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await working


async def _disconnected(receive: Receive) -> None:
    """Wait until the connection is closed. The body must have been read already."""
    while (await receive())["type"] != "http.disconnect":
        pass
