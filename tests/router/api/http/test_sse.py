"""Event streams towards clients that leave or stall, against a server's side that is played by hand."""

import asyncio
from typing import Any

import pytest

from twostroke.router.api.http.sse import EventStream, to_json, to_json_in_parts


class Played:
    """The ASGI server's end of one connection."""

    def __init__(self) -> None:
        self.sent: list[dict] = []
        self.left = asyncio.Event()
        self.room = asyncio.Event()
        self.room.set()

    async def receive(self) -> dict:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict) -> None:
        await self.room.wait()
        self.sent.append(message)


class Events:
    """An endless stream that notes its end."""

    def __init__(self) -> None:
        self.is_closed = False

    async def __call__(self):
        try:
            while True:
                yield b"data: x\n\n"
                await asyncio.sleep(0.001)
        finally:
            self.is_closed = True


async def run(played: Played, events: Events, stall_s: float) -> None:
    async with asyncio.timeout(60):
        await EventStream(events(), {}, stall_s)({"type": "http"}, played.receive, played.send)


async def test_a_client_that_reads_nothing_is_given_up_and_its_request_closed():
    played, events = Played(), Events()
    running = asyncio.create_task(run(played, events, stall_s=0.1))
    await asyncio.sleep(0.02)
    played.room.clear()
    await running
    assert events.is_closed
    assert played.sent[-1].get("more_body", True)  # it did not look complete


async def test_a_client_that_leaves_closes_the_request():
    played, events = Played(), Events()
    running = asyncio.create_task(run(played, events, stall_s=60))
    await asyncio.sleep(0.02)
    played.left.set()
    await running
    assert events.is_closed


async def test_a_slow_stream_is_no_stall():
    played = Played()

    async def slow():
        yield b"data: 1\n\n"
        await asyncio.sleep(0.3)
        yield b"data: 2\n\n"

    await EventStream(slow(), {}, 0.1)({"type": "http"}, played.receive, played.send)
    assert [m["body"] for m in played.sent[1:]] == [b"data: 1\n\n", b"data: 2\n\n", b""]


@pytest.mark.parametrize("header", ["content-type", "cache-control"])
async def test_headers(header):
    played = Played()

    async def nothing():
        return
        yield b""

    await EventStream(nothing(), {"x-a": "b"}, 1.0)({"type": "http"}, played.receive, played.send)
    assert header.encode() in dict(played.sent[0]["headers"])


async def test_a_client_that_takes_not_even_the_head_is_given_up_and_what_it_came_for_closed():
    played, source = Played(), Events()
    played.room.clear()
    pieces = source()
    await anext(pieces)  # the request runs already
    stream = EventStream(Events()(), {}, 0.1, source=pieces)
    async with asyncio.timeout(60):
        await stream({"type": "http"}, played.receive, played.send)
    assert played.sent == []
    assert source.is_closed


@pytest.mark.parametrize(
    "value", [{}, [], {"a": [1, "é\u2028", None] * 100, "b": {"c": [[{"d": 1}] * 3] * 2}}, [[]] * 500]
)
def test_json_in_parts_is_the_same_json(value: Any):
    assert to_json_in_parts(value) == to_json(value)


def test_a_lone_surrogate_becomes_its_escape():
    assert to_json({"a": "\ud800\u2028é"}) == '{"a":"\\ud800\\u2028é"}'.encode()
