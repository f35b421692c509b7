"""Credentials of gRPC servers that use the present certificates for every new connection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

from .handshake import Pem


def rotating_credentials(current: Callable[[], Pem], *, wants_certificates: bool) -> grpc.ServerCredentials:
    """Credentials of the certificates that `current` returns: the same object until the files change.

    `wants_certificates`: clients must show a certificate of the authorities in them.
    """
    used = current()

    def changed() -> Any:
        """The certificates of a new connection; None: those of the one before."""
        nonlocal used
        present = current()
        if present is used:
            return None
        used = present
        return configuration(present)

    def configuration(pem: Pem) -> Any:
        authorities = pem.ca if wants_certificates else None
        return grpc.ssl_server_certificate_configuration([(pem.key, pem.chain)], root_certificates=authorities)

    return grpc.dynamic_ssl_server_credentials(
        configuration(used), changed, require_client_authentication=wants_certificates
    )
