"""Bounds on HTTP connections, over real sockets: their number, their heads, and clients that read nothing."""

import asyncio
import importlib.util
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import uvicorn

from twostroke.router.api.frontend import Frontend
from twostroke.router.api.http import connection, connections
from twostroke.router.api.http.app import make_app
from twostroke.router.api.http.connection import MAX_HEADERS, MAX_PIPELINED
from twostroke.router.api.http.connections import Connections, connections_within
from twostroke.router.config import RouterConfig
from twostroke.router.requests.flow import Flow

_FILE = Path(__file__).parents[4] / "bench/hostile/http_inputs.py"
_SPEC = importlib.util.spec_from_file_location("http_inputs", _FILE)
assert _SPEC
assert _SPEC.loader
http_inputs = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(http_inputs)

GET = b"GET /ping HTTP/1.1\r\nhost: localhost\r\n\r\n"


@asynccontextmanager
async def served(most: int = 64, stall_s: float = 5.0, app: Any = None) -> AsyncIterator[tuple[int, Connections]]:
    """A server; its port and its connections."""
    among = Connections(most, stall_s)
    config = RouterConfig()
    app = app or make_app(config, Frontend(config, Flow(config, b"k" * 32, proof_key=b"p" * 32)))
    listener = socket.create_server(("127.0.0.1", 0))
    protocol = cast(Any, among.protocol)
    server = uvicorn.Server(uvicorn.Config(app, http=protocol, ws="none", lifespan="off", log_level="critical"))
    running = asyncio.create_task(server._serve([listener]))
    try:
        async with asyncio.timeout(60):
            yield listener.getsockname()[1], among
    finally:
        server.should_exit = server.force_exit = True
        await running


async def answer(port: int, sent: bytes) -> bytes:
    """All that comes back until the server closes, or nothing more comes for a while."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(sent)
        got = b""
        while part := await reader.read(1 << 16):
            got += part
    except ConnectionError:
        pass
    finally:
        writer.transport.abort()
    return got


@pytest.fixture
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIRST_BYTE_S", "HEAD_S", "BODY_AFTER_ANSWER_S"):
        monkeypatch.setattr(connection, name, 0.2)
    monkeypatch.setattr(connections, "LOOK_S", 0.05)


@pytest.mark.usefixtures("short_times")
async def test_hostile_heads_are_refused_and_their_connections_closed():
    expected = {
        "one header of 1 MiB": b" 431 ",
        "10,000 headers": b" 431 ",
        "a path of 1 MiB": b" 431 ",
        "1,000 pipelined requests": b" 503 ",  # what fits is answered: there is no worker
        "half a head": b" 408 ",
        "no head": b"",
    }
    async with served() as (port, among):
        for name, head in http_inputs.heads():
            got = await answer(port, head)
            assert expected[name] in got[:20], name
            pipelined = MAX_PIPELINED + 1 if "pipelined" in name else got.count(b"HTTP/1.1")
            assert got.count(b"HTTP/1.1") == pipelined
        while len(among):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("coding", ["xchunked", "gzip, chunked", "identity", "chunked, chunked"])
async def test_a_body_of_unknown_length_is_refused_at_once(coding: str):
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: {coding}\r\n\r\n5\r\nab"
    async with served() as (port, _):
        got = await answer(port, head.encode())
    assert got.startswith(b"HTTP/1.1 400 ")


async def test_a_head_of_usual_size_is_served():
    headers = b"".join(b"a%d: %s\r\n" % (place, b"b" * 100) for place in range(MAX_HEADERS - 2))
    async with served() as (port, _):
        got = await answer(port, GET[:-2] + headers + b"connection: close\r\n\r\n")
        assert got.startswith(b"HTTP/1.1 503")  # no worker is ready
        assert b"no worker" in got


async def test_the_longest_idle_connection_makes_room_for_a_new_one():
    async with served(most=3) as (port, among):
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        while len(among) < 3:
            await asyncio.sleep(0.01)
        assert b"no worker" in await answer(port, GET[:-2] + b"connection: close\r\n\r\n")
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await idle[0][0].readexactly(1)
        for _, writer in idle:
            writer.transport.abort()


async def test_where_no_connection_is_idle_a_new_one_is_refused():
    async with served(most=1) as (port, _):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\n\r\n")
        await writer.drain()
        got = b""
        while b" 503 Service" not in got or b"retry-after: 1" not in got:  # until its request has been seen
            got = await answer(port, b"")
        writer.transport.abort()


async def test_half_a_head_makes_room_for_a_new_connection():
    async with served(most=3) as (port, among):
        halves = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        for _, writer in halves:
            writer.write(GET[:20])
        while len(among._heads) < 3:
            await asyncio.sleep(0.01)
        for _ in range(3):
            assert b"no worker" in await answer(port, GET[:-2] + b"connection: close\r\n\r\n")
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await halves[0][0].readexactly(1)
        for _, writer in halves:
            writer.transport.abort()


@pytest.mark.parametrize(("slow_s", "idle_stays"), [(0.0, True), (60.0, False)])
async def test_a_slow_head_makes_room_before_a_connection_that_its_client_may_use_again(
    slow_s: float, idle_stays: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(connections, "SLOW_HEAD_S", slow_s)
    async with served(most=2) as (port, among):
        idle = await asyncio.open_connection("127.0.0.1", port)
        half = await asyncio.open_connection("127.0.0.1", port)
        half[1].write(GET[:20])
        while not (len(among._heads) == len(among._idle) == 1):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)
        assert b"no worker" in await answer(port, GET[:-2] + b"connection: close\r\n\r\n")
        gone = half if idle_stays else idle
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await gone[0].readexactly(1)
        assert len(among) == 1
        for _, writer in (idle, half):
            writer.transport.abort()


async def test_a_request_behind_another_ones_answer_is_no_half_head():
    """A connection whose answer is under way keeps it, whatever it has begun to send behind it."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await go_on.wait()
        await send({"type": "http.response.body", "body": b"whole"})

    go_on = asyncio.Event()
    async with served(most=1, app=app) as (port, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET + GET[:20])
        await reader.readuntil(b"\r\n\r\n")
        assert b" 503 Service" in await answer(port, b"")
        go_on.set()
        assert b"whole" in await reader.readuntil(b"whole")
        writer.transport.abort()


@pytest.mark.usefixtures("short_times")
async def test_a_client_that_takes_nothing_of_an_answer_is_cut_off():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * (32 << 20)})
        answered.set()

    answered = asyncio.Event()
    async with served(stall_s=0.3, app=app) as (port, among):
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(GET)
        await answered.wait()
        while len(among):
            await asyncio.sleep(0.01)
        writer.transport.abort()


@pytest.mark.usefixtures("short_times")
async def test_a_body_that_goes_on_behind_its_answer_ends_the_connection():
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\nexpect: 100-continue\r\n\r\n"
    async with served() as (port, _):
        got = await answer(port, head % (1 << 40))
        assert got.startswith(b"HTTP/1.1 413")
        assert b"100 Continue" not in got


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the headers' names and the body."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    names = b" ".join(name for name, _ in scope["headers"])
    told = b"|".join([scope["method"].encode(), scope["raw_path"], names, body])
    headers = [(b"content-length", str(len(told)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": told})


HTTP2 = b"Connection: Upgrade, HTTP2-Settings, x\r\nHTTP2-Settings: AAEAAEAAAAIAAAAA\r\nUpgrade: h2c\r\n"


@pytest.mark.parametrize("wish", [HTTP2, b"Connection: Upgrade\r\nUpgrade: websocket\r\n"])
@pytest.mark.parametrize("size", [1 << 20, 7])  # of what is sent at once
async def test_who_asks_for_another_protocol_is_answered_in_this_one(wish: bytes, size: int):
    """And its body is a body, whatever it looks like and whenever it comes: never a request of its own."""
    inner = b"GET /inner HTTP/1.1\r\nhost: localhost\r\n\r\n"
    asks = b"POST /outer HTTP/1.1\r\nhost: localhost\r\n%scontent-length: %d\r\n\r\n%s" % (wish, len(inner), inner)
    chunked = b"POST /chunked HTTP/1.1\r\nhost: localhost\r\n%stransfer-encoding: chunked\r\n\r\n" % wish
    last = b"GET /last HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    sent = asks + chunked + b"3\r\nabc\r\n0\r\n\r\n" + last
    async with served(app=echo) as (port, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for start in range(0, len(sent), size):
            writer.write(sent[start : start + size])
            await asyncio.sleep(0)
        got = await reader.read(-1)
        told = [part.partition(b"\r\n\r\n")[2] for part in got.split(b"HTTP/1.1 200 OK")[1:]]
        kept = b" connection" if wish is HTTP2 else b""
        assert told == [
            b"POST|/outer|host%s content-length|%s" % (kept, inner),
            b"POST|/chunked|host%s transfer-encoding|abc" % kept,
            b"GET|/last|host connection|",
        ]


async def test_a_head_that_asks_for_another_protocol_may_be_as_long_as_any():
    filler = b"".join(b"a%d: %s\r\n" % (place, b"b" * 1000) for place in range(20))
    async with served(app=echo) as (port, _):
        head = b"GET /long HTTP/1.1\r\nhost: localhost\r\nConnection: Upgrade, close\r\nUpgrade: h2c\r\n"
        assert (await answer(port, head + filler + b"\r\n")).startswith(b"HTTP/1.1 200")


@pytest.mark.usefixtures("short_times")
async def test_a_connection_that_ends_and_is_not_left_by_its_client_is_closed():
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999999\r\nconnection: close\r\n\r\n"
    async with served() as (port, among):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head)
        assert (await reader.read(-1)).startswith(b"HTTP/1.1 413")
        async with asyncio.timeout(60):
            while len(among):
                await asyncio.sleep(0.01)
        writer.transport.abort()


@pytest.mark.usefixtures("short_times")
async def test_a_look_that_fails_is_not_the_last(monkeypatch: pytest.MonkeyPatch):
    looked_at: list[Any] = []

    def fail(self: Any, now_s: float) -> None:
        looked_at.append(self)
        raise OSError(107, "a test says so")

    monkeypatch.setattr(connection.Connection, "look", fail)
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    async with served() as (port, among):
        writers = [(await asyncio.open_connection("127.0.0.1", port))[1] for _ in range(3)]
        while len(set(looked_at)) < 3:
            await asyncio.sleep(0.01)
        monkeypatch.undo()
        monkeypatch.setattr(connection, "FIRST_BYTE_S", 0.0)
        while len(among):
            await asyncio.sleep(0.01)
        for writer in writers:
            writer.transport.abort()


async def test_the_end_of_an_answer_to_a_client_that_has_just_reset_the_connection_is_no_error():
    async with served() as (port, among):
        client = socket.create_connection(("127.0.0.1", port))
        while not len(among):
            await asyncio.sleep(0.01)
        (served_one,) = among._all
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()  # and the loop cannot see it before the next line
        served_one._stop_writing()
        while len(among):
            await asyncio.sleep(0.01)


async def test_the_time_of_an_idle_connection_begins_with_the_end_of_its_answer():
    """However long the answer took."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        asked.set()
        await go_on.wait()
        await echo(scope, receive, send)

    asked, go_on = asyncio.Event(), asyncio.Event()
    async with served(app=app) as (port, among):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET)
        await asked.wait()
        (asking,) = among._all
        asking._since_s -= 3600.0  # as if the request had come an hour ago
        go_on.set()
        await reader.readuntil(b"GET|/ping|host|")
        asking._look_at_request(asking.loop.time() - asking._since_s)
        writer.write(GET)
        await reader.readuntil(b"GET|/ping|host|")
        writer.transport.abort()


async def test_requests_behind_the_last_answer_are_not_asked():
    """The connection closes after the first, and half a body is on its way behind them."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        asked.append(scope["method"])
        await go_on.wait()
        headers = [(b"connection", b"close"), (b"content-length", b"5")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"whole"})

    asked: list[str] = []
    go_on = asyncio.Event()
    async with served(app=app) as (port, among):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET + GET + b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\nhalf")
        while not any(len(connection.pipeline) == 2 for connection in among._all):
            await asyncio.sleep(0.01)
        go_on.set()
        assert (await reader.read(-1)).count(b"HTTP/1.1 200") == 1
        assert asked == ["GET"]
        writer.transport.abort()


async def test_no_tunnel_begins_here():
    async with served(app=echo) as (port, _):
        assert (await answer(port, b"CONNECT a.example:80 HTTP/1.1\r\nhost: a\r\n\r\n")).startswith(b"HTTP/1.1 400")


async def test_an_answer_before_the_end_of_a_body_reaches_a_client_that_writes_first_and_then_reads():
    """Also where the connection is not kept: closing over unread bytes would take the answer back."""
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
    size = 16 << 20
    async with served() as (port, among):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head % size)
        for _ in range(size >> 20):
            writer.write(b"x" * (1 << 20))
            await writer.drain()
        assert (await reader.read(-1)).startswith(b"HTTP/1.1 413")
        writer.close()
        while len(among):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("rest", [b"zz\r\n", b"2\r\nhello\r\n", b"fffffffffffffffff\r\n", b"0\r\n\x00: y\r\n\r\n"])
async def test_a_broken_body_is_refused_at_once_and_given_up(rest: bytes):
    """The application does not wait for the rest, which never comes."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (message := await receive())["type"] == "http.request":
            pass
        seen.append(message["type"])
        await send({"type": "http.response.start", "status": 499, "headers": []})  # to nobody
        await send({"type": "http.response.body", "body": b""})

    seen: list[str] = []
    head = b"POST / HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n"
    async with served(app=app) as (port, among):
        got = await answer(port, head + rest)
        assert got.startswith(b"HTTP/1.1 400")
        assert got.count(b"HTTP/1.1") == 1
        assert seen == ["http.disconnect"]
        while len(among):
            await asyncio.sleep(0.01)


async def _length(scope: Any, receive: Any, send: Any) -> None:
    """An application that answers with its body's length."""
    total, more = 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return
        total, more = total + len(message["body"]), message["more_body"]
    body = b"%d" % total
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


async def test_small_chunks_are_read_and_endless_extensions_refused():
    head = b"POST / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
    async with served(app=_length) as (port, _):
        assert (await answer(port, head + b"1\r\na\r\n" * 100_000 + b"0\r\n\r\n")).endswith(b"100000")
        named = b"1;name=%s\r\na\r\n" % (b"v" * 30_000)
        assert (await answer(port, head + named + b"0\r\n\r\n")).endswith(b"\r\n\r\n1")
        for endless in (b"1;name=" + b"v" * (1 << 18), b"1;a=bcdefghijklm\r\na\r\n" * 20_000):
            assert (await answer(port, head + endless)).startswith(b"HTTP/1.1 400 ")


async def test_a_broken_body_behind_the_begin_of_its_answer_adds_no_other():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-length", b"5")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await go_on.wait()
        await send({"type": "http.response.body", "body": b"whole"})

    go_on = asyncio.Event()
    async with served(app=app) as (port, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST / HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.write(b"zz\r\n")
        await writer.drain()
        asyncio.get_running_loop().call_later(0.1, go_on.set)
        rest = await reader.read(-1)
        assert rest.endswith(b"whole")
        assert b"HTTP/1.1" not in rest
        writer.transport.abort()


def test_files_are_left_for_what_is_no_connection():
    assert connections_within(4096, 1 << 20) == 4096
    assert connections_within(4096, 1024) == 768
    assert connections_within(4096, 64) == 32
    assert connections_within(4096, -1) == 4096


@pytest.mark.parametrize("sent", ["more of a head", "more of a body"])
async def test_what_is_thrown_away_is_bounded(sent: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connection, "MAX_THROWN_BYTES", 2 << 20)
    monkeypatch.setattr(connection, "BODY_AFTER_ANSWER_S", 60.0)
    body = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 999999999\r\n\r\n"
    async with served() as (port, among):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /" + b"a" * (64 << 10) if sent == "more of a head" else body)
        assert b" 431 " in (line := await reader.readline()) or b" 413 " in line
        for _ in range(512):  # 32 MiB: the bound, and more than the system's buffers of both sides take
            writer.write(b"a" * (64 << 10))
            try:
                await writer.drain()
            except ConnectionError:
                break
        else:
            pytest.fail("all is read")
        writer.transport.abort()
        while len(among):
            await asyncio.sleep(0.01)
