"""A cluster with API keys on a public address: it becomes ready, lets in who has a key, and keeps tenants apart."""

import sys
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from sockets import check_listeners, declared_by, listeners

from twostroke import Client, ConfigError, RequestNotFound, Unauthenticated


@pytest.fixture(scope="module")
def guarded(run_cluster):
    before = {each.port for each in listeners([psutil.Process()])}
    with run_cluster(
        cluster__launcher="inprocess",
        cluster__prefill=0,
        cache__tokens=8192,
        step__num_threads=1,
        router__host="0.0.0.0",
        router__insecure=True,
        router__api_keys=["first-secret", "second-secret"],
    ) as running:
        running.listening_before = before
        yield running


def test_on_a_public_address_only_what_clients_use_is_public(guarded):
    with Client(guarded.grpc, api_key="first-secret") as client:
        cluster = client.cluster()
    ports = {"port": urlsplit(guarded.url).port, "grpc_port": int(guarded.grpc.rpartition(":")[2])}
    ports["internal_port"] = guarded.supervisor.config.router.internal_port
    found = [each for each in listeners([psutil.Process()]) if each.port not in guarded.listening_before]
    assert check_listeners(found, declared_by(cluster, is_public=True, **ports)) == []


def test_without_a_key_every_door_is_shut_but_liveness(guarded):
    for path in ("/v1/models", "/v1/cluster", "/v1/requests/x/explain", "/metrics"):
        reply = httpx.get(guarded.url + path)
        assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key"), path
    assert httpx.post(guarded.url + "/v1/completions", json={"prompt": "x"}).status_code == 401
    assert httpx.get(guarded.url + "/health").status_code == 200
    with Client(guarded.grpc, api_key="wrong") as client, pytest.raises(Unauthenticated):
        client.generate("x", max_tokens=1)


def test_one_tenant_sees_nothing_of_another(guarded):
    first, second = (Client(guarded.grpc, api_key=key) for key in ("first-secret", "second-secret"))
    prompt = "def " * 200
    with first, second:
        mine = first.generate(prompt, max_tokens=1, temperature=0)
        assert first.generate(prompt, max_tokens=1, temperature=0).usage.cached_tokens > 0
        assert second.generate(prompt, max_tokens=1, temperature=0).usage.cached_tokens == 0
        assert first.explain(mine.request_id)["request_id"] == mine.request_id
        with pytest.raises(RequestNotFound):
            second.explain(mine.request_id)


def test_a_public_host_needs_a_word(run_cluster):
    with pytest.raises(ConfigError, match="--insecure"), run_cluster(router__host="0.0.0.0"):
        pass
