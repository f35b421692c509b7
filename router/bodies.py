"""The bytes of a request's body: within their bounds in length, time and encoding, or a typed error.

All bodies that are being read share one budget. It counts the bytes that have come, not those that were announced.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

from ..core.errors import BodyTooLarge, Cancelled, DeadlineExceeded, InvalidRequest, Overloaded, UnsupportedEncoding
from .words import short

BODY_S = 60.0  # within which a body must be here
IDLE_S = 10.0  # longest wait for more of it
LEAST_BYTES_PER_S = 1024  # behind the first IDLE_S
ROOM_S = 5.0  # longest wait for other bodies to make room

_GZIP = 16 + zlib.MAX_WBITS


class Budget:
    """Bytes of all bodies that are held at once."""

    def __init__(self, limit: int) -> None:
        self.used = 0
        self._limit = limit
        self._freed = asyncio.Condition()

    @asynccontextmanager
    async def share(self) -> AsyncIterator[Share]:
        """One body's part of it; given back at the end."""
        share = Share(self)
        try:
            yield share
        finally:
            self.used -= share.used
            async with self._freed:
                self._freed.notify_all()

    async def take(self, num_bytes: int) -> None:
        """Wait for room, for `ROOM_S` at most.

        Raises:
            Overloaded: other bodies have all of it.
        """
        if self.used and self.used + num_bytes > self._limit:
            try:
                async with asyncio.timeout(ROOM_S), self._freed:
                    await self._freed.wait_for(lambda: not self.used or self.used + num_bytes <= self._limit)
            except TimeoutError:
                raise Overloaded(
                    f"{self.used} bytes of bodies are being read; at most {self._limit} are held at once "
                    "(router.max_bodies_bytes)",
                    retry_after_s=2.0,
                ) from None
        self.used += num_bytes


class Share:
    """What one body has of the budget."""

    def __init__(self, budget: Budget) -> None:
        self.used = 0
        self._budget = budget

    async def take(self, num_bytes: int) -> None:
        """See `Budget.take`."""
        await self._budget.take(num_bytes)
        self.used += num_bytes


async def read_body(http: HttpRequest, limit: int, share: Share) -> bytearray:
    """The body, unpacked where it is gzip; refused as soon as it is too long: by its header, else by its bytes.

    Raises:
        BodyTooLarge: it has more than `limit` bytes, packed or unpacked.
        UnsupportedEncoding: it is packed in another way.
        InvalidRequest: it says that it is gzip, and is not.
        Overloaded: other bodies have all of the budget.
        DeadlineExceeded, Cancelled: it came too slowly; the client left.
    """
    encoding = http.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip"):
        raise UnsupportedEncoding(f"content-encoding is {short(encoding)}; send the body as it is, or as gzip")
    announced = http.headers.get("content-length", "0")
    if announced.isdigit() and (len(announced) > 20 or int(announced) > limit):
        raise _too_large(f"the body has {announced[:20]} bytes; at most {limit}")
    try:
        async with asyncio.timeout(BODY_S):
            data = await _received(http, limit, share)
    except TimeoutError:
        raise DeadlineExceeded(f"the body was not here within {BODY_S:g} s") from None
    except ClientDisconnect:
        raise Cancelled("the client left before its body was here") from None
    if not encoding.endswith("gzip"):
        return data
    unpacked = bytearray(_unpacked(data, limit))
    await share.take(len(unpacked))
    return unpacked


async def _received(http: HttpRequest, limit: int, share: Share) -> bytearray:
    """All of the body as it came; each part in time, and all of them quickly enough."""
    data, begun_s = bytearray(), time.monotonic()
    parts = http.stream()
    while True:
        try:
            async with asyncio.timeout(IDLE_S):
                part = await anext(parts)
        except StopAsyncIteration:
            return data
        except TimeoutError:
            raise DeadlineExceeded(f"nothing of the body came for {IDLE_S:g} s") from None
        if len(data) + len(part) > limit:
            raise _too_large(f"the body has more than {limit} bytes")
        await share.take(len(part))
        data += part
        taken_s = time.monotonic() - begun_s
        if taken_s > IDLE_S and len(data) < taken_s * LEAST_BYTES_PER_S:
            raise DeadlineExceeded(f"the body has {len(data)} bytes after {taken_s:.0f} s; send it more quickly")


def _unpacked(data: bytearray, limit: int) -> bytes:
    """One gzip member. Stops at the limit, however much more the bytes would become."""
    unpacker = zlib.decompressobj(_GZIP)
    try:
        unpacked = unpacker.decompress(data, limit + 1)
    except zlib.error as error:
        raise InvalidRequest(f"the body is not the gzip that content-encoding says: {error}") from None
    if len(unpacked) > limit:
        raise _too_large(f"the unpacked body has more than {limit} bytes")
    if not unpacker.eof or unpacker.unused_data:
        raise InvalidRequest("the body is not one whole gzip member; send it whole, and nothing behind it")
    return unpacked


def _too_large(message: str) -> BodyTooLarge:
    return BodyTooLarge(f"{message} (router.max_body_bytes)")
