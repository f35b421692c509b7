"""Checks of addresses and ports of our servers, with error messages for users. Knows no server."""

from __future__ import annotations

import contextlib
import errno
import re
import socket

from .errors import ConfigError, InvalidRequest
from .hosts import is_loopback_name

_CERTIFICATES = (
    ", or give --ssl-certfile and --ssl-keyfile (`twostroke certs DIR` makes them), and router.api_keys or "
    "--ssl-ca-certs"
)
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}(%[\w.-]{1,16})?\]|[A-Za-z0-9_.-]{1,253}):([0-9]{1,5})", re.ASCII)


def check_address(address: str, param: str) -> str:
    """Return `address` if it is host:port in the form of `target`. Other forms of gRPC targets are refused.

    Raises:
        InvalidRequest: it has another form, e.g. a path or a URL; names the field `param` and the value.
    """
    found = _ADDRESS.fullmatch(address)
    if found is None or not 0 < int(found[3]) < 65536:
        shown = repr(address[:80])
        raise InvalidRequest(f"{param} is {shown}; must be host:port, e.g. 10.0.0.7:8100 or [::1]:8100", param=param)
    return address


def check_port(host: str, port: int, remedy: str, *, shared: bool = False) -> None:
    """Check that a server can bind a port. `remedy` names the flag or setting that chooses another port.

    A port that another server shares by SO_REUSEPORT counts as taken, unless we share it too (`shared`).

    Raises:
        ConfigError: the port is taken or forbidden, or `host` is no address of this machine.
    """
    bound_socket(host, port, remedy, shared=shared).close()


def bound_socket(host: str, port: int, remedy: str, *, shared: bool = False) -> socket.socket:
    """Return a TCP socket that is bound and does not listen yet. The caller closes it.

    `shared`: several processes of this user listen on the port (SO_REUSEPORT); the kernel deals connections out.

    Raises:
        ConfigError: as for `check_port`.
    """
    address = numeric_host(host)
    bound = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections in TIME_WAIT do not block the port
    if shared:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        bound.bind((address, port))
    except OSError as error:
        bound.close()
        raise ConfigError(_complaint(host, port, remedy, error)) from None
    return bound


def free_ports(host: str, number: int) -> list[int]:
    """Return `number` different ports that are free now."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(bound_socket(host, 0, "another host")) for _ in range(number)]
        return [int(probe.getsockname()[1]) for probe in probes]


def numeric_host(host: str) -> str:
    """Resolve `host` to one address, IPv4 first, so that all servers bind the same address of a name with several.

    Raises:
        ConfigError: the name cannot be resolved.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"host {host!r} cannot be resolved ({error}); give an address of this machine") from None
    addresses = [str(address[0]) for *_, address in found]
    return next((address for address in addresses if ":" not in address), addresses[0])


def is_own_address(host: str) -> bool:
    """Return whether `host` is an address of this machine.

    Raises:
        ConfigError: the name cannot be resolved.
    """
    try:
        bound_socket(host, 0, "").close()
    except ConfigError:
        numeric_host(host)  # raises, if it was the name
        return False
    return True


def bindable_host(host: str, setting: str, *, insecure: bool) -> str:
    """Return the numeric address that a server may bind for `host`. Every listener of ours must use this check.

    `insecure`: an address that others can reach is accepted, because certificates protect it or the user wants it so.

    Raises:
        ConfigError: other machines can reach it, and `insecure` is false. `setting` names the origin of `host`.
    """
    address = numeric_host(host)
    if not insecure and not is_loopback_name(address):
        raise ConfigError(
            f"{setting} is {host!r}, which others can reach, and there are no certificates; "
            "keep 127.0.0.1 behind a proxy that authenticates, or accept the risk with --insecure (router.insecure)"
            f"{_CERTIFICATES if setting == 'router.host' else ', or give cluster.tls: `twostroke certs DIR` makes it'}"
        )
    return address


def target(host: str, port: int) -> str:
    """host:port in gRPC's form: an IPv6 address has brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _complaint(host: str, port: int, remedy: str, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is in use; choose another with {remedy}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"port {port} may not be bound by this user ({error.strerror}); choose one above 1023 with {remedy}"
    if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
        return f"host {host!r} is no address of this machine; use 127.0.0.1, or 0.0.0.0 for all of its addresses"
    return f"port {port} on {host!r} cannot be bound: {error.strerror or error}; choose another with {remedy}"
