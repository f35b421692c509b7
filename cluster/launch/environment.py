"""The environment of members: nothing in it sends them to the folder that somebody happens to stand in."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ..config import ENVIRONMENT_PREFIX


def member_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Ours, without settings (members get those by other means), and with a search path that is the same everywhere.

    PYTHONSAFEPATH keeps Python from putting the working folder on it. Of PYTHONPATH, relative entries become what they
    mean here; empty ones, which mean the working folder, go: most of them are a colon too many.
    """
    kept = {name: value for name, value in environment.items() if not name.startswith(ENVIRONMENT_PREFIX)}
    entries = [str(Path(entry).absolute()) for entry in kept.pop("PYTHONPATH", "").split(os.pathsep) if entry]
    path = {"PYTHONPATH": os.pathsep.join(entries)} if entries else {}
    return kept | path | {"PYTHONSAFEPATH": "1"}
