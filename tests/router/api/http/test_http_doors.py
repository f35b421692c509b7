"""What the HTTP face does before a request reaches a worker: keys, pages of other origins, encodings, paths.

No worker is there, so whatever passes is answered with 503.
"""

import asyncio
import gzip
import json
import tracemalloc
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from twostroke import __version__
from twostroke.cli.options import config_from
from twostroke.cluster.config import load_config
from twostroke.core.errors import ConfigError
from twostroke.router.api.frontend import Frontend
from twostroke.router.api.http.app import make_app
from twostroke.router.config import RouterConfig
from twostroke.router.requests.flow import Flow

COMPLETIONS = "/v1/completions"
BODY = json.dumps({"prompt": "x"}).encode()
PAGE = "http://page.example"
PASSED = 503


@asynccontextmanager
async def doors(**settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    config = RouterConfig(**settings)
    front = Frontend(config, Flow(config, b"k" * 32, proof_key=b"p" * 32))
    transport = httpx.ASGITransport(make_app(config, front))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
        yield client


def code(reply: httpx.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["code"]


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer a-secret"},
        {"authorization": "bearer  a-secret"},
        {"Api-key": "a-secret"},
        {"x-api-key": "a-secret"},
        {"authorization": "Basic dTpw", "x-api-key": "a-secret"},
    ],
    ids=str,
)
async def test_a_key_is_found_where_clients_put_it(headers: dict[str, str]):
    async with doors(api_keys=("a-secret",)) as client:
        assert (await client.post(COMPLETIONS, content=BODY, headers=headers)).status_code == PASSED
        assert (await client.get("/v1/models", headers=headers)).status_code == 200
        assert code(await client.get("/v1/models", headers={"x-api-key": "other"})) == (401, "invalid_api_key")


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/chat/completions"])
async def test_nobodys_body_is_read_without_a_key(path: str):
    """Not even waited for: the answer is there before any of it."""

    async def never() -> AsyncIterator[bytes]:
        await asyncio.sleep(60)
        yield b""

    async with doors(api_keys=("a-secret",)) as client:
        async with asyncio.timeout(60):
            reply = await client.post(path, content=never(), headers={"authorization": "Bearer wrong"})
        assert code(reply) == (401, "invalid_api_key")


# ---------------------------------------------------------------- web pages

PREFLIGHT = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-os",
}


async def test_by_default_a_page_can_neither_ask_nor_read():
    async with doors() as client:
        reply = await client.options(COMPLETIONS, headers=PREFLIGHT)
        assert code(reply) == (403, "origin_not_allowed")
        assert "access-control-allow-origin" not in reply.headers
        reply = await client.post(COMPLETIONS, content=BODY, headers={"origin": PAGE, "content-type": "text/plain"})
        assert code(reply) == (403, "origin_not_allowed")
        assert "--allowed-origins" in reply.json()["error"]["message"]
        for odd in ("null", "", "http://[", "x" * 10_000, "http://evillocalhost:8000", "http://localhost:8000.evil"):
            reply = await client.post(COMPLETIONS, content=BODY, headers={"origin": odd, "sec-fetch-site": "same-site"})
            assert code(reply) == (403, "origin_not_allowed")
            assert len(reply.content) < 400
        reply = await client.get("/v1/models", headers={"origin": PAGE})
        assert code(reply) == (403, "origin_not_allowed")
        assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize(
    "headers", [{"origin": "http://localhost:8000"}, {"origin": "https://proxy", "sec-fetch-site": "same-origin"}, {}]
)
async def test_the_routers_own_pages_and_programs_may_ask(headers: dict[str, str]):
    headers = headers | {"content-type": "application/json"}
    async with doors() as client:
        assert (await client.post(COMPLETIONS, content=BODY, headers=headers)).status_code == PASSED


async def test_with_keys_a_page_needs_one_as_everybody_does():
    async with doors(api_keys=("a-secret",)) as client:
        headers = {"origin": PAGE}
        assert (await client.post(COMPLETIONS, content=BODY, headers=headers)).status_code == 401
        headers |= {"authorization": "Bearer a-secret"}
        assert (await client.post(COMPLETIONS, content=BODY, headers=headers)).status_code == PASSED


async def test_an_allowed_page_asks_first_without_a_key_and_then_reads():
    settings: dict[str, Any] = {"api_keys": ("a-secret",), "allowed_origins": (PAGE,)}
    async with doors(**settings) as client:
        reply = await client.options(COMPLETIONS, headers=PREFLIGHT)
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-origin"] == PAGE
        assert "authorization" in reply.headers["access-control-allow-headers"]
        assert "access-control-allow-credentials" not in reply.headers
        assert (await client.options(COMPLETIONS, headers=PREFLIGHT | {"origin": "http://x"})).status_code == 400
        headers = {"origin": PAGE, "authorization": "Bearer a-secret"}
        reply = await client.post(COMPLETIONS, content=BODY, headers=headers)
        assert reply.status_code == PASSED
        assert reply.headers["access-control-allow-origin"] == PAGE
        assert "x-twostroke-ignored" in reply.headers["access-control-expose-headers"]


async def test_all_origins_some_methods_and_headers_and_credentials():
    settings: dict[str, Any] = {
        "allowed_origins": '["*"]',
        "allowed_methods": "GET, POST",
        "allowed_headers": ["content-type"],
        "allow_credentials": True,
    }
    async with doors(**settings) as client:
        asked = PREFLIGHT | {"access-control-request-headers": "content-type"}
        reply = await client.options(COMPLETIONS, headers=asked)
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-methods"] == "GET, POST"
        assert reply.headers["access-control-allow-credentials"] == "true"
        assert (await client.options(COMPLETIONS, headers=PREFLIGHT)).status_code == 400
        assert (await client.post(COMPLETIONS, content=BODY, headers={"origin": PAGE})).status_code == PASSED


@pytest.mark.parametrize("text", ['["http://a", "http://b"]', "http://a,http://b", "http://a, http://b"])
def test_origins_are_given_as_a_list_or_with_commas(text: str):
    flag = load_config(flags={"router.allowed_origins": text})
    variable = load_config(environment={"TWOSTROKE__ROUTER__ALLOWED_ORIGINS": text})
    assert flag.router.allowed_origins == variable.router.allowed_origins == ("http://a", "http://b")


def test_origins_that_are_no_list_are_refused():
    with pytest.raises(ConfigError, match=r"router\.allowed_origins"):
        load_config(flags={"router.allowed_origins": '["http://a"'})


# ---------------------------------------------------------------- encodings


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "x-gzip"])
async def test_a_packed_body_is_unpacked(encoding: str):
    async with doors() as client:
        reply = await client.post(COMPLETIONS, content=gzip.compress(BODY), headers={"content-encoding": encoding})
        assert reply.status_code == PASSED


@pytest.mark.parametrize("encoding", ["br", "zstd", "deflate", "gzip, gzip"])
async def test_other_ways_to_pack_are_refused_with_the_remedy(encoding: str):
    async with doors() as client:
        reply = await client.post(COMPLETIONS, content=zlib.compress(BODY), headers={"content-encoding": encoding})
        assert code(reply) == (415, "unsupported_encoding")
        assert "gzip" in reply.json()["error"]["message"]


async def test_a_packed_body_is_bounded_as_it_unpacks():
    bomb = gzip.compress(b" " * 30_000_000)
    async with doors(max_body_bytes=len(bomb)) as client:
        tracemalloc.start()
        reply = await client.post(COMPLETIONS, content=bomb, headers={"content-encoding": "gzip"})
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert code(reply) == (413, "body_too_large")
        assert peak_bytes < 3_000_000
        fits = gzip.compress(b" " * (len(bomb) - len(BODY)) + BODY)
        reply = await client.post(COMPLETIONS, content=fits, headers={"content-encoding": "gzip"})
        assert reply.status_code == PASSED


@pytest.mark.parametrize(
    "data", [BODY, gzip.compress(BODY)[:-4], gzip.compress(BODY) * 2, b""], ids=["plain", "cut", "two", "none"]
)
async def test_what_is_not_gzip_is_said_to_be_none(data: bytes):
    async with doors() as client:
        reply = await client.post(COMPLETIONS, content=data, headers={"content-encoding": "gzip"})
        assert code(reply) == (400, "invalid_value")


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/json; charset=utf-8"])
async def test_any_content_type_of_a_program_is_taken(content_type: str | None):
    headers = {"content-type": content_type} if content_type else {}
    async with doors() as client:
        assert (await client.post(COMPLETIONS, content=BODY, headers=headers)).status_code == PASSED


# ---------------------------------------------------------------- paths


async def test_where_balancers_and_clients_probe():
    async with doors(api_keys=("a-secret",)) as client:
        for method, path in (("GET", "/health"), ("HEAD", "/health"), ("GET", "/ping"), ("POST", "/ping")):
            assert (await client.request(method, path)).status_code == PASSED, path
        assert (await client.get("/version")).status_code == 401
        reply = await client.get("/version", headers={"api-key": "a-secret"})
        assert reply.json() == {"version": __version__}
        assert code(await client.get("/")) == (401, "invalid_api_key"), "nor is a stranger told which routes there are"
        assert (await client.head("/", headers={"api-key": "a-secret"})).status_code == 200
        assert code(await client.get("/nothing", headers={"api-key": "a-secret"})) == (404, "not_found")
        reply = await client.post("/chat/completions", content=BODY, headers={"api-key": "a-secret"})
        assert code(reply) == (404, "not_found")
        assert "/v1/chat/completions" in reply.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/models/", "/v1//models", "/v1//models//"])
async def test_a_slash_too_many_means_nothing(path: str):
    async with doors() as client:
        assert (await client.get(path)).json() == {"object": "list", "data": []}


async def test_strict_refuses_what_is_named_otherwise():
    odd = json.dumps({"prompt": "x", "temperture": 0}).encode()
    async with doors() as client:
        reply = await client.post(COMPLETIONS, content=odd)
        assert (reply.status_code, reply.headers["x-twostroke-ignored"]) == (PASSED, "temperture")
    async with doors(strict=True) as client:
        reply = await client.post(COMPLETIONS, content=odd)
        assert code(reply) == (400, "invalid_value")
        assert "did you mean temperature?" in reply.json()["error"]["message"]


def test_the_flags_are_the_settings_of_these_names():
    given = {"strict": True, "allowed_origins": f'["{PAGE}"]', "allowed_methods": "POST", "allow_credentials": True}
    router = config_from(given | {"allowed_headers": '["*"]'}).router
    assert (router.strict, router.allowed_origins, router.allowed_methods) == (True, (PAGE,), ("POST",))
    assert (router.allowed_headers, router.allow_credentials) == (("*",), True)
