"""Ports and hosts that cannot be had: each is named with its remedy, and nothing stays bound."""

import errno
import socket
from collections.abc import Iterator

import grpc
import pytest

from twostroke.core import ports
from twostroke.core.errors import ConfigError


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_a_port_in_use_is_named_with_the_flag_that_chooses_another(taken: int, host: str):
    with pytest.raises(ConfigError, match=f"port {taken} is in use; choose another with --grpc-port"):
        ports.check_port(host, taken, "--grpc-port")


def test_a_port_that_another_grpc_server_would_share_is_in_use():
    options = [("grpc.so_reuseport", 1)]
    server = grpc.server(None, options=options)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with pytest.raises(ConfigError, match=f"port {port} is in use"):
        ports.check_port("127.0.0.1", port, "--grpc-port")
    server.stop(0).wait()


def test_free_ports_can_be_had_at_once_after_the_check_and_differ():
    found = ports.free_ports("127.0.0.1", 200)
    assert len(set(found)) == 200
    for port in found:
        ports.check_port("127.0.0.1", port, "--port")
        socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EACCES, "above 1023 with --port"),
        (errno.EADDRNOTAVAIL, "no address of this machine"),
        (errno.EIO, "--port"),
    ],
)
def test_what_the_system_refuses_is_explained(number: int, words: str, monkeypatch: pytest.MonkeyPatch):
    class Refusing(socket.socket):
        def bind(self, _: object) -> None:
            raise OSError(number, "no")

    monkeypatch.setattr(ports.socket, "socket", Refusing)
    with pytest.raises(ConfigError, match=words):
        ports.check_port("127.0.0.1", 80, "--port")


def test_a_host_of_somebody_else_or_of_nobody_is_refused():
    with pytest.raises(ConfigError, match=r"host '192\.0\.2\.1' is no address of this machine"):
        ports.check_port("192.0.2.1", 0, "--port")  # RFC 5737: nobody has it
    with pytest.raises(ConfigError, match=r"'nobody\.invalid' cannot be resolved"):
        ports.check_port("nobody.invalid", 0, "--port")


def test_a_name_with_two_addresses_is_bound_at_one():
    assert ports.numeric_host("localhost") == "127.0.0.1"
    assert (ports.target("::1", 1), ports.target("127.0.0.1", 1)) == ("[::1]:1", "127.0.0.1:1")
