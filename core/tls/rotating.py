"""A server's context of the standard library that shows each new connection the present certificate."""

from __future__ import annotations

import ssl
from collections.abc import Callable

from .handshake import Pem, server_context


class RotatingContext:
    """Contexts for one source of certificates. Each is made once."""

    def __init__(self, current: Callable[[], Pem], *, wants_certificates: bool) -> None:
        """`current`: gives the present certificates, the same object until they change.

        Raises:
            ssl.SSLError: certificate and key do not belong together.
        """
        self._current, self._wants_certificates = current, wants_certificates
        self._pem = current()
        self._present = self._made(self._pem)

    def outer(self) -> ssl.SSLContext:
        """Context for a server. It hands every new connection to the present one, whatever name a client asks for."""
        outer = self._made(self._current())

        def pick(connection: ssl.SSLObject, _: str | None, __: ssl.SSLContext) -> None:
            connection.context = self._of_now()

        outer.sni_callback = pick
        return outer

    def _of_now(self) -> ssl.SSLContext:
        pem = self._current()
        if pem is not self._pem:
            self._present, self._pem = self._made(pem), pem
        return self._present

    def _made(self, pem: Pem) -> ssl.SSLContext:
        return server_context(pem, wants_certificates=self._wants_certificates)
