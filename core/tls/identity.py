"""Certificates of one process, as gRPC's credentials for its servers and channels inside the cluster."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio

from ..errors import ConfigError
from .callers import Caller, caller_in, name_of, uri_of
from .config import TlsConfig
from .credentials import rotating_credentials
from .handshake import Pem, names_in, why_refused
from .pem import PemSource
from .rotating import RotatingContext

DIAGNOSE_EVERY_S = 30.0  # between two handshakes that find out why the same peer refuses
MAX_DIAGNOSES = 1024  # peers whose last diagnosis is kept

_URI, _NAMES = "peer_spiffe_id", "x509_subject_alternative_name"
_HANDSHAKE_WORDS = ("handshake", "socket closed", "verification check failed", "certificate", "ssl")


class HandshakeRefused(grpc.aio.AioRpcError):
    """No connection came about because of certificates."""

    def __init__(self, address: str, what: str) -> None:
        empty = grpc.aio.Metadata()
        super().__init__(grpc.StatusCode.UNAVAILABLE, empty, empty, f"no TLS connection to {address}: {what}")


class TlsIdentity:
    """What one process shows its peers, and expects of them."""

    def __init__(self, config: TlsConfig, own: Caller) -> None:
        """`config`: `cluster.tls`; `own`: the role of this process.

        Raises:
            ConfigError: a file cannot be read, or the certificate is not valid for this role now.
        """
        self.deployment = config.deployment
        self.own = own
        self.num_failed = 0  # connections that did not come about because of certificates
        self._source = PemSource(config.of(own), self._check)
        self._diagnoses: dict[str, tuple[float, str | None]] = {}  # by address: when, and what it said

    def current(self) -> Pem:
        """The present certificates; the same object until the files change."""
        return self._source.current()

    def server_credentials(self) -> grpc.ServerCredentials:
        """Credentials that want a certificate of every client. Each new connection uses the present certificates."""
        return rotating_credentials(self.current, wants_certificates=True)

    def http_context(self) -> ssl.SSLContext:
        """Context of an HTTP server that shows the present certificate, and wants none of probes and scrapers."""
        return RotatingContext(self.current, wants_certificates=False).outer()

    def channel(self, address: str, callee: Caller, options: Sequence[tuple[str, Any]] | None) -> grpc.aio.Channel:
        """A channel with the present certificates to a process of the role `callee`."""
        pem = self.current()
        credentials = grpc.ssl_channel_credentials(pem.ca, pem.key, pem.chain)
        named = ("grpc.ssl_target_name_override", name_of(self.deployment, callee))
        return grpc.aio.secure_channel(address, credentials, options=[*(options or ()), named])

    def caller_of(self, context: Any) -> Caller | None:
        """Role of the client of a call, from its certificate. None: none of this deployment's."""
        found = context.auth_context()
        names = [*found.get(_URI, ()), *found.get(_NAMES, ())]
        return caller_in((name.decode("utf-8", "replace") for name in names), self.deployment)

    async def explained(self, error: grpc.aio.AioRpcError, address: str, callee: Caller) -> grpc.aio.AioRpcError:
        """The same error, or why the handshake failed."""
        if not is_handshake(error):
            return error
        self.num_failed += 1
        now_s = time.monotonic()
        known = self._diagnoses.get(address)
        if known is None or now_s - known[0] >= DIAGNOSE_EVERY_S:
            said = await asyncio.to_thread(why_refused, address, self.current(), name_of(self.deployment, callee))
            if len(self._diagnoses) >= MAX_DIAGNOSES:
                self._diagnoses.clear()
            known = self._diagnoses[address] = (now_s, said)
        what = known[1] or str(error.details())[:200]
        return HandshakeRefused(address, f"{what} (cluster.tls of both sides, deployment {self.deployment!r})")

    def _check(self, pem: Pem) -> None:
        names = names_in(pem)
        wanted = name_of(self.deployment, self.own)
        if caller_in(names, self.deployment) is not self.own or wanted not in names:
            shown = ", ".join(names)[:300] or "nothing"
            raise ConfigError(
                f"the certificate of cluster.tls names {shown}; a {self.own} of the deployment {self.deployment!r} has "
                f"the URI {uri_of(self.deployment, self.own)} and the DNS name {wanted}"
            )


def is_handshake(error: grpc.aio.AioRpcError) -> bool:
    """Return whether a call may have failed for its connection's handshake."""
    details = str(error.details() or "").lower()
    return (
        error.code() is grpc.StatusCode.UNAVAILABLE
        and "failed to connect" in details
        and any(word in details for word in _HANDSHAKE_WORDS)
    )


def add_port(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> int:
    """Let a server listen at host:port, with TLS if there are credentials; returns the port.

    Raises:
        RuntimeError: gRPC cannot bind it.
    """
    if credentials is None:
        return int(server.add_insecure_port(address))
    return int(server.add_secure_port(address, credentials))
