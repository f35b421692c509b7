"""Environment variables of members: independent of the working folder of the program that starts them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ..config import ENVIRONMENT_PREFIX


def member_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """This process's environment, without settings (members get those otherwise), with an absolute search path.

    PYTHONSAFEPATH keeps Python from adding the working folder to the search path. Relative entries of PYTHONPATH become
    absolute. Empty entries, which mean the working folder, are removed: most of them are a colon too many.
    """
    kept = {name: value for name, value in environment.items() if not name.startswith(ENVIRONMENT_PREFIX)}
    entries = [str(Path(entry).absolute()) for entry in kept.pop("PYTHONPATH", "").split(os.pathsep) if entry]
    path = {"PYTHONPATH": os.pathsep.join(entries)} if entries else {}
    return kept | path | {"PYTHONSAFEPATH": "1"}
