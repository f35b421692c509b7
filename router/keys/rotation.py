"""Keeps a ring of keys equal to a file while the process runs: the file is looked at every second."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from pathlib import Path

from ...core.errors import ConfigError
from .digests import digest_of
from .grants import OPERATOR, Grant, KeyRing, bare_grant
from .key_file import grants_in

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0

_Stamp = tuple[int, int, int]


class KeyRotation:
    """The keys of a router: those of its configuration, and those of `router.api_key_file`, which may change.

    A file that is broken or missing after a change leaves the keys as they were: a slip locks nobody out and lets
    nobody in. `num_failed` counts such readings, `problem` is the last one's reason.
    """

    def __init__(self, api_keys: tuple[str, ...], path: Path | None = None, operator_key: str | None = None) -> None:
        """`operator_key`: key or digest of the one who manages the cluster; it counts only where there are others.

        Raises:
            ConfigError: the file cannot be read, or is wrong.
        """
        self.ring = KeyRing.of(api_keys)
        self.num_failed = 0
        self.problem: str | None = None
        self._own: dict[bytes, Grant] = {digest: bare_grant(digest) for digest in map(digest_of, api_keys)}
        if operator_key:
            self._own[digest_of(operator_key)] = OPERATOR
        self._path = path
        self._stamp: _Stamp | None = None
        self._watching: asyncio.Task[None] | None = None
        if path is not None:
            self.ring.is_open = False  # also while the file has no key: then nobody gets in
            self._stamp = _stamp_of(path)
        self.ring.replace((grants_in(path) if path else {}) | self._own)

    def start(self) -> None:
        """Begin to look at the file; needs a running event loop."""
        if self._path is not None and self._watching is None:
            self._watching = asyncio.create_task(self._watch(), name="keys")

    async def close(self) -> None:
        """Look no more."""
        if self._watching is not None:
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watching
            self._watching = None

    def look(self) -> bool:
        """Read the file again if it has changed. True: the keys are new now."""
        path = self._path
        if path is None:
            return False
        stamp = _stamp_of(path)
        if stamp == self._stamp:
            return False
        self._stamp = stamp
        try:
            grants = grants_in(path)
        except ConfigError as error:
            self.num_failed += 1
            self.problem = error.message
            log.error("%s; the keys stay as they were", error.message)
            return False
        self.problem = None
        self.ring.replace(grants | self._own)
        log.info("%s was read again: %d keys", path, len(self.ring))
        return True

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                await asyncio.to_thread(self.look)
            except Exception:  # the watch must go on
                log.exception("router.api_key_file could not be looked at")


def _stamp_of(path: Path) -> _Stamp | None:
    """Identity of a file's content, also when it is replaced by another one; None: it cannot be seen."""
    try:
        seen = os.stat(path)
    except OSError:
        return None
    return seen.st_ino, seen.st_mtime_ns, seen.st_size
