"""Keys, quotas, deadlines and refusals through the real HTTP server, as the official openai client sees them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from openai import AsyncOpenAI
from support.clusters.flow_cluster import Cluster, cluster, until
from support.fakes.fake_worker import MODEL, Behaviour, FakeWorker

from twostroke.core.ports import bound_socket
from twostroke.router.api import models
from twostroke.router.api.frontend import Frontend
from twostroke.router.api.http.app import make_app
from twostroke.router.config import RouterConfig
from twostroke.router.keys.digests import line_for
from twostroke.router.requests.admission.estimates import FullRate

ACME, ACME_TOO, BATCH = "sk-acme-first-key-123", "sk-acme-second-key-45", "sk-batch-key-67890123"
OPERATOR = "sk-key-of-the-operator-1"
KEYS = f"""
keys:
  - key: {line_for(ACME)}
    tenant: acme
    requests_per_minute: 2
  - key: {line_for(ACME_TOO)}
    tenant: acme
    models: [another]
  - key: {line_for(BATCH)}
    tenant: batch
    priority: 5
"""


class Served:
    def __init__(self, there: Cluster, front: Frontend, url: str) -> None:
        self.there, self.front, self.url = there, front, url

    def openai(self, key: str, **options: Any) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **options)

    def http(self, key: str | None = None) -> httpx.AsyncClient:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return httpx.AsyncClient(base_url=self.url, headers=headers)


@asynccontextmanager
async def served(folder: Path, *workers: FakeWorker, **settings: Any) -> AsyncIterator[Served]:
    file = folder / "keys.yaml"
    file.write_text(KEYS)
    config = RouterConfig(api_key_file=file, api_keys=(line_for(OPERATOR),), **settings)
    listener = bound_socket("127.0.0.1", 0, "")
    async with cluster(**settings) as there:
        front = Frontend(config, there.flow)
        server = uvicorn.Server(uvicorn.Config(make_app(config, front), lifespan="off", log_level="error"))
        serving = asyncio.create_task(server.serve([listener]))
        await there.add(*workers)
        await until(lambda: server.started)
        try:
            yield Served(there, front, f"http://127.0.0.1:{listener.getsockname()[1]}")
        finally:
            server.should_exit = True
            await serving
            listener.close()


def ask(client: AsyncOpenAI, **fields: Any) -> Any:
    return client.completions.create(**{"model": MODEL, "prompt": [1, 2, 3], "max_tokens": 3, **fields})


@pytest.fixture(autouse=True)
def _no_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake worker names a folder that does not exist; its tokenizer is not needed for token ids."""
    bundled = Path(__file__).resolve().parents[3] / "model" / "bundled"
    info = FakeWorker.info

    def with_checkpoint(self: FakeWorker) -> Any:
        message = info(self)
        message.model.path = str(bundled)
        return message

    monkeypatch.setattr(FakeWorker, "info", with_checkpoint)


async def test_a_quota_is_a_429_with_retry_after_for_the_official_client(tmp_path: Path) -> None:
    async with served(tmp_path, FakeWorker("w")) as there, there.openai(ACME) as client:
        await ask(client)
        await ask(client)
        with pytest.raises(openai.RateLimitError) as caught:
            await ask(client)
        assert caught.value.code == "rate_limit_exceeded"
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 30


async def test_a_full_router_is_a_429_with_retry_after_before_the_body_is_read(tmp_path: Path) -> None:
    go = asyncio.Event()
    held = FakeWorker("w", behaviour=Behaviour(hold_first=go))
    async with served(tmp_path, held, max_running=1) as there, there.openai(OPERATOR) as client:
        first = asyncio.create_task(ask(client))
        await until(lambda: held.submits)
        with pytest.raises(openai.RateLimitError) as caught:
            await ask(client)
        assert caught.value.code == "overloaded"
        assert int(caught.value.response.headers["retry-after"]) >= 1
        port = int(there.url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {OPERATOR}\r\n"
        writer.write(f"{head}content-length: 100\r\n\r\n".encode())  # and nothing of it comes
        reply = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
        assert b" 429 " in reply
        assert b"retry-after: " in reply
        writer.close()
        go.set()
        await first


async def test_the_clients_own_deadline_ends_its_request(tmp_path: Path) -> None:
    held = Behaviour(hold_first=asyncio.Event())
    async with served(tmp_path, FakeWorker("w", behaviour=held)) as there, there.openai(OPERATOR) as client:
        orders = there.there.workers[0].submits
        for timeout_s in (2, 10, 60):  # on a busy machine the first may pass before the order is sent
            with pytest.raises(openai.APIStatusError) as caught:
                await ask(client, extra_headers={"x-request-timeout": str(timeout_s)})
            assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
            if orders:
                break
        assert 0 < orders[0].timeout_ms <= timeout_s * 1000
        for wrong in ("soon", "-1", "0", "nan", "1e9", "1_0"):
            with pytest.raises(openai.BadRequestError, match="x-request-timeout"):
                await ask(client, extra_headers={"x-request-timeout": wrong})


async def test_the_key_bounds_the_priority_and_the_request_may_lower_it(tmp_path: Path) -> None:
    async with served(tmp_path, FakeWorker("w")) as there:
        for key, fields in ((BATCH, {}), (BATCH, {"priority": 0}), (BATCH, {"priority": 7}), (OPERATOR, {})):
            async with there.openai(key) as client:
                reply = await client.completions.with_raw_response.create(
                    model=MODEL, prompt=[1, 2], max_tokens=1, extra_body=fields
                )
                assert ("priority" in reply.headers.get("x-twostroke-ignored", "")) == (fields == {"priority": 0})
        assert [order.priority for order in there.there.workers[0].submits] == [995, 995, 993, 1000]


async def test_keys_of_one_tenant_share_prefixes_and_requests_and_others_do_not(tmp_path: Path) -> None:
    async with served(tmp_path, FakeWorker("w")) as there:
        for key in (ACME, BATCH, OPERATOR):
            async with there.openai(key) as client:
                await ask(client, extra_body={"request_id": "one-id"})
        domains = [order.isolation_domain for order in there.there.workers[0].submits]
        assert domains[:2] == ["tenant-acme", "tenant-batch"]
        assert len(set(domains)) == 3
        async with there.http(ACME_TOO) as same, there.http(BATCH) as other:
            explained = (await same.get("/v1/requests/one-id/explain")).json()
            assert explained["isolation_domain"] == "tenant-acme"
            assert (await other.get("/v1/requests/one-id/explain")).json()["isolation_domain"] == "tenant-batch"


async def test_a_key_is_confined_to_its_models_and_may_not_monitor_unless_it_says_so(tmp_path: Path) -> None:
    async with served(tmp_path, FakeWorker("w")) as there:
        async with there.openai(ACME_TOO) as client:
            assert [model.id async for model in client.models.list()] == []
            with pytest.raises(openai.NotFoundError) as caught:
                await ask(client)
            assert caught.value.code == "model_not_found"
        async with there.http(ACME) as client:
            for path in ("/metrics", "/v1/cluster"):
                reply = await client.get(path)
                assert (reply.status_code, reply.json()["error"]["code"]) == (403, "key_not_allowed")
        async with there.http(OPERATOR) as client:
            assert (await client.get("/metrics")).status_code == 200


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"])
async def test_every_route_and_method_is_closed_but_for_probes(tmp_path: Path, method: str) -> None:
    async with served(tmp_path, FakeWorker("w")) as there, there.http() as client:
        routes = [getattr(route, "path", "") for route in make_app(RouterConfig(), there.front).routes]
        assert len(routes) >= 10
        for path in (*routes, "/", "/v2", "/v1/completions/", "//metrics", "/health/x", "/docs", "/openapi.json"):
            reply = await client.request(method, path.replace("{", "").replace(":path}", "").replace("}", ""))
            is_probe = path.rstrip("/") in ("/health", "/ping")
            assert (reply.status_code == 401) == (not is_probe), (method, path, reply.status_code)


async def test_a_key_is_exchanged_without_a_restart(tmp_path: Path) -> None:
    async with served(tmp_path, FakeWorker("w")) as there, there.openai(BATCH) as old:
        await ask(old)
        fresh = "sk-a-fresh-key-of-batch"
        (tmp_path / "keys.yaml").write_text(KEYS.replace(line_for(BATCH), line_for(fresh)) + "\n")
        there.front.keys.look()
        with pytest.raises(openai.AuthenticationError):
            await ask(old)
        async with there.openai(fresh) as new:
            await ask(new)
        assert {order.isolation_domain for order in there.there.workers[0].submits} == {"tenant-batch"}


async def test_loading_a_model_says_nothing_of_how_fast_requests_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = models._load

    def slowly(*given: Any) -> Any:
        time.sleep(2.5)
        return load(*given)

    monkeypatch.setattr(models, "_load", slowly)
    async with served(tmp_path, FakeWorker("w")) as there, there.openai(OPERATOR) as client:
        await ask(client)
        assert there.front._read_rate.per_s(there.front.flow.clock.now_s()) is None
        assert there.front._num_loading == there.front._num_reading == 0
        await asyncio.gather(*(ask(client) for _ in range(2)))


async def test_reading_is_full_while_others_are_read_and_not_while_they_wait_for_their_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[bool] = []

    class Rate(FullRate):
        def see(self, now_s: float, *, is_full: bool) -> None:
            told.append(is_full)

    async with served(tmp_path, FakeWorker("w")) as there:
        monkeypatch.setattr(there.front, "_read_rate", Rate())
        for reading, loading in ((3, 0), (3, 2), (1, 0)):
            monkeypatch.setattr(there.front, "_num_reading", reading)
            monkeypatch.setattr(there.front, "_num_loading", loading)
            there.front._have_read(1)
    assert told == [True, False, False]
