"""TLS of the HTTP face, over real sockets: bounds hold before the handshake is over, and certificates change."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import uvicorn
from support.clusters.certificates import made

from twostroke.cluster.authority import renew
from twostroke.core.errors import ConfigError
from twostroke.core.tls.face import FaceTls
from twostroke.router.api.frontend import Frontend
from twostroke.router.api.http import connection, connections, handshake
from twostroke.router.api.http.app import make_app
from twostroke.router.api.http.connections import Connections
from twostroke.router.config import RouterConfig
from twostroke.router.requests.flow import Flow

GET = b"GET /ping HTTP/1.1\r\nhost: localhost\r\n\r\n"


@asynccontextmanager
async def served(directory: Path, most: int = 64, ca: str | None = None) -> AsyncIterator[tuple[int, Connections]]:
    """A server with TLS; its port and its connections."""
    face = FaceTls(str(directory / "router.pem"), str(directory / "router.key"), ca)
    among = Connections(most, 5.0, context=face.http_context())
    config = RouterConfig()
    app = make_app(config, Frontend(config, Flow(config, b"k" * 32, proof_key=b"p" * 32)))
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(
            app, http=cast(Any, among.protocol), ws="none", lifespan="off", log_level="warning", access_log=False
        )
    )
    task = asyncio.create_task(server.serve([listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    yield listener.getsockname()[1], among
    among.close_handshakes()
    server.should_exit = server.force_exit = True
    await task


def trusting(directory: Path, *, shows: str | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(directory / "ca.pem"))
    if shows:
        context.load_cert_chain(directory / f"{shows}.pem", directory / f"{shows}.key")
    return context


async def get(port: int, context: ssl.SSLContext) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="localhost")
    writer.write(GET)
    try:
        return await asyncio.wait_for(reader.readline(), 60)
    finally:
        writer.close()


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def test_https_is_answered_and_its_connections_count(tmp_path):
    made(tmp_path)
    async with served(tmp_path) as (port, among):
        assert (await get(port, trusting(tmp_path))).startswith(b"HTTP/1.1 503")  # no worker is there
        await until(lambda: len(among) == 0)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET)  # without TLS
        assert b"HTTP" not in await reader.read()
        await until(lambda: len(among) == 0)


async def test_a_connection_without_a_handshake_is_counted_and_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(handshake, "HANDSHAKE_S", 0.3)
    made(tmp_path)
    async with served(tmp_path) as (port, among):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await until(lambda: len(among) == 1)
        assert await asyncio.wait_for(reader.read(), 60) == b""
        await until(lambda: len(among) == 0)
        writer.close()


async def test_half_handshakes_make_room_for_who_is_in_earnest(tmp_path, monkeypatch):
    monkeypatch.setattr(connections, "SLOW_HEAD_S", 0.0)
    made(tmp_path)
    most = 8
    async with served(tmp_path, most) as (port, among):
        half = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3 * most)]
        for _, writer in half:
            with contextlib.suppress(OSError):
                writer.write(b"\x16\x03\x01\x00\xc8\x01")  # a ClientHello begins
        await until(lambda: len(among) == most)
        assert (await get(port, trusting(tmp_path))).startswith(b"HTTP/1.1 503 ")
        assert len(among) <= most
        for _, writer in half:
            writer.close()
        await until(lambda: len(among) == 0)


async def test_a_slow_head_is_refused_behind_tls(tmp_path, monkeypatch):
    monkeypatch.setattr(connection, "HEAD_S", 0.3)
    monkeypatch.setattr(connections, "LOOK_S", 0.1)
    made(tmp_path)
    async with served(tmp_path) as (port, _):
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=trusting(tmp_path), server_hostname="localhost"
        )
        writer.write(b"GET /ping HT")
        assert b"408" in await asyncio.wait_for(reader.readline(), 60)
        writer.close()


async def test_new_connections_get_new_certificates(tmp_path):
    made(tmp_path)
    async with served(tmp_path) as (port, _):
        context = trusting(tmp_path)
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="localhost")
        before = writer.get_extra_info("ssl_object").getpeercert()
        renew(tmp_path, 5)
        await get(port, context)
        _, other = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="localhost")
        assert other.get_extra_info("ssl_object").getpeercert()["serialNumber"] != before["serialNumber"]
        writer.write(GET)  # the old connection goes on
        assert (await asyncio.wait_for(reader.readline(), 60)).startswith(b"HTTP/1.1 503")
        for each in (writer, other):
            each.close()


async def test_clients_must_show_certificates_where_it_is_asked(tmp_path):
    made(tmp_path)
    async with served(tmp_path, ca=str(tmp_path / "ca.pem")) as (port, among):
        with pytest.raises((ssl.SSLError, OSError, AssertionError)):
            assert await get(port, trusting(tmp_path))
        assert (await get(port, trusting(tmp_path, shows="operator"))).startswith(b"HTTP/1.1 503")
        await until(lambda: len(among) == 0)


def test_files_that_do_not_fit_are_named(tmp_path):
    made(tmp_path)
    with pytest.raises(ConfigError, match=r"router\.ssl_keyfile.*belong together"):
        FaceTls(str(tmp_path / "router.pem"), str(tmp_path / "worker.key"), None)
    with pytest.raises(ConfigError, match=r"router\.ssl_certfile is .*nothing\.pem"):
        FaceTls(str(tmp_path / "nothing.pem"), None, None)
