"""Certificates and their key in PEM: from files that are read again when they change. Knows no connection."""

from __future__ import annotations

import logging
import os
import stat
import threading
from collections.abc import Callable, Mapping

from ..errors import ConfigError
from .config import PEM_BEGINS, TlsConfig
from .handshake import Pem

log = logging.getLogger(__name__)

_NAMES = ("ca", "cert", "key")

Stamp = tuple[tuple[int, int, int], ...]


class PemSource:
    """Source of the present certificates. Safe to share between threads.

    Files that are read while another process replaces them do not fit together, and certificates may be no good: then
    the last good ones stay in use, and the reason is logged.
    """

    def __init__(
        self, config: TlsConfig, check: Callable[[Pem], None], settings: Mapping[str, str] | None = None
    ) -> None:
        """`config`: of one role. `check` raises ConfigError for certificates that must not be used.

        `settings`: what the user calls ca, cert and key, for messages; None: those of cluster.tls.

        Raises:
            ConfigError: a file cannot be read, or `check` refuses the certificates.
        """
        self._config = config
        self._check = check
        self._settings = settings or {name: f"cluster.tls.{name}" for name in _NAMES}
        self._lock = threading.Lock()
        self._stamp = self._stamped()
        self._pem = self._read()
        check(self._pem)
        self._warn_of_readers()

    def current(self) -> Pem:
        """The present certificates; the same object until they change."""
        try:
            stamp = self._stamped()
        except ConfigError:
            return self._pem  # between the removal and the creation of a file
        if stamp == self._stamp:
            return self._pem
        with self._lock:
            if stamp != self._stamp:
                self._take(stamp)
        return self._pem

    def _take(self, stamp: Stamp) -> None:
        try:
            pem = self._read()
            if self._stamped() != stamp:
                return  # they change at this moment; the next call reads them
            self._stamp = stamp
            self._check(pem)
        except ConfigError as error:
            log.warning("the certificates that changed are not used, those before stay: %s", error)
            return
        self._pem = pem
        log.info("certificates were read again: %s", self._config.cert)

    def _read(self) -> Pem:
        return Pem(*(_contents(getattr(self._config, name), self._settings[name]) for name in _NAMES))

    def _stamped(self) -> Stamp:
        """Identity, time and size of the files; a text has none."""
        found = []
        for name in _NAMES:
            path = getattr(self._config, name)
            if not path.startswith(PEM_BEGINS):
                facts = _facts(path, self._settings[name])
                found.append((facts.st_ino, facts.st_mtime_ns, facts.st_size))
        return tuple(found)

    def _warn_of_readers(self) -> None:
        path = self._config.key
        if not path.startswith(PEM_BEGINS) and _facts(path, self._settings["key"]).st_mode & stat.S_IROTH:
            log.warning("every user of this machine can read the private key %s; chmod 600 it", path)


def _facts(path: str, name: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise _unreadable(path, name, error) from None


def _contents(path: str, name: str) -> bytes:
    if path.startswith(PEM_BEGINS):
        return path.encode()
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise _unreadable(path, name, error) from None


def _unreadable(path: str, name: str, error: OSError) -> ConfigError:
    return ConfigError(f"{name} is {path[:300]!r}: {error.strerror}; `twostroke certs DIR` makes such files")
