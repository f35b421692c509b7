"""Addresses of a DNS name, looked up again and again: a process at each of them, e.g. of a headless Service."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncGenerator

from ...core.ports import target
from .outage import Outage

log = logging.getLogger(__name__)

LOOKUP_INTERVAL_S = 2.0  # between two lookups
LOOKUP_TIMEOUT_S = 10.0  # the system's own may be longer; its thread then runs on


class Names:
    """The addresses of one name:port."""

    def __init__(self, name: str, interval_s: float = LOOKUP_INTERVAL_S) -> None:
        self.name = name
        self.addresses: frozenset[str] = frozenset()
        self._interval_s = interval_s
        self._outage = Outage()

    @property
    def problem(self) -> str:
        """Why the last lookup failed; empty: it did not."""
        return self._outage.problem

    async def follow(self) -> AsyncGenerator[frozenset[str], None]:
        """As in `core.discovery.source.AddressSource`. A name that is not found keeps its last addresses."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                async with asyncio.timeout(LOOKUP_TIMEOUT_S):
                    found = await _look_up(self.name)
            except OSError as error:  # also a timeout
                line = self._outage.fails(f"its name was not found: {error or 'no answer'}", loop.time())
                if line is not None:
                    log.warning("%s: %s; %d known addresses stay", self.name, line, len(self.addresses))
            else:
                if (line := self._outage.works(loop.time())) is not None:
                    log.info("%s: %s", self.name, line)
                if found != self.addresses:
                    self.addresses = found
                    yield found
            await asyncio.sleep(self._interval_s)


async def _look_up(name: str) -> frozenset[str]:
    """host:port of every address of name:port.

    Raises:
        OSError: the name has no address, or no server of names answers.
    """
    host, _, port = name.rpartition(":")
    found = await asyncio.to_thread(socket.getaddrinfo, host, int(port), type=socket.SOCK_STREAM)
    return frozenset(target(str(address[0]), int(port)) for *_, address in found)
