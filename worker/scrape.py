"""HTTP port of a worker: GET /metrics for scrapers, /health, /livez and /readyz for probes. Knows no metric.

A small server without a web framework. All resources are bounded: the number of connections, and for each its bytes
and its seconds, also if a client writes slowly, reads slowly or sends nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Callable, Sequence
from hmac import compare_digest
from http import HTTPStatus

from ..core.errors import ConfigError
from ..core.hosts import is_loopback_name, name_in
from ..router.keys.digests import digest_of, is_digest

log = logging.getLogger(__name__)

OPEN = ("/health", "/livez", "/readyz")  # for probes, which have no key and may use any host name
MAX_CONNECTIONS = 32
MAX_HEAD_BYTES = 8 << 10
EXCHANGE_S = 10.0  # from the connection to the last byte of its one answer
ACCEPT_PAUSE_S = 0.1  # where the system gives no connection

_TEXT = "text/plain; charset=utf-8"

Answer = tuple[HTTPStatus, str, bytes]
"""Status, content type, body."""

Page = Callable[[str], Answer]
"""Makes the answer to a GET from its Accept header. Called on the loop; must not block."""


class ScrapeServer:
    """Answers one request per connection. `start` and `close` it on the same loop.

    The same rules as on the router's port: with keys configured, every path but `OPEN` needs one. Without keys on a
    loopback address, only loopback host names are answered, so that no web page can read the answers (browser.py).
    """

    def __init__(
        self,
        pages: dict[str, Page],
        keys: Sequence[str] = (),
        exchange_s: float = EXCHANGE_S,
        context: ssl.SSLContext | None = None,
    ) -> None:
        """`context`: every connection begins with TLS, which is part of its exchange; None: without."""
        self._pages = pages
        self._keys = [digest_of(key) for key in keys]
        self._is_private = True
        self._exchange_s = exchange_s
        self._context = context
        self._open: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> str:
        """Bind the port; returns host:port with the port that was given or chosen.

        Raises:
            ConfigError: the port is in use, or the host is no address of this machine.
        """
        loop = asyncio.get_running_loop()
        try:
            family, *_, address = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
            listening = socket.create_server(address[:2], family=family, backlog=MAX_CONNECTIONS)
        except OSError as error:
            raise ConfigError(
                f"the metrics port {host}:{port} cannot be bound: {error.strerror or error}; choose another with "
                "--metrics-port (cluster.worker_metrics_port), 0 for any, or none"
            ) from None
        listening.setblocking(False)
        bound, found, *_ = listening.getsockname()
        self._is_private = is_loopback_name(bound)
        self._accepting = asyncio.create_task(self._accept(listening))
        return f"[{host}]:{found}" if ":" in host else f"{host}:{found}"

    async def close(self) -> None:
        """Free the port and cut off running exchanges."""
        tasks = [*self._open, *([self._accepting] if self._accepting is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, listening: socket.socket) -> None:
        """Take connections, while there is room; one beyond it is closed at once."""
        loop = asyncio.get_running_loop()
        with listening:
            while True:
                try:
                    connection, _ = await loop.sock_accept(listening)
                except OSError as error:  # such as too many open files
                    log.debug("a scrape cannot be accepted: %s", error)
                    await asyncio.sleep(ACCEPT_PAUSE_S)
                    continue
                if len(self._open) >= MAX_CONNECTIONS:
                    connection.close()
                    continue
                task = asyncio.create_task(self._serve(connection))
                self._open.add(task)
                task.add_done_callback(self._open.discard)

    async def _serve(self, connection: socket.socket) -> None:
        loop, transport = asyncio.get_running_loop(), None
        reader = asyncio.StreamReader(limit=MAX_HEAD_BYTES)
        protocol = asyncio.StreamReaderProtocol(reader)
        within = {} if self._context is None else {"ssl_handshake_timeout": self._exchange_s}
        try:
            async with asyncio.timeout(self._exchange_s):
                transport, _ = await loop.connect_accepted_socket(
                    lambda: protocol, connection, ssl=self._context, **within
                )
                writer = asyncio.StreamWriter(transport, protocol, reader, loop)
                writer.write(self._answer(await reader.readuntil(b"\r\n\r\n")))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            log.debug("a scrape came to nothing: %s", error)
        finally:
            with contextlib.suppress(OSError, RuntimeError):
                if transport is None:
                    connection.close()
                else:
                    transport.abort()  # no effect on a closed connection

    def _answer(self, head: bytes) -> bytes:
        line, *lines = head.decode("latin-1").split("\r\n")
        method, _, rest = line.partition(" ")
        path = rest.partition(" ")[0].partition("?")[0]
        fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        status, kind, body = self._refusal(path, fields) or self._find(method, path, fields.get("accept", ""))
        headers = [
            f"HTTP/1.1 {status.value} {status.phrase}",
            f"content-type: {kind}",
            f"content-length: {len(body)}",
            "connection: close",
            *(["allow: GET, HEAD"] if status is HTTPStatus.METHOD_NOT_ALLOWED else []),
            *(["www-authenticate: Bearer"] if status is HTTPStatus.UNAUTHORIZED else []),
        ]
        return "\r\n".join(headers).encode("latin-1") + b"\r\n\r\n" + (b"" if method == "HEAD" else body)

    def _refusal(self, path: str, fields: dict[str, str]) -> Answer | None:
        if path in OPEN:
            return None
        if self._keys:
            scheme, _, key = fields.get("authorization", "").partition(" ")
            given = key.strip()
            if scheme.lower() == "bearer" and not is_digest(given) and self._knows(digest_of(given)):
                return None
            return HTTPStatus.UNAUTHORIZED, _TEXT, b"send 'Authorization: Bearer KEY' with one of router.api_keys\n"
        host = fields.get("host")  # browsers always send one
        if host is None or not self._is_private or is_loopback_name(name_in(host) or ""):
            return None
        return HTTPStatus.FORBIDDEN, _TEXT, b"not by that name: ask for localhost\n"

    def _knows(self, digest: bytes) -> bool:
        """True if this is the digest of a key; all are compared, each in constant time."""
        return sum(compare_digest(digest, known) for known in self._keys) > 0

    def _find(self, method: str, path: str, accept: str) -> Answer:
        page = self._pages.get(path)
        if page is None:
            known = ", ".join(sorted(self._pages))
            return HTTPStatus.NOT_FOUND, _TEXT, f"no such page here; known: {known}\n".encode()
        if method not in ("GET", "HEAD"):
            return HTTPStatus.METHOD_NOT_ALLOWED, _TEXT, b"GET only\n"
        try:
            return page(accept)
        except Exception:
            log.exception("GET %s failed", path)
            return HTTPStatus.INTERNAL_SERVER_ERROR, _TEXT, b"the worker's log has more\n"
