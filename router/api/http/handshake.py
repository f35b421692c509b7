"""The TLS handshake of one HTTP connection, within the bounds of all connections. Knows no HTTP.

It counts as a connection from its first byte on. One that is slow makes room like a slow head: a client that opens
connections and says nothing holds none for longer than `HANDSHAKE_S`.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from .connection import Connection
    from .connections import Connections

HANDSHAKE_S = 5.0
GOODBYE_S = 2.0  # for the end of TLS, when a connection is closed


class Handshake(asyncio.Protocol):
    """Protocol of a connection until TLS is there; the HTTP connection takes its place."""

    def __init__(self, among: Connections, connection: Connection, context: ssl.SSLContext) -> None:
        self.is_lost = False
        self._among = among
        self._connection = connection
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._early = bytearray()  # what came between the handshake and the change of protocols
        self._began_s = self._loop.time()
        self._plain: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def age_s(self) -> float:
        """Seconds since the connection was accepted."""
        return self._loop.time() - self._began_s

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin the handshake; close the connection where there is no room."""
        if self._plain is not None:
            return
        self._plain = cast(asyncio.Transport, transport)
        self._among.demote(self._plain)
        if self._among.add(self):
            self._among.note_head(self)
            self._task = self._loop.create_task(self._shake(self._plain))
        else:
            self._plain.abort()

    def data_received(self, data: bytes) -> None:
        """Keep what the client sends at once behind its handshake."""
        self._early += data

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection counts no more."""
        self.is_lost = True
        self._among.remove(self)

    def give_up(self) -> None:
        """Close at once."""
        self._among.remove(self)
        if self._plain is not None:
            self._plain.abort()

    async def _shake(self, plain: asyncio.Transport) -> None:
        number = plain.get_extra_info("socket").fileno()
        try:
            secure = await self._loop.start_tls(
                *(plain, self, self._context),
                server_side=True,
                ssl_handshake_timeout=HANDSHAKE_S,
                ssl_shutdown_timeout=GOODBYE_S,
            )
        except (OSError, asyncio.CancelledError):  # also ssl.SSLError: no client of ours, or one that trusts us not
            plain.abort()
            self._among.forget_number(number)
            return
        finally:
            self._among.remove(self)
        if secure is None or self.is_lost:
            plain.abort()
            self._among.forget_number(number)
            return
        secure.set_protocol(self._connection)
        self._connection.connection_made(secure)
        if self._early:
            self._connection.data_received(bytes(self._early))
