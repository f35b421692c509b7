"""The bytes of a request's body: within their bounds in length, time and encoding, or a typed error."""

from __future__ import annotations

import asyncio
import zlib

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

from ..core.errors import BodyTooLarge, Cancelled, DeadlineExceeded, InvalidRequest, UnsupportedEncoding
from .words import short

BODY_S = 60.0  # within which a body must be here

_GZIP = 16 + zlib.MAX_WBITS


async def read_body(http: HttpRequest, limit: int) -> bytes:
    """The body, unpacked where it is gzip; refused as soon as it is too long: by its header, else by its bytes.

    Raises:
        BodyTooLarge: it has more than `limit` bytes, packed or unpacked.
        UnsupportedEncoding: it is packed in another way.
        InvalidRequest: it says that it is gzip, and is not.
        DeadlineExceeded, Cancelled: it came too slowly; the client left.
    """
    encoding = http.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip"):
        raise UnsupportedEncoding(f"content-encoding is {short(encoding)}; send the body as it is, or as gzip")
    announced = http.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > limit:
        raise _too_large(f"the body has {announced[:20]} bytes; at most {limit}")
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for part in http.stream():
                data += part
                if len(data) > limit:
                    raise _too_large(f"the body has more than {limit} bytes")
    except TimeoutError:
        raise DeadlineExceeded(f"the body was not here within {BODY_S:g} s") from None
    except ClientDisconnect:
        raise Cancelled("the client left before its body was here") from None
    return _unpacked(bytes(data), limit) if encoding.endswith("gzip") else bytes(data)


def _unpacked(data: bytes, limit: int) -> bytes:
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
