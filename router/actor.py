"""Ray actor that holds a router. Ray places, names and ends the actor; no data passes through Ray."""

from __future__ import annotations

from ..core.hosted import Hosted


class Router(Hosted):
    """A router: both client APIs, the prefix map, and one session per worker."""
