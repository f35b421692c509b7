"""One HTTP connection within bounds: how long a head may take and be, and how long a client may read nothing.

The server under it times keep-alive only. Every connection here has one recurring look at its state; all bounds in time
are checked there. Knows no route and no body.

    idle     nothing of a request is here
    head     some of a request's line and headers are here
             (where there is no room, a slow head makes some, then the longest idle connection, then the longest head)
    body     the headers are here, and the application answers
    behind   the answer is complete, and the body is not: what still comes is thrown away
    ending   nothing more is answered; what the client still sends is read and thrown away, within bounds, for a socket
             that is closed over unread bytes takes the answer back from a client that has not read it yet

A client that closes its half of the connection has left, and its request is cancelled: whether it still reads can be
known only by writing, and an answer in one piece is written when all of it is computed.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

if TYPE_CHECKING:
    from .connections import Connections

FIRST_BYTE_S = 30.0  # a new connection's wait for the first byte of its first request
HEAD_S = 10.0  # from a head's first byte to its last
BODY_AFTER_ANSWER_S = 5.0  # for the rest of a body behind its answer
MAX_HEAD_BYTES = 32 << 10
MAX_THROWN_BYTES = 16 << 20  # behind the last answer of a connection: the rest of a body, a few times too large
MAX_THROWN_HEAD_BYTES = 1 << 20  # the rest of a head
MAX_HEADERS = 128
MAX_FRAMING_BYTES = 64 << 10  # of a chunked body besides its data: sizes, extensions, line ends
FRAMING_PER_BYTE = 8  # and for each byte of data, since chunks of one byte have six
RECEIVED_AT_ONCE = 64 << 10  # a connection that must wait holds this and the server's 64 KiB
MAX_PIPELINED = 16  # requests that wait for the answer to the one before
_WISHES = (b"upgrade", b"http2-settings")  # for another protocol


class Connection(HttpToolsProtocol):
    """One connection; adds bounds to the server's own protocol."""

    def __init__(self, connections: Connections, **known: Any) -> None:
        super().__init__(**known)
        self._among = connections
        self.is_lost = False
        self._in_head = False
        self._in_message = False
        self._head_bytes = 0
        self._num_headers = 0
        self._refusal = "400 Bad Request"
        self._has_spoken = False
        self._is_ending = False
        self._may_throw = MAX_THROWN_BYTES
        self._may_frame = MAX_FRAMING_BYTES
        self._asks_for_upgrade = False
        self._since_s = 0.0  # when the first byte, the head or the time behind the answer began
        self._unsent = 0  # bytes at the last look
        self._number = -1  # of the socket
        self._took_s = 0.0  # when the client last took some

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to look at the connection; refuse it where there is no room."""
        self._among.demote(transport)
        self._number = transport.get_extra_info("socket").fileno()
        if hasattr(transport, "max_size"):  # asyncio's own; other loops have no such setting
            transport.max_size = RECEIVED_AT_ONCE
        super().connection_made(transport)
        self._since_s = self._took_s = self.loop.time()
        self._among.look_later(self, self.loop)
        if not self._among.add(self):
            self._refuse("503 Service Unavailable")

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection counts no more."""
        self.is_lost = True
        self._among.forget_number(self._number)  # with TLS the socket is closed already
        self._unset_keepalive_if_required()
        self._among.remove(self)
        super().connection_lost(exc)

    @property
    def age_s(self) -> float:
        """Seconds since the first byte of the head, or since the connection became idle."""
        return self.loop.time() - self._since_s

    def give_up(self) -> None:
        """Close at once and drop unsent bytes."""
        self._among.remove(self)
        self.transport.abort()

    def look(self, now_s: float) -> None:
        """Close what has outlived a bound."""
        unsent = self.transport.get_write_buffer_size()
        if not unsent or not self._unsent or unsent < self._unsent:
            self._took_s = now_s
        self._unsent = unsent
        if now_s - self._took_s > self._among.stall_s:
            self.give_up()
        elif self._is_ending:
            if now_s - self._since_s > BODY_AFTER_ANSWER_S and not self._is_answering:
                self.transport.close()
        elif not self.transport.is_closing():
            self._look_at_request(now_s - self._since_s)

    def _look_at_request(self, age_s: float) -> None:
        if self._is_answering:
            return
        if self._in_message and not self._in_head:
            if age_s > BODY_AFTER_ANSWER_S:
                self.transport.close()
        elif self._in_head:
            if age_s > HEAD_S:
                self._refuse("408 Request Timeout")
        elif age_s > (self.timeout_keep_alive if self._has_spoken else FIRST_BYTE_S):
            self.transport.close()

    # ------------------------------------------------------------ what the client sends

    def data_received(self, data: bytes) -> None:
        """Feed the parser, within the bounds of a head."""
        if self.transport.is_closing():
            return
        if self._is_ending:
            self._throw_away(len(data))
            return
        self._unset_keepalive_if_required()
        if not self._in_message and not self._in_head:
            self._begin_head()
        elif self._in_message and not self._in_head:
            self._may_frame -= len(data)
            if not self._is_answering:
                self._throw_away(len(data))  # and parsed, for the next request
        try:
            self._feed(data)
        except httptools.HttpParserError:  # also errors that a callback raised
            self._refuse(self._refusal)
            return
        if self._may_frame < 0 and self._in_message and not self._is_ending:
            self._refuse("400 Bad Request")
        if self._in_head:  # one long header may not have come to a callback yet
            self._head_bytes += len(data)
            if self._head_bytes > 2 * MAX_HEAD_BYTES:
                self._refuse("431 Request Header Fields Too Large")

    def _throw_away(self, num_bytes: int) -> None:
        """A client that sends for ever what is not read takes time of this loop."""
        self._may_throw -= num_bytes
        if self._may_throw < 0:
            self.give_up()

    def _feed(self, data: bytes) -> None:
        """Parse. A request that asks for another protocol is answered in this one (RFC 9110, section 7.8).

        The parser takes the bytes behind such a head for the other protocol's. So a new parser reads the head without
        the wish, then the bytes behind it, which are the body. (Java's client asks for h2c by default.)
        """
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
                self._asks_for_upgrade = False
                head = _without_upgrade(self.parser, self.url, self.headers)
                self.parser = httptools.HttpRequestParser(self)
                self._begin_head()
                self.parser.feed_data(head)

    def _begin_head(self) -> None:
        self._in_head = self._has_spoken = True
        self._head_bytes = self._num_headers = 0
        self._may_throw = MAX_THROWN_BYTES
        self._may_frame = MAX_FRAMING_BYTES
        self._since_s = self.loop.time()
        if self._is_answering or self.pipeline:
            self._among.note_busy(self)
        else:
            self._among.note_head(self)

    def on_message_begin(self) -> None:
        """A request's first line begins."""
        if not self._in_head:
            self._begin_head()
        self._in_message = True
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Part of the path."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        self._num_headers += 1  # also those behind a chunked body
        self._count(len(name) + len(value))
        if name.lower() == b"transfer-encoding" and value.strip().lower() != b"chunked":
            raise ValueError("the parser would take all that follows for the body (RFC 9112, section 6.3)")
        super().on_header(name, value)

    def _count(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        if self._head_bytes > MAX_HEAD_BYTES or self._num_headers > MAX_HEADERS:
            self._refusal = "431 Request Header Fields Too Large"
            raise ValueError("the head is too large")

    def on_headers_complete(self) -> None:
        """The application is asked, unless too many requests wait already."""
        self._in_head = False
        self._among.note_busy(self)
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise ValueError("no tunnel begins here")
            self._asks_for_upgrade = True
            return
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError("too many requests wait for their answers")
        super().on_headers_complete()
        self.cycle.transport = cast(asyncio.Transport, _Answering(self))

    def on_body(self, body: bytes) -> None:
        """Data of the body."""
        self._may_frame += len(body) * (1 + FRAMING_PER_BYTE)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._in_message = False
        if self._asks_for_upgrade:
            return
        super().on_message_complete()
        self._settle()

    def on_response_complete(self) -> None:
        """The answer is whole; the request may not be."""
        super().on_response_complete()
        self._since_s = self.loop.time()
        if self._in_message:
            self._unset_keepalive_if_required()
        self._settle()

    def _settle(self) -> None:
        if self._is_answering or self.pipeline:
            return
        if self._is_ending:
            self._stop_writing()
        elif not self._in_message and not self._in_head:
            self._among.note_idle(self)

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def end(self) -> None:
        """All is answered: what still comes of this client is thrown away, for `BODY_AFTER_ANSWER_S` at most."""
        self._is_ending = True
        self.pipeline.clear()
        if self._in_message:
            self._stop_writing()
        else:
            self.transport.close()

    def _stop_writing(self) -> None:
        self._since_s = self.loop.time()
        self._among.note_idle(self)
        if self.transport.can_write_eof():
            with contextlib.suppress(OSError):  # the client has reset the connection, and the loop has not seen it yet
                self.transport.write_eof()
        self.flow.resume_reading()

    def _refuse(self, status: str) -> None:
        """One answer without a request, and the end; requests before it that wait for their answers get them first."""
        self._is_ending = True
        if self._in_head:
            self._may_throw = MAX_THROWN_HEAD_BYTES
        if self._is_answering and not self._takes_back():
            return
        body = b'{"error":{"message":"%s","type":"%s","param":null,"code":null}}' % (
            status[4:].encode(),
            b"server_error" if status.startswith("5") else b"invalid_request_error",
        )
        head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        head += "retry-after: 1\r\n" if status.startswith("503") else ""
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self._stop_writing()

    def _takes_back(self) -> bool:
        """End a request whose body is broken: the application sees that its client left. False: it answers already."""
        cycle = self.cycle
        if self._in_head or not self._in_message or self.pipeline or cycle.response_started:
            return False
        cycle.disconnected = cycle.response_complete = True
        cycle.message_event.set()
        return True


class _Answering:
    """The transport as one answer sees it: it closes the connection by its end."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def close(self) -> None:
        """The answer is complete and the connection not kept."""
        self._connection.end()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection.transport, name)


def _without_upgrade(parser: httptools.HttpRequestParser, url: bytes, headers: list[tuple[bytes, bytes]]) -> bytes:
    """The head that was parsed, without the wish for another protocol."""
    lines = [b"%s %s HTTP/%s" % (parser.get_method(), url, parser.get_http_version().encode())]
    for name, value in headers:
        if name == b"connection":
            kept = [
                token for token in value.split(b",") if token.strip().lower() not in (b"upgrade", b"http2-settings")
            ]
            lines += [b"connection: " + b",".join(kept)] if kept else []
        elif name not in _WISHES:
            lines.append(name + b": " + value)
    return b"\r\n".join(lines) + b"\r\n\r\n"
