"""The Ray actor that holds a router. Ray places, names and ends it; it is never on the data path."""

from __future__ import annotations

from ..core.hosted import Hosted


class Router(Hosted):
    """A router: both client faces, the prefix map, and one session per worker."""
