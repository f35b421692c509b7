"""Addresses, keys, TLS, and what a client says when nobody answers; and the seam that replaces the network."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.fakes.peer import API_KEY, serving

import twostroke
from twostroke import AsyncClient, Client, Tls
from twostroke.client.channel import Endpoint, is_loopback, service_config
from twostroke.core.errors import (
    ERROR_BY_CODE,
    Cancelled,
    ConfigError,
    InternalError,
    TokensLost,
    TwostrokeError,
    Unauthenticated,
    Unavailable,
)
from twostroke.protos import inference_pb2


@pytest.mark.parametrize("address", ["localhost:1", "127.0.0.1:1", "127.8.8.8:1", "[::1]:8001", "unix:/tmp/x"])
def test_this_machine_may_be_spoken_to_in_the_clear(address):
    assert is_loopback(address)
    Client(address).close()


@pytest.mark.parametrize("address", ["10.0.0.1:8001", "router:8001", "[2001:db8::1]:8001", "localhost.evil.com:1"])
def test_another_machine_needs_tls_or_a_word(address):
    assert not is_loopback(address)
    with pytest.raises(ConfigError, match="insecure=True"):
        Client(address)
    Client(address, insecure=True).close()
    Client(address, tls=Tls()).close()


@pytest.fixture
def dead_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("dead_proxy")
def test_a_proxy_of_the_environment_is_not_for_this_machine(address):
    with Client(address, api_key=API_KEY, timeout_s=20) as client:
        assert client.models()


@pytest.mark.parametrize(
    ("endpoint", "may_use_it"),
    [
        (Endpoint("127.8.8.8:1"), 0),
        (Endpoint("[::1]:1", tls=Tls()), 0),
        (Endpoint("unix:/tmp/x"), 0),
        (Endpoint("router:1", insecure=True), 0),  # it would read keys and prompts
        (Endpoint("router:1", tls=Tls()), 1),
    ],
)
def test_only_what_a_proxy_cannot_read_goes_through_one(endpoint, may_use_it):
    assert dict(endpoint.options())["grpc.enable_http_proxy"] == may_use_it


@pytest.mark.parametrize("address", ["", "localhost", "http://localhost:8000"])
def test_an_address_is_no_url(address):
    with pytest.raises(ConfigError, match="host:port"):
        Client(address)


async def test_a_closed_client_says_so(address):
    client = Client(address, api_key=API_KEY)
    client.close()
    with pytest.raises(Cancelled, match="the client is closed"):
        client.models()
    other = AsyncClient(address, api_key=API_KEY)
    await other.close()
    with pytest.raises(Cancelled, match="the client is closed"):
        await other.models()


def test_half_a_certificate_is_refused():
    with pytest.raises(ConfigError, match="private_key"):
        Client("router:8001", tls=Tls(private_key=b"x"))


def test_the_key_goes_with_every_call(address, peer):
    with Client(address, api_key=API_KEY) as client:
        client.models()
        list(client.generate_stream("x"))
    assert {seen["authorization"] for seen in peer.metadata} == {f"Bearer {API_KEY}"}
    with Client(address, api_key="wrong") as client, pytest.raises(Unauthenticated):
        client.models()


def test_nobody_at_the_address_is_explained():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with Client(address, timeout_s=20) as client:
        for ask in (client.models, lambda: list(client.generate_stream("x"))):
            with pytest.raises(Unavailable, match="Is the server started") as caught:
                ask()
            assert address in str(caught.value)
            assert caught.value.retry_after_s


def test_an_http_port_is_recognised():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"

        def answer() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
                connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with Client(address, timeout_s=20) as client, pytest.raises(Unavailable, match=r"HTTP port|Is the server"):
            client.models()
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority of our own, and a pair that it signed, for server and client alike."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl program to make certificates")
    folder = tmp_path_factory.mktemp("certificates")
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    for arguments in (
        "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=authority -keyout ca.key -out ca.pem",
        "req -newkey rsa:2048 -nodes -subj /CN=localhost -keyout own.key -out own.csr",
        "x509 -req -in own.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile names -out own.pem",
    ):
        subprocess.run([openssl, *arguments.split()], cwd=folder, check=True, capture_output=True)
    return folder


def test_mutual_tls_works_and_its_refusal_is_explained(peer, certificates):
    ca, key, own = ((certificates / name).read_bytes() for name in ("ca.pem", "own.key", "own.pem"))
    credentials = grpc.ssl_server_credentials([(key, own)], ca, require_client_auth=True)
    with serving(peer, credentials=credentials) as port:
        with Client(f"localhost:{port}", tls=Tls(ca, key, own)) as client:
            assert client.generate("x").text
        for tls in (Tls(ca), Tls(), None):  # no certificate of our own; an unknown authority; in the clear
            client = Client(f"localhost:{port}", tls=tls, timeout_s=20)
            with client, pytest.raises(Unavailable, match=r"TLS"):
                client.generate("x")


def test_a_call_that_the_server_does_not_know_is_explained():
    with (
        serving(None) as port,
        Client(f"127.0.0.1:{port}") as client,
        pytest.raises(Unavailable, match="gRPC port of a Twostroke router"),
    ):
        client.generate("x")


def test_only_calls_without_a_stream_are_retried():
    (method,) = service_config()["methodConfig"]
    assert "GenerateStream" not in {name["method"] for name in method["name"]}
    services = inference_pb2.DESCRIPTOR.services_by_name["Inference"]
    unary = {name for name, rpc in services.methods_by_name.items() if not rpc.server_streaming}
    assert {name["method"] for name in method["name"]} == unary
    assert {name["service"] for name in method["name"]} == {services.full_name}


# ---------------------------------------------------------------- the seam


class Scripted:
    """A transport that answers from a list."""

    def __init__(self, *messages: Any) -> None:
        self._messages = iter(messages)
        self.cancelled = False
        self.opened: list[tuple[str, float]] = []

    def open(self, rpc: str, request: Any, timeout_s: float) -> Scripted:
        self.opened.append((rpc, timeout_s))
        return self

    def __next__(self) -> Any:
        return next(self._messages)

    def cancel(self) -> None:
        self.cancelled = True


def test_a_client_runs_on_any_transport():
    transport = Scripted(inference_pb2.AbortResponse(found=True))
    client = Client(transport=transport, timeout_s=3)
    assert client.abort("r") is True
    assert transport.opened == [("Abort", 3)]
    client.close()


@pytest.mark.parametrize(
    "chunk",
    [
        inference_pb2.GenerateChunk(choice=0, token_ids=[5], first_index=1),
        inference_pb2.GenerateChunk(choice=1, token_ids=[5]),
        inference_pb2.GenerateChunk(choice=2**32 - 1),
    ],
)
def test_a_stream_that_makes_no_sense_is_given_up(chunk):
    transport = Scripted(chunk)
    with pytest.raises(TokensLost):
        next(Client(transport=transport).generate_stream("x"))
    assert transport.cancelled


def test_tokens_after_an_end_are_no_tokens():
    done = inference_pb2.GenerateChunk(choice=0, token_ids=[5], finish_reason=1)
    late = inference_pb2.GenerateChunk(choice=0, token_ids=[6], first_index=1)
    stream = Client(transport=Scripted(done, late)).generate_stream("x")
    assert next(stream).finish_reason == "stop"
    with pytest.raises(TokensLost):
        next(stream)


# ---------------------------------------------------------------- the public door


def test_the_public_door_is_complete():
    for name in twostroke.__all__:
        assert getattr(twostroke, name) is not None
    assert set(twostroke.__all__) <= set(dir(twostroke))
    offered = {getattr(twostroke, name) for name in twostroke.__all__}
    assert {TwostrokeError, InternalError, Cancelled, *ERROR_BY_CODE.values()} <= offered
    with pytest.raises(AttributeError, match="Clint"):
        twostroke.Clint  # noqa: B018


def test_the_sdk_needs_neither_an_engine_nor_a_server():
    code = (
        "import sys, twostroke; light = 'grpc' not in sys.modules; "
        "[getattr(twostroke, name) for name in twostroke.__all__]; "
        "twostroke.Client('localhost:1').close(); "
        "heavy = {'torch', 'ray', 'numpy', 'pydantic', 'tokenizers', 'jinja2', 'starlette'} & set(sys.modules); "
        "print(light, sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "True []"
