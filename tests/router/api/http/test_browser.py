"""Web pages against a router on loopback: by rebound names, by requests that need no asking, by links.

No worker is there, so a completion that passes is answered with 503.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import replace
from socket import create_connection
from typing import Any

import httpx
import pytest

from twostroke.core.errors import Unauthenticated
from twostroke.core.hosts import is_allowed_name, is_loopback_name, name_in
from twostroke.core.ports import free_ports
from twostroke.router.api.frontend import Frontend
from twostroke.router.api.http.app import make_app
from twostroke.router.api.http.page import page
from twostroke.router.api.validate import Limits, authenticate
from twostroke.router.config import RouterConfig
from twostroke.router.keys.grants import KeyRing
from twostroke.router.process import RouterProcess
from twostroke.router.requests.flow import Flow

ROUTES = ("/v1/models", "/v1/models/x", "/v1/cluster", "/v1/requests/x/explain", "/metrics", "/version", "/nowhere")
ROUTES += ("/healthy", "/pings/x")  # begin as what balancers may ask
BODY = b'{"prompt": "x"}'
PASSED = 503
KEY = "k" * 16

Pairs = Sequence[tuple[str, str]]


async def ask(config: RouterConfig, method: str, path: str, headers: Pairs, version: str = "1.1") -> httpx.Response:
    """One request with exactly these headers, in this order, through the whole application."""
    app = make_app(config, Frontend(config, Flow(config, b"k" * 32, proof_key=b"p" * 32)))
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": version,
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    sent: list[Any] = []
    body = [{"type": "http.request", "body": BODY if method == "POST" else b"", "more_body": False}]

    async def receive():
        return body.pop() if body else await asyncio.Event().wait()  # the client stays

    async def send(message):
        sent.append(message)

    async with asyncio.timeout(60):
        await app(scope, receive, send)
    content = b"".join(message.get("body", b"") for message in sent[1:])
    return httpx.Response(sent[0]["status"], headers=sent[0]["headers"], content=content)


def code(reply: httpx.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["code"]


# ---------------------------------------------------------------- the name that is asked for

LOOPBACK = (
    *("localhost", "localhost:8000", "LocalHost.", "llm.localhost:1", "localhost:", "127.0.0.1", "127.0.0.1:8000"),
    *("127.8.9.10", "[::1]", "[::1]:8000", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]:8000", " localhost "),
)
OTHERS = (
    *("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "xlocalhost", ""),
    *("127.0.0.1@evil.example", "evil.example#localhost", "localhost:80a", "localhost:999999", "[::1%25lo]", "::1"),
    *("[::1", "0.0.0.0:8000", "192.168.1.1", "[fe80::1]", "localhost,evil.example", "localhost..", "h\u00f6st", "."),
)


@pytest.mark.parametrize("host", LOOPBACK)
async def test_loopback_names_are_the_routers_own(host: str):
    assert (await ask(RouterConfig(), "GET", "/v1/models", [("host", host)])).status_code == 200


@pytest.mark.parametrize("host", OTHERS)
async def test_other_names_are_refused_with_the_remedy(host: str):
    reply = await ask(RouterConfig(), "GET", "/v1/models", [("host", host), ("x-forwarded-host", "localhost")])
    assert code(reply) == (403, "host_not_allowed")
    assert "--allowed-hosts" in reply.json()["error"]["message"]
    assert reply.headers["x-request-id"]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS"])
async def test_no_route_answers_to_a_rebound_name(path: str, method: str):
    reply = await ask(RouterConfig(), method, path, [("host", "evil.example")])
    assert reply.status_code == 403


async def test_a_long_name_is_cut():
    reply = await ask(RouterConfig(), "GET", "/v1/models", [("host", "x" * 10_000)])
    assert code(reply) == (403, "host_not_allowed")
    assert len(reply.content) < 500


@pytest.mark.parametrize(
    "hosts", [[], [("host", "localhost"), ("host", "evil.example")], [("host", "localhost"), ("host", "localhost")]]
)
async def test_a_request_names_one_host(hosts: Pairs):
    assert code(await ask(RouterConfig(), "GET", "/v1/models", hosts)) == (400, "invalid_value")
    if not hosts:  # HTTP/1.0 had none, and no browser speaks it
        assert (await ask(RouterConfig(), "GET", "/v1/models", hosts, version="1.0")).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ping", "/health/"])
async def test_probes_ask_by_any_name(path: str):
    reply = await ask(RouterConfig(), "GET", path, [("host", "10.0.0.7:8000"), ("sec-fetch-site", "cross-site")])
    assert code(reply) == (503, "unavailable")  # no worker is there


async def test_names_can_be_allowed_and_then_no_others():
    for host in ({}, {"host": "0.0.0.0", "insecure": True}, {"api_keys": (KEY,)}):
        config = RouterConfig(allowed_hosts=("LLM.example.com", "*.lan"), **host)
        for name in ("llm.example.com", "llm.example.com.", "a.b.lan:80", "localhost", "127.0.0.1"):
            headers = [("host", name), ("authorization", f"Bearer {KEY}")]
            assert (await ask(config, "GET", "/v1/models", headers)).status_code == 200, name
        for name in ("example.com", "lan", "evillan", "x.llm.example.com"):
            headers = [("host", name), ("authorization", f"Bearer {KEY}")]
            assert code(await ask(config, "GET", "/v1/models", headers)) == (403, "host_not_allowed"), name
    config = RouterConfig(allowed_hosts="*")
    assert (await ask(config, "GET", "/v1/models", [("host", "any.example")])).status_code == 200


async def test_with_keys_or_on_a_public_address_names_are_the_operators_business():
    keyed, public = RouterConfig(api_keys=(KEY,)), RouterConfig(host="0.0.0.0", insecure=True)
    for config in (keyed, public):
        headers = [("host", "gpu7.lan"), ("authorization", f"Bearer {KEY}")]
        assert (await ask(config, "GET", "/v1/models", headers)).status_code == 200


def test_names_are_read_as_browsers_write_them():
    assert name_in("[::1]:8000") == "::1"
    assert name_in("EXAMPLE.com.:80") == "example.com"
    assert name_in("a b") is None
    assert not is_loopback_name("127.0.0.1.nip.io")
    assert is_allowed_name("::1", ["[::1]"])
    assert not is_allowed_name("example.com", ["*.example.com"])


async def test_on_the_wire_neither_an_absolute_target_nor_a_second_host_changes_the_answer():
    ports = dict(zip(("port", "grpc_port", "internal_port"), free_ports("127.0.0.1", 3), strict=True))
    router = RouterProcess(RouterConfig(**ports), "a key of the tests")
    heads = {
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n": b"200",
        b"GET http://localhost/v1/models HTTP/1.1\r\nHost: evil.example\r\n": b"403",
        b"GET http://evil.example/v1/models HTTP/1.1\r\nHost: evil.example\r\n": b"403",
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n": b"400",
        b"GET /v1/models HTTP/1.0\r\n": b"200",
    }

    def status_of(head: bytes) -> bytes:
        with create_connection(("127.0.0.1", ports["port"]), 10) as sock:
            sock.sendall(head + b"Connection: close\r\n\r\n")
            return sock.makefile("rb").readline().split()[1]

    try:
        await router.start()
        async with asyncio.timeout(60), httpx.AsyncClient(trust_env=False) as client:
            while True:  # its loop begins to listen a moment later
                with contextlib.suppress(httpx.ConnectError):
                    await client.get(f"http://127.0.0.1:{ports['port']}/health")
                    break
                await asyncio.sleep(0.01)
            assert {head: await asyncio.to_thread(status_of, head) for head in heads} == heads
    finally:
        await router.stop(0.0)


# ---------------------------------------------------------------- requests that need no asking

SIMPLE = (
    None,
    "text/plain",
    "text/plain;charset=UTF-8",
    "application/x-www-form-urlencoded",
    "multipart/form-data",
    "",
)
BROWSER = (
    ("origin", "http://localhost:8000"),
    ("sec-fetch-site", "same-origin"),
    ("sec-fetch-mode", "cors"),
    ("referer", "http://evil.example/"),
    ("user-agent", "Mozilla/5.0 (Windows NT 6.1; Trident/7.0; rv:11.0) like Gecko"),
)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("sign", BROWSER, ids=lambda sign: sign[0])
async def test_a_browser_must_say_json(sign: tuple[str, str], path: str):
    base = [("host", "localhost:8000"), sign]
    for kind in SIMPLE:
        headers = base + ([("content-type", kind)] if kind is not None else [])
        assert code(await ask(RouterConfig(), "POST", path, headers)) == (415, "unsupported_content_type"), kind
    for kind in ("application/json", "Application/JSON; charset=utf-8", "application/problem+json"):
        reply = await ask(RouterConfig(), "POST", path, [*base, ("content-type", kind)])
        assert reply.status_code not in (403, 415), kind


@pytest.mark.parametrize("kind", SIMPLE)
async def test_programs_and_keyed_or_allowed_pages_say_what_they_like(kind: str | None):
    headers = [("host", "localhost"), ("user-agent", "curl/8.5.0")]
    headers += [("content-type", kind)] if kind is not None else []
    assert (await ask(RouterConfig(), "POST", "/v1/completions", headers)).status_code == PASSED
    page = [*headers[:1], *headers[2:], ("origin", "http://page.example"), ("user-agent", "Mozilla/5.0")]
    keyed = [*page, ("authorization", f"Bearer {KEY}")]
    assert (await ask(RouterConfig(api_keys=(KEY,)), "POST", "/v1/completions", keyed)).status_code == PASSED
    allowed = RouterConfig(allowed_origins=("http://page.example",))
    assert (await ask(allowed, "POST", "/v1/completions", page)).status_code == PASSED


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
async def test_a_page_that_names_no_origin_is_foreign_unless_a_link_was_followed(site: str):
    headers = [("host", "localhost:8000"), ("sec-fetch-site", site)]
    for mode in ("no-cors", "cors", "websocket"):
        reply = await ask(RouterConfig(), "GET", "/v1/cluster", [*headers, ("sec-fetch-mode", mode)])
        assert code(reply) == (403, "origin_not_allowed")
    assert (
        await ask(RouterConfig(), "GET", "/v1/cluster", [*headers, ("sec-fetch-mode", "navigate")])
    ).status_code == 200


async def test_the_address_bar_and_pages_of_ours_may_look():
    for site in ("none", "same-origin"):
        headers = [("host", "localhost:8000"), ("sec-fetch-site", site)]
        assert (await ask(RouterConfig(), "GET", "/v1/cluster", headers)).status_code == 200


async def test_a_null_origin_is_foreign_even_where_some_are_allowed():
    config = RouterConfig(allowed_origins=("http://page.example",))
    for method in ("GET", "POST"):
        headers = [("host", "localhost"), ("origin", "null"), ("content-type", "application/json")]
        assert code(await ask(config, method, "/v1/models", headers)) == (403, "origin_not_allowed")


@pytest.mark.parametrize("given", [None, ""])
def test_no_key_is_no_key_whatever_is_configured(given: str | None):
    limits = Limits.of(RouterConfig())
    for keys in (("",), ("None",), (KEY,)):
        with pytest.raises(Unauthenticated):
            authenticate(given, replace(limits, keys=KeyRing.of(keys)))


# ---------------------------------------------------------------- the page


async def test_a_browser_is_shown_how_to_ask_and_others_the_plain_words():
    host = ("host", "localhost:8000")
    plain = await ask(RouterConfig(), "GET", "/", [host, ("accept", "*/*")])
    assert plain.text == "Twostroke is running"
    shown = await ask(RouterConfig(), "GET", "/", [host, ("accept", "text/html,application/xhtml+xml,*/*;q=0.8")])
    assert shown.headers["content-type"].startswith("text/html")
    assert "curl http://localhost:8000/v1/chat/completions" in shown.text
    assert '\'{"messages": [{' in shown.text
    assert "default-src 'none'" in shown.headers["content-security-policy"]
    assert "<script" not in shown.text


def test_the_page_shows_no_name_as_markup():
    shown = bytes(page("http://a<b>.example").body)
    assert b"http://a&lt;b&gt;.example/v1" in shown
    assert b"<b>" not in shown
