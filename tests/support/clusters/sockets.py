"""Which sockets processes listen on, beside those that a cluster declares. What nobody declared is loopback's alone."""

import ipaddress
import socket
import ssl
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import psutil

Declared = dict[str, tuple[int, bool]]
"""Name -> port, and whether other machines may reach it."""


class Listener(NamedTuple):
    """One TCP socket that listens."""

    process: str
    address: str
    port: int

    @property
    def is_public(self) -> bool:
        address = ipaddress.ip_address(self.address)
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return not (mapped or address).is_loopback


def listeners(processes: Iterable[psutil.Process]) -> list[Listener]:
    """Every listening TCP socket of these processes."""
    found = []
    for process in processes:
        try:
            name = " ".join(process.cmdline())
            for connection in process.net_connections(kind="tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found.append(Listener(name, connection.laddr.ip, connection.laddr.port))
        except psutil.NoSuchProcess:
            continue
    return found


def declared_by(cluster: dict[str, Any], *, is_public: bool = False, **router_ports: int) -> Declared:
    """The router's ports, of which its clients' may be public, and two of each worker: its services' and its metrics'.

    `cluster`: the document of `GET /v1/cluster`.
    """
    declared = {name: (port, is_public and name != "internal_port") for name, port in router_ports.items()}
    for worker in cluster["workers"]:
        for kind in ("address", "metrics_address"):
            declared[f"{worker['worker_id']} {kind}"] = (int(worker[kind].rpartition(":")[2]), False)
    return declared


def speaks_tls(port: int) -> bool:
    """True if a server on loopback answers a TLS handshake, whatever its certificate. Blocks for seconds at most."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with socket.create_connection(("127.0.0.1", port), 10) as plain, context.wrap_socket(plain):
            return True
    except ssl.SSLError:
        return False


def check_listeners(found: list[Listener], declared: Declared) -> list[Listener]:
    """Each declared socket is there, once, and as public as it is declared; the others are loopback's. Gives these."""
    by_port = dict(declared.values())
    assert len(by_port) == len(declared)
    assert Counter(each.port for each in found if each.port in by_port) == Counter(list(by_port)), (found, declared)
    wrong = [each for each in found if each.is_public != by_port.get(each.port, False)]
    assert not wrong, wrong
    return [each for each in found if each.port not in by_port]
