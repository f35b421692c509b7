"""Ray actor that holds a prefill worker. Ray places, names and ends the actor; no data passes through Ray."""

from __future__ import annotations

from ..core.hosted import Hosted


class PrefillWorker(Hosted):
    """A worker that turns prompts into KV blocks. The class name shows the first role in `ray list actors`;
    the role itself is data and may change while the worker runs.
    """
