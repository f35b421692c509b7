"""EngineLink between two processes: the same values as bytes over a local socket. Does not interpret them.

    face: FaceEnd ── frames ──▶ serve_engine ──▶ ThreadLink: engine
                  ◀── frames ──

The engine's process uses the same `ThreadLink` as an engine in a thread, with its bounds and refusals; an extra thread
carries values between the link and the socket. A side that ends, or whose process dies, closes the socket: the face
gets the engine's end as from a thread, and an engine without a face stops.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import threading
from collections.abc import Sequence
from typing import Any

from ...core.errors import Unavailable
from .messages import BlocksFetched, Command, Event, FetchBlocks, Stop, Submit
from .thread_link import ThreadLink
from .wire import WireError, decode, encode

MAX_FRAME_BYTES = 1 << 30
MAX_UNSENT_BYTES = 64 << 20  # bound on unread commands; above it new work is refused

STALL_S = 30.0  # longest time in which the face may read nothing, the same as in ThreadLink

_HEAD = struct.Struct("<I")
_log = logging.getLogger(__name__)


class FaceEnd:
    """The face's end. Implements `FaceLink` of client.py; make it on the face's event loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._refused: list[Event] = []
        self._refusal: asyncio.Future[None] | None = None  # ends the wait of `receive`
        self._reading: asyncio.Task[Any] | None = None  # outlives a cancelled `receive`, so that no frame is cut
        self._is_closed = False

    @classmethod
    async def open(cls, sock: socket.socket) -> FaceEnd:
        """Make the face's end from one socket of a connected pair."""
        return cls(*await asyncio.open_connection(sock=sock))

    def send(self, command: Command) -> None:
        """Send the engine a command; never waits.

        Raises:
            Unavailable: a `Submit` after the engine's end, or while too many bytes are unread.
        """
        if self._is_closed or self._writer.is_closing():
            if isinstance(command, Submit):
                raise Unavailable("this worker's engine has ended; it is being restarted", retry_after_s=1.0)
            return
        if self._writer.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            if isinstance(command, Submit):
                raise Unavailable("this worker's engine takes no commands just now", retry_after_s=1.0)
            if isinstance(command, FetchBlocks):
                self._refused.append(BlocksFetched(command.fetch_id, 0, ()))
                if self._refusal is not None and not self._refusal.done():
                    self._refusal.set_result(None)
                return
        self._writer.write(_frame(command))

    async def receive(self) -> Sequence[Event]:
        """Wait for events; returns those of one frame, in order. Empty: the engine has ended, or its process died."""
        if self._is_closed:
            return []
        reading = self._reading = self._reading or asyncio.create_task(_read(self._reader))
        if not self._refused:
            self._refusal = asyncio.get_running_loop().create_future()
            await asyncio.wait({reading, self._refusal}, return_when=asyncio.FIRST_COMPLETED)
        if self._refused:
            refused, self._refused = self._refused, []
            return refused
        self._reading = None
        try:
            events: list[Event] = reading.result()
            if not isinstance(events, list):
                raise WireError(f"a {type(events).__name__}")
        except (asyncio.IncompleteReadError, ConnectionError):
            events = []
        except WireError as error:
            _log.error("the engine said something that is no event, and counts as ended: %s", error)
            events = []
        if not events:
            self._is_closed = True
            self._writer.close()
        return events


def serve_engine(sock: socket.socket, link: ThreadLink) -> threading.Thread:
    """Start a thread that carries values between an engine's link and a socket until either ends.

    Called in the engine's process.
    """
    thread = threading.Thread(target=lambda: asyncio.run(_carry(sock, link)), name="process-link", daemon=True)
    thread.start()
    return thread


async def _carry(sock: socket.socket, link: ThreadLink) -> None:
    reader, writer = await asyncio.open_connection(sock=sock)
    inward = asyncio.create_task(_carry_commands(reader, link))
    try:
        while events := await link.receive():
            writer.write(_frame(list(events)))
            async with asyncio.timeout(STALL_S):  # meanwhile events collect in the link, up to its bound
                await writer.drain()
        writer.write(_frame([]))
        writer.close()
        async with asyncio.timeout(STALL_S):
            await writer.wait_closed()  # until all is sent: what is unsent when the loop ends is lost
    except (ConnectionError, TimeoutError, WireError) as error:
        _log.warning("the face is gone, reads nothing or cannot be told (%r): the engine stops", error)
        link.send(Stop())
        while await link.receive():  # keep reading, so that a full queue does not block the engine's end
            pass
    finally:
        inward.cancel()
        await asyncio.gather(inward, return_exceptions=True)
        writer.close()


async def _carry_commands(reader: asyncio.StreamReader, link: ThreadLink) -> None:
    while True:
        try:
            command: Command = await _read(reader)
            if not isinstance(command, Command):
                raise WireError(f"a {type(command).__name__}")
        except (asyncio.IncompleteReadError, ConnectionError, WireError) as error:
            if isinstance(error, WireError):
                _log.error("the face said something that is no command: %s", error)
            link.send(Stop())
            return
        try:
            link.send(command)
        except Unavailable:
            pass  # the engine has ended: `receive` reports it


def _frame(value: object) -> bytes:
    data = encode(value)
    return _HEAD.pack(len(data)) + data


async def _read(reader: asyncio.StreamReader) -> Any:
    (size,) = _HEAD.unpack(await reader.readexactly(_HEAD.size))
    if size > MAX_FRAME_BYTES:
        raise WireError(f"a frame of {size} bytes")
    return decode(await reader.readexactly(size))
