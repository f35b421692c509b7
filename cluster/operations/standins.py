"""Whether a worker may stop decoding: somebody else must answer its model's requests. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...core.errors import ConfigError, InvalidRequest
from ...core.request import Role


def check_stand_in(workers: Sequence[Mapping[str, Any]], name: str, becomes: str, *, force: bool) -> Mapping[str, Any]:
    """The router's report on a worker that is to stop decoding. `becomes`: what it will be, for the message.

    Raises:
        InvalidRequest: no worker has this name.
        ConfigError: no other live worker decodes its model, and `force` is not set.
    """
    found = {worker["worker_id"]: worker for worker in workers}
    if name not in found:
        raise InvalidRequest(f"no worker is called {name!r}; there are: {', '.join(sorted(found)) or 'none'}")
    worker = found[name]
    others = [w for n, w in found.items() if n != name and w["model"] == worker["model"] and _decodes(w)]
    if not others and not force:
        raise ConfigError(
            f"{name} alone decodes {worker['model']}: as {becomes} it would leave nobody to answer. Give another "
            "worker the role decode or combined first, or say --force"
        )
    return worker


def _decodes(worker: Mapping[str, Any]) -> bool:
    return bool(worker["role"] != Role.PREFILL.value and worker["state"] == "live")
