"""Whether a cluster was started with these settings, told without storing any of them. Pure."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..config import Config

UNSET = "unset"
_KEY = "cluster.key"
_SHOWN = 8  # settings that a message names
_DIGEST_CHARS = 32


def digests(config: Config, salt: str) -> dict[str, str]:
    """A digest of every setting by its dotted name, as it was given. A cluster's key that was drawn counts as unset."""
    values = dict(_flat("", config.model_dump(mode="json")))
    if not has_own_key(config):
        values[_KEY] = UNSET
    for name, given in (("model.path", config.model.path), ("speculation.model", config.speculation.model)):
        path = Path(given).expanduser() if given else None
        if path is not None and path.exists():  # a relative one means another folder elsewhere
            values[name] = str(path.absolute())
    return {name: _digest(salt, name, value) for name, value in sorted(values.items())}


def has_own_key(config: Config) -> bool:
    """True if the cluster's key was given, and not drawn."""
    return "key" in config.cluster.model_fields_set


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names of the settings that differ; one that only one release knows is among them."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def told(names: list[str]) -> str:
    """The names, for a message."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        dotted = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield from _flat(f"{dotted}.", value)
        else:
            yield dotted, value


def _digest(salt: str, name: str, value: Any) -> str:
    told_value = json.dumps([name, value], sort_keys=True).encode()
    return hmac.new(bytes.fromhex(salt), told_value, hashlib.sha256).hexdigest()[:_DIGEST_CHARS]
