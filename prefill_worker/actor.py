"""The Ray actor that holds a prefill worker. Ray places, names and ends it; it is never on the data path."""

from __future__ import annotations

from ..core.hosted import Hosted


class PrefillWorker(Hosted):
    """A worker that turns prompts into KV blocks. Named after its first role, so that `ray list actors` tells;
    the role itself is data and may change while it runs.
    """
