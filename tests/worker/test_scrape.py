"""A worker's HTTP port against clients of every kind: scrapers, probes, and those that only hold a connection."""

import asyncio
import ssl
from dataclasses import replace
from http import HTTPStatus

import pytest
from support.clusters.certificates import DEPLOYMENT, HOSTS, made
from support.clusters.flow_cluster import until
from support.fakes.ear import Ear

from twostroke.cluster.authority import renew
from twostroke.core.errors import ConfigError
from twostroke.core.request import Role
from twostroke.core.tls.callers import Caller, name_of
from twostroke.core.tls.identity import TlsIdentity
from twostroke.worker import scrape
from twostroke.worker.scrape import ScrapeServer


def page(accept: str):
    return HTTPStatus.OK, "text/plain", f"accepts {accept}".encode()


def broken(accept: str):
    raise ZeroDivisionError(accept)


def huge(accept: str):
    return HTTPStatus.OK, "text/plain", bytes(64 << 20)  # more than sockets hold


@pytest.fixture
async def server():
    server = ScrapeServer({"/metrics": page, "/broken": broken, "/huge": huge}, exchange_s=1.0)
    host, port = (await server.start("127.0.0.1", 0)).split(":")
    yield host, int(port)
    await server.close()


async def ask(server, request: bytes) -> tuple[str, bytes]:
    """Status line and body of the answer; empty ones when the connection was cut off."""
    reader, writer = await asyncio.open_connection(*server)
    try:
        writer.write(request)
        answer = await asyncio.wait_for(reader.read(), 60)
    except ConnectionError:
        return "", b""
    finally:
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.decode().split("\r\n")[0], body


CASES = {
    b"GET /metrics HTTP/1.1\r\nHost: localhost:1\r\nAccept: text/plain\r\n\r\n": (
        "HTTP/1.1 200 OK",
        b"accepts text/plain",
    ),
    b"GET /metrics?x=1 HTTP/1.0\r\n\r\n": ("HTTP/1.1 200 OK", b"accepts "),
    b"HEAD /metrics HTTP/1.1\r\n\r\n": ("HTTP/1.1 200 OK", b""),
    b"GET / HTTP/1.1\r\n\r\n": ("HTTP/1.1 404 Not Found", b"no such page here; known: /broken, /huge, /metrics\n"),
    b"POST /metrics HTTP/1.1\r\n\r\n": ("HTTP/1.1 405 Method Not Allowed", b"GET only\n"),
    b"GET /broken HTTP/1.1\r\n\r\n": ("HTTP/1.1 500 Internal Server Error", b"the worker's log has more\n"),
    b"\x00\xff\xff\r\n\r\n": ("HTTP/1.1 404 Not Found", b"no such page here; known: /broken, /huge, /metrics\n"),
    b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 2 * scrape.MAX_HEAD_BYTES + b"\r\n\r\n": ("", b""),
}


@pytest.mark.parametrize("request_", CASES, ids=lambda value: value[:20].decode("latin-1"))
async def test_answers(server, request_: bytes):
    assert await ask(server, request_) == CASES[request_]


@pytest.mark.parametrize("head", ["evil.example", "localhost.evil.example:1", "", "10.0.0.1"])
async def test_a_rebound_name_reads_nothing(server, head: str):
    for path in (b"/metrics", b"/nowhere"):
        answer = await ask(server, b"GET " + path + b" HTTP/1.1\r\nHost: " + head.encode() + b"\r\n\r\n")
        assert answer == ("HTTP/1.1 403 Forbidden", b"not by that name: ask for localhost\n")


async def test_where_there_are_keys_metrics_want_one_and_probes_do_not():
    server = ScrapeServer({"/metrics": page, "/health": page}, keys=("key-of-one-tenant", "key-of-another"))
    host, port = (await server.start("127.0.0.1", 0)).split(":")
    statuses = {}
    for given in (
        "",
        "Bearer",
        "Bearer wrong",
        "Basic key-of-another",
        "Bearer key-of-another",
        "bearer  key-of-one-tenant",
    ):
        head = f"GET /metrics HTTP/1.1\r\nHost: worker.lan\r\nAuthorization: {given}\r\n\r\n"
        statuses[given] = (await ask((host, int(port)), head.encode()))[0].split()[1]
    try:
        assert list(statuses.values()) == ["401"] * 4 + ["200"] * 2
        assert (await ask((host, int(port)), b"GET /metrics HTTP/1.1\r\n\r\n"))[0] == "HTTP/1.1 401 Unauthorized"
        assert (await ask((host, int(port)), b"GET /health HTTP/1.1\r\nHost: 10.0.0.1\r\n\r\n"))[0] == "HTTP/1.1 200 OK"
    finally:
        await server.close()


async def test_on_a_public_address_any_name_will_do():
    server = ScrapeServer({"/metrics": page})
    _, port = (await server.start("0.0.0.0", 0)).split(":")
    try:
        answer = await ask(("127.0.0.1", int(port)), b"GET /metrics HTTP/1.1\r\nHost: worker.lan\r\n\r\n")
        assert answer[0] == "HTTP/1.1 200 OK"
    finally:
        await server.close()


async def test_a_silent_client_is_let_go_of(server):
    assert await ask(server, b"GET /metr") == ("", b"")  # at the deadline of the exchange, not of this test


async def test_connections_are_bounded_and_room_comes_back(server):
    idle = [await asyncio.open_connection(*server) for _ in range(scrape.MAX_CONNECTIONS)]
    assert await ask(server, b"GET /metrics HTTP/1.1\r\n\r\n") == ("", b"")
    for _, writer in idle:
        writer.close()
    async with asyncio.timeout(60):
        while (await ask(server, b"GET /metrics HTTP/1.1\r\n\r\n"))[0] != "HTTP/1.1 200 OK":
            await asyncio.sleep(0.01)


async def test_a_client_that_reads_nothing_is_let_go_of(server, monkeypatch):
    monkeypatch.setattr(scrape, "MAX_CONNECTIONS", 1)
    reader, writer = await asyncio.open_connection(*server)
    writer.write(b"GET /huge HTTP/1.1\r\n\r\n")
    await reader.readexactly(10)  # it is being answered
    async with asyncio.timeout(60):
        while (await ask(server, b"GET /metrics HTTP/1.1\r\n\r\n"))[0] != "HTTP/1.1 200 OK":
            await asyncio.sleep(0.05)
    writer.close()


PROBED = ("/livez", "/health", "/readyz")


async def probed(worker) -> str:
    """Status codes of the three pages for probes, which need no key."""
    host, port = worker.metrics_address.split(":")
    lines = [(await ask((host, int(port)), f"GET {path} HTTP/1.1\r\n\r\n".encode()))[0] for path in PROBED]
    return " ".join(line.split()[1] for line in lines)


async def test_probes_tell_a_working_engine_from_a_serving_worker_and_from_one_that_a_router_knows(start_worker):
    ear = Ear()
    server, address = await ear.listen()
    worker = await start_worker(Role.DECODE, routers=(address,), metrics_keys=("k" * 16,))
    await until(lambda: worker._announcer.num_answering)
    assert await probed(worker) == "200 200 200"
    await server.stop(0)
    await until(lambda: not worker._announcer.num_answering)
    assert await probed(worker) == "200 200 503"
    await worker.drain(0.0)
    assert await probed(worker) == "200 503 503"
    worker.health._phase = "broken"
    assert await probed(worker) == "503 503 503"


async def test_the_queue_of_prompts_is_exported_in_tokens(start_worker):
    worker = await start_worker(Role.PREFILL)
    load = replace(worker.dispatcher.last_load, queued_prefill_tokens=345)
    body, _ = worker._metrics.render(load, "")
    assert 'twostroke_queued_prompt_tokens{engine="prefill-0",model_name="tiny"} 345.0' in body.decode()


async def test_a_taken_port_is_named_with_the_remedy(server):
    host, port = server
    with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port} cannot be bound.*--metrics-port"):
        await ScrapeServer({}).start(host, port)


async def test_a_worker_without_the_port_announces_none(start_worker):
    worker = await start_worker(Role.COMBINED, metrics_port=None)
    assert worker.info().metrics_address == ""


async def test_a_workers_port_ends_with_it(start_worker):
    worker = await start_worker(Role.COMBINED)
    host, port = worker.info().metrics_address.split(":")
    status, body = await ask((host, int(port)), b"GET /metrics HTTP/1.1\r\n\r\n")
    assert status == "HTTP/1.1 200 OK"
    assert b'vllm:num_requests_running{engine="combined-0",model_name="tiny"} 0.0' in body
    assert (await ask((host, int(port)), b"GET /health HTTP/1.1\r\n\r\n"))[0] == "HTTP/1.1 200 OK"
    worker.faces.decode.draining.is_on = True
    assert (await ask((host, int(port)), b"GET /health HTTP/1.1\r\n\r\n"))[0] == "HTTP/1.1 503 Service Unavailable"
    await worker.stop(0.0)
    with pytest.raises(ConnectionError):
        await asyncio.open_connection(host, int(port))


# ---------------------------------------------------------------- with certificates


def trusting(directory) -> ssl.SSLContext:
    """What a scraper needs: the authority, and the name that the certificate must have."""
    context = ssl.create_default_context(cafile=directory / "ca.pem")
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


async def over_tls(address: str, directory) -> tuple[str, bytes]:
    """First line of the answer to a scrape, and the certificate that was shown."""
    host, port = address.split(":")
    name = name_of(DEPLOYMENT, Caller.WORKER)
    reader, writer = await asyncio.open_connection(host, int(port), ssl=trusting(directory), server_hostname=name)
    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
    line = (await reader.read()).split(b"\r\n")[0].decode()
    writer.close()
    return line, shown


async def test_where_links_have_certificates_a_scrape_sees_the_workers_present_one(start_worker, tmp_path):
    worker = await start_worker(Role.DECODE, tls=made(tmp_path))
    line, before = await over_tls(worker.metrics_address, tmp_path)
    assert line == "HTTP/1.1 200 OK"
    host, port = worker.metrics_address.split(":")
    assert await ask((host, int(port)), b"GET /metrics HTTP/1.1\r\n\r\n") == ("", b"")
    renew(tmp_path, 10, HOSTS)
    line, after = await over_tls(worker.metrics_address, tmp_path)
    assert line == "HTTP/1.1 200 OK"
    assert after != before


async def test_connections_that_shake_no_hands_are_counted_and_end(monkeypatch, tmp_path):
    monkeypatch.setattr(scrape, "MAX_CONNECTIONS", 2)
    identity = TlsIdentity(made(tmp_path), Caller.WORKER)
    server = ScrapeServer({"/metrics": page}, exchange_s=1.0, context=identity.http_context())
    address = await server.start("127.0.0.1", 0)
    host, port = address.split(":")
    silent = [await asyncio.open_connection(host, int(port)) for _ in range(2)]
    with pytest.raises((OSError, ssl.SSLError)):
        await over_tls(address, tmp_path)
    for reader, _ in silent:
        async with asyncio.timeout(60):
            assert await reader.read() == b""
    assert (await over_tls(address, tmp_path))[0] == "HTTP/1.1 200 OK"
    for _, writer in silent:
        writer.close()
    await server.close()
