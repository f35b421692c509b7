"""Bodies of many connections share the room of all messages, and none of them holds it by being slow."""

import asyncio
import gzip
from collections.abc import AsyncIterator, Mapping

import pytest

from twostroke.core.errors import BodyTooLarge, DeadlineExceeded, Overloaded, TwostrokeError
from twostroke.router.api.http import bodies, reading
from twostroke.router.api.http.bodies import SMALL_BYTES, read_body
from twostroke.router.api.http.reading import Room

LIMIT = 4 * SMALL_BYTES
PART = 32 << 10


class FakeRequest:
    """A body in parts; `gate` holds its last one back."""

    def __init__(self, size: int, gate: asyncio.Event | None = None, **headers: str) -> None:
        self.headers: Mapping[str, str] = {"content-length": str(size)} | headers
        self._size, self._gate = size, gate

    async def stream(self) -> AsyncIterator[bytes]:
        left = self._size
        while left > 0:
            part = min(left, PART)
            if self._gate is not None and left <= PART:
                await self._gate.wait()
            yield b" " * part
            left -= part


async def read(room: Room, request: FakeRequest, tenant: str = "t") -> int:
    async with read_body(request, LIMIT, room, tenant) as data:  # type: ignore[arg-type]
        return len(data)


async def until_full(room: Room) -> None:
    while room.free_bytes:
        await asyncio.sleep(0)


async def test_large_bodies_wait_for_room_and_small_ones_pass():
    room, gate = Room(2 * LIMIT, one_tenant=True), asyncio.Event()
    held = [asyncio.create_task(read(room, FakeRequest(LIMIT, gate))) for _ in range(2)]
    await until_full(room)
    waits = asyncio.create_task(read(room, FakeRequest(LIMIT)))
    assert await read(room, FakeRequest(SMALL_BYTES)) == SMALL_BYTES
    assert not waits.done()
    gate.set()
    assert await asyncio.gather(*held, waits) == [LIMIT] * 3
    assert room.free_bytes == 2 * LIMIT


async def test_a_packed_body_takes_the_room_of_what_it_may_unpack_to():
    room, packed = Room(2 * LIMIT, one_tenant=True), gzip.compress(b" " * LIMIT)
    free: list[int] = []

    class Packed(FakeRequest):
        async def stream(self) -> AsyncIterator[bytes]:
            free.append(room.free_bytes)
            yield packed

    request = Packed(len(packed), **{"content-encoding": "gzip"})
    assert await read(room, request) == LIMIT
    assert free == [2 * LIMIT - len(packed) - LIMIT]
    assert room.free_bytes == 2 * LIMIT


async def test_an_unpacked_body_keeps_the_room_of_its_bytes():
    room, packed = Room(2 * LIMIT, one_tenant=True), gzip.compress(b" " * LIMIT)

    class Packed(FakeRequest):
        async def stream(self) -> AsyncIterator[bytes]:
            yield packed

    request = Packed(len(packed), **{"content-encoding": "gzip"})
    async with read_body(request, LIMIT, room, "t") as data:  # type: ignore[arg-type]
        assert room.free_bytes == 2 * LIMIT - len(data) == LIMIT


async def test_one_tenant_does_not_keep_the_others_waiting():
    room, gate = Room(4 * LIMIT, one_tenant=False), asyncio.Event()
    held = [asyncio.create_task(read(room, FakeRequest(LIMIT, gate), "many")) for _ in range(6)]
    while room.free_bytes > 2 * LIMIT:
        await asyncio.sleep(0)
    assert await read(room, FakeRequest(LIMIT), "other") == LIMIT
    gate.set()
    assert await asyncio.gather(*held) == [LIMIT] * 6


async def test_who_finds_no_room_hears_when_to_come_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reading, "WAIT_S", 0.05)
    room, gate = Room(LIMIT, one_tenant=True), asyncio.Event()
    held = asyncio.create_task(read(room, FakeRequest(LIMIT, gate)))
    await until_full(room)
    with pytest.raises(Overloaded) as caught:
        await read(room, FakeRequest(LIMIT))
    assert caught.value.retry_after_s is not None
    gate.set()
    await held
    assert room.free_bytes == LIMIT


@pytest.mark.parametrize("name", ["IDLE_S", "READ_S"])
async def test_a_body_that_stands_still_gives_its_room_back(monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr(bodies, name, 0.05)
    room = Room(LIMIT, one_tenant=True)
    for size in (LIMIT, 100):
        with pytest.raises(DeadlineExceeded):
            async with asyncio.timeout(60):
                await read(room, FakeRequest(size, asyncio.Event()))
        assert room.free_bytes == LIMIT


async def test_what_goes_wrong_gives_its_room_back():
    room = Room(LIMIT, one_tenant=True)

    async def misread() -> None:
        async with read_body(FakeRequest(LIMIT), LIMIT, room, "t"):  # type: ignore[arg-type]
            assert room.free_bytes == 0
            raise ValueError("no JSON")

    with pytest.raises(ValueError, match="no JSON"):
        await misread()
    assert room.free_bytes == LIMIT
    leaving = asyncio.create_task(read(room, FakeRequest(LIMIT, asyncio.Event())))
    await until_full(room)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    assert room.free_bytes == LIMIT


async def test_lengths_that_are_too_large_are_refused_before_a_byte():
    room = Room(LIMIT, one_tenant=True)
    for announced in (str(LIMIT + 1), "9" * 30):
        with pytest.raises(BodyTooLarge):
            await read(room, FakeRequest(10, asyncio.Event(), **{"content-length": announced}))
    with pytest.raises(TwostrokeError):  # it says less than it has
        await read(room, FakeRequest(LIMIT + 1, **{"content-length": "5"}))
    assert room.free_bytes == LIMIT
