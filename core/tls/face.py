"""Certificates of a server that clients call: for HTTP by the standard library, for gRPC by its own credentials."""

from __future__ import annotations

import ssl

import grpc

from ..errors import ConfigError
from .config import TlsConfig
from .credentials import rotating_credentials
from .handshake import Pem, reason_of, server_context
from .pem import PemSource
from .rotating import RotatingContext

SETTINGS = {"ca": "router.ssl_ca_certs", "cert": "router.ssl_certfile", "key": "router.ssl_keyfile"}


class FaceTls:
    """Certificates of the router's two faces. Files that change are read again, for new connections."""

    def __init__(self, certfile: str, keyfile: str | None, ca_certs: str | None) -> None:
        """`keyfile` None: `certfile` holds the key, too. `ca_certs`: authorities of clients, who must show some.

        Raises:
            ConfigError: a file cannot be read, or certificate and key do not belong together.
        """
        self.wants_certificates = ca_certs is not None
        config = TlsConfig(ca=ca_certs or certfile, cert=certfile, key=keyfile or certfile)
        settings = SETTINGS if ca_certs else SETTINGS | {"ca": SETTINGS["cert"]}
        self._source = PemSource(config, self._check, settings)
        self._contexts = RotatingContext(self._source.current, wants_certificates=self.wants_certificates)

    def http_context(self) -> ssl.SSLContext:
        """Context for servers of the standard library. It hands every new connection to the present one."""
        return self._contexts.outer()

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Credentials for gRPC servers."""
        return rotating_credentials(self._source.current, wants_certificates=self.wants_certificates)

    def _check(self, pem: Pem) -> None:
        try:
            server_context(pem, wants_certificates=self.wants_certificates)
        except ssl.SSLError as error:
            what = f"router.ssl_certfile and router.ssl_keyfile cannot be used: {reason_of(error)}"
            raise ConfigError(what) from None
