"""The routes that load and unload adapters: off by default, for the operator alone, bodies checked."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from twostroke.router.api.frontend import Frontend
from twostroke.router.api.http.app import make_app
from twostroke.router.config import RouterConfig
from twostroke.router.keys.digests import line_for
from twostroke.router.requests.flow import Flow

PASSED = 503  # no worker is there
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
BODIES = {LOAD: {"lora_name": "a", "lora_path": "/x"}, UNLOAD: {"lora_name": "a"}}
EACH = pytest.mark.parametrize("path", [LOAD, UNLOAD])


@asynccontextmanager
async def doors(**settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    config = RouterConfig(**settings)
    front = Frontend(config, Flow(config, b"k" * 32, proof_key=b"p" * 32))
    transport = httpx.ASGITransport(make_app(config, front))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
        yield client


@EACH
async def test_they_are_off_unless_asked_for(path: str):
    async with doors() as client:
        reply = await client.post(path, json=BODIES[path])
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found")
        assert "--enable-runtime-lora" in reply.json()["error"]["message"]


@EACH
async def test_a_key_must_be_the_operators(path: str):
    keys = {"api_keys": ("a-secret-of-clients",), "operator_key": line_for("a-secret-of-operators")}
    async with doors(runtime_lora=True, **keys) as client:

        async def ask(key: str | None) -> httpx.Response:
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            return await client.post(path, json=BODIES[path], headers=headers)

        assert (await ask(None)).status_code == 401
        assert (await ask("a-secret-of-clients")).status_code == 403
        assert (await ask("a-secret-of-operators")).status_code == PASSED


@EACH
async def test_without_keys_who_reaches_the_router_may_use_them(path: str):
    async with doors(runtime_lora=True) as client:
        assert (await client.post(path, json=BODIES[path])).status_code == PASSED


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"lora_path": "/x"}, "lora_name"),
        ({"lora_name": "a"}, "lora_path"),
        ({"lora_name": "", "lora_path": "/x"}, "lora_name"),
        ({"lora_name": "a" * 257, "lora_path": "/x"}, "lora_name"),
        ({"lora_name": "a", "lora_path": 5}, "lora_path"),
        ({"lora_name": "a", "lora_path": "/x", "load_inplace": "yes"}, "load_inplace"),
    ],
)
async def test_bodies_are_checked_by_field(body: dict[str, object], param: str):
    async with doors(runtime_lora=True) as client:
        reply = await client.post(LOAD, json=body)
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == param


async def test_vllms_own_number_is_taken_and_unknown_fields_are_named():
    async with doors(runtime_lora=True) as client:
        reply = await client.post(LOAD, json={**BODIES[LOAD], "lora_int_id": 3, "strange": 1})
        assert reply.status_code == PASSED
        assert reply.headers["x-twostroke-ignored"] == "strange"
