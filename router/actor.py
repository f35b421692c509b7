"""Ray actor that holds a router. Ray places, names and ends the actor; no data passes through Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.hosted import Hosted

if TYPE_CHECKING:
    import asyncio


class Router(Hosted):
    """A router: both client APIs, the prefix map, and one session per worker."""

    def _new_loop(self) -> asyncio.AbstractEventLoop:
        """The loop of a router process; Ray's own default would be another one."""
        from .process import prepared_loop  # only the actor's process imports the router

        return prepared_loop()
