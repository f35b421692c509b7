"""Reads the bytes of a request's body, bounded in length, time and encoding.

A large body takes a lease of the room that all messages share (reading.py), from before it is read until it is parsed.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

from ....core.errors import BodyTooLarge, Cancelled, DeadlineExceeded, InvalidRequest, UnsupportedEncoding
from ..checks import short
from .reading import READ_S, Room

IDLE_S = 10.0  # longest wait for more of a body
SMALL_BYTES = 64 << 10  # smaller bodies take no room: the server buffers as much before the body is requested

_GZIP = 16 + zlib.MAX_WBITS


@asynccontextmanager
async def read_body(http: HttpRequest, limit: int, room: Room, tenant: str) -> AsyncIterator[bytearray]:
    """Context with the body, unpacked if it is gzip. A body that is too long is refused by its header if possible.

    Its part of the room is freed when the context ends.

    Raises:
        BodyTooLarge: it has more than `limit` bytes, packed or unpacked.
        UnsupportedEncoding: it is packed in another format.
        InvalidRequest: it is declared as gzip, and is not.
        Overloaded: other messages have all of the room.
        DeadlineExceeded, Cancelled: it came too slowly; the client left.
    """
    encoding = http.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip"):
        raise UnsupportedEncoding(f"content-encoding is {short(encoding)}; send the body as it is, or as gzip")
    announced = http.headers.get("content-length", "0")
    if announced.isdigit() and (len(announced) > 20 or int(announced) > limit):
        raise _too_large(f"the body has {announced[:20]} bytes; at most {limit}")
    is_packed = encoding.endswith("gzip")
    size_bytes = int(announced) if "content-length" in http.headers and announced.isdigit() else limit
    if size_bytes <= SMALL_BYTES and not is_packed:
        yield await _received(http, size_bytes)
        return
    lease = await room.take(tenant, size_bytes + (limit if is_packed else 0))
    try:
        data = await room.read(lease, partial(_received, http, limit))
        if is_packed:
            data = _unpacked(data, limit)
        lease.shrink(len(data))
        yield data
    finally:
        lease.give_back()


async def _received(http: HttpRequest, limit: int) -> bytearray:
    """Receive the whole body, with a deadline for each part and for all."""
    data = bytearray()
    parts = http.stream()
    try:
        async with asyncio.timeout(READ_S):
            while True:
                async with asyncio.timeout(IDLE_S):
                    part = await anext(parts, None)
                if part is None:
                    return data
                if len(data) + len(part) > limit:
                    raise _too_large(f"the body has more than {limit} bytes")
                data += part
    except TimeoutError:
        raise DeadlineExceeded(
            f"the body was not here within {READ_S:g} s, or nothing of it came for {IDLE_S:g} s"
        ) from None
    except ClientDisconnect:
        raise Cancelled("the client left before its body was here") from None


def _unpacked(data: bytearray, limit: int) -> bytearray:
    """Unpack one gzip member; stops at the limit."""
    unpacker = zlib.decompressobj(_GZIP)
    try:
        unpacked = unpacker.decompress(data, limit + 1)
    except zlib.error as error:
        raise InvalidRequest(f"the body is not the gzip that content-encoding says: {error}") from None
    if len(unpacked) > limit:
        raise _too_large(f"the unpacked body has more than {limit} bytes")
    if not unpacker.eof or unpacker.unused_data:
        raise InvalidRequest("the body is not one whole gzip member; send it whole, and nothing behind it")
    return bytearray(unpacked)


def _too_large(message: str) -> BodyTooLarge:
    return BodyTooLarge(f"{message} (router.max_body_bytes)")
