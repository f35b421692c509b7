"""TLS handshakes of the standard library: is a certificate good, and why does a peer refuse it?

gRPC tells its callers only that no connection came about. A second handshake with the same certificates tells why.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError

PROBE_S = 2.0  # for a connection, and for each answer on it


@dataclass(frozen=True, slots=True)
class Pem:
    """Certificates of one process at one time."""

    ca: bytes  # certificates of all authorities that are trusted
    chain: bytes
    key: bytes = field(repr=False)


def client_context(pem: Pem) -> ssl.SSLContext:
    """A context of a client that shows the certificate, and wants one of the server's from a trusted authority.

    Raises:
        ssl.SSLError: certificate and key do not belong together, or one is no PEM.
    """
    return _shows(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), pem, wants_certificates=True)


def server_context(pem: Pem, *, wants_certificates: bool) -> ssl.SSLContext:
    """A context of a server that shows the certificate, and may want one of its clients.

    Raises:
        ssl.SSLError: certificate and key do not belong together, or one is no PEM.
    """
    return _shows(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), pem, wants_certificates=wants_certificates)


def _shows(context: ssl.SSLContext, pem: Pem, *, wants_certificates: bool) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if wants_certificates:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=pem.ca.decode("ascii", "replace"))
    with _file_of(pem.chain + b"\n" + pem.key) as path:
        context.load_cert_chain(path)
    return context


def names_in(pem: Pem) -> list[str]:
    """Names in a certificate that is good for servers and for clients.

    Raises:
        ConfigError: it is not: expired, without its key, of another authority, or for another use.
    """
    try:
        client, server = client_context(pem), server_context(pem, wants_certificates=True)
        for context in (client, server):
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # a trusted certificate need not be an authority's
        client.check_hostname = False
        up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
        ends = (client.wrap_bio(down, up), server.wrap_bio(up, down, server_side=True))
        _shake(ends)
    except ssl.SSLError as error:
        raise ConfigError(f"the certificate of cluster.tls is no good: {reason_of(error)}") from None
    shown = ends[0].getpeercert() or {}
    names: Any = shown.get("subjectAltName", ())  # pairs of kind and value
    return [str(value) for _, value in names]


def _shake(ends: tuple[ssl.SSLObject, ssl.SSLObject]) -> None:
    """Run both ends of a handshake in memory."""
    waiting = list(ends)
    for _ in range(8):
        for end in list(waiting):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
                waiting.remove(end)
        if not waiting:
            return
    raise ssl.SSLError("the handshake does not end")


def why_refused(address: str, pem: Pem | None, name: str) -> str | None:
    """Try a handshake with a server at host:port that should be called `name`; returns what is wrong. Blocks.

    None: nothing that a handshake shows, or no server answers at all. `pem` None: the system's authorities, and no
    certificate of ours.
    """
    host, _, port = address.rpartition(":")
    try:
        context = ssl.create_default_context() if pem is None else client_context(pem)
        context.set_alpn_protocols(["h2"])
        with (
            socket.create_connection((host.strip("[]"), int(port)), PROBE_S) as plain,
            context.wrap_socket(plain, server_hostname=name) as connection,
        ):
            connection.settimeout(PROBE_S)  # in TLS 1.3 a server judges our certificate after our handshake is over
            if connection.recv(1):
                return None
            return _flaw(pem)  # gRPC's servers close without a word
    except ssl.SSLCertVerificationError as error:
        return f"its certificate is not valid for us: {error.verify_message}; it must be {name}'s, of our authority"
    except ssl.SSLError as error:
        return reason_of(error)
    except ConnectionResetError:
        return _flaw(pem)
    except (OSError, ValueError):
        return None


def _flaw(pem: Pem | None) -> str:
    """What a server may dislike that closes the connection after the handshake."""
    if pem is None:
        return "it closes the connection after the handshake, as servers do that want a certificate, and we showed none"
    try:
        names_in(pem)
    except ConfigError as error:
        return f"it refuses our certificate: {str(error).rpartition(': ')[2]}"
    return "it refuses our certificate, which is valid for us: does it trust another authority, or is its clock wrong?"


_REASONS = {
    "CERTIFICATE_REQUIRED": "it wants a certificate, and we showed none",
    "UNKNOWN_CA": "it does not trust the authority of our certificate",
    "CERTIFICATE_EXPIRED": "our certificate has expired",
    "BAD_CERTIFICATE": "it refuses our certificate",
    "CERTIFICATE_UNKNOWN": "it refuses our certificate",
    "UNSUPPORTED_CERTIFICATE": "our certificate is not for this use: it must be for clients and servers",
    "WRONG_VERSION_NUMBER": "it does not speak TLS",
    "UNEXPECTED_EOF": "it ends the handshake: does it speak TLS?",
    "KEY_VALUES_MISMATCH": "certificate and private key do not belong together",
}


def reason_of(error: ssl.SSLError) -> str:
    """The error in words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    reason = str(error.reason or "")
    return next((words for part, words in _REASONS.items() if part in reason), reason or str(error))


@contextlib.contextmanager
def _file_of(content: bytes) -> Iterator[str]:
    """Path of a file with this content: the standard library takes private keys from files only."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("twostroke-pem", os.MFD_CLOEXEC)  # in no file system
        try:
            with os.fdopen(os.dup(descriptor), "wb") as file:
                file.write(content)
            yield f"/proc/self/fd/{descriptor}"
        finally:
            os.close(descriptor)
        return
    with tempfile.NamedTemporaryFile("wb", suffix=".pem") as file:  # 0600
        file.write(content)
        file.flush()
        yield file.name
