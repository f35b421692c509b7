"""The Ray actor that holds a decode worker. Ray places, names and ends it; it is never on the data path."""

from __future__ import annotations

from ..core.hosted import Hosted


class DecodeWorker(Hosted):
    """A worker that turns KV blocks into tokens. Named after its first role, so that `ray list actors` tells;
    the role itself is data and may change while it runs.
    """
