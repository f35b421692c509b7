"""Which launcher a configuration names."""

from __future__ import annotations

from collections.abc import Callable

from ..config import Config
from .launcher import Launcher, Site


def launcher_class(config: Config) -> Callable[[Site], Launcher]:
    """The launcher class that the configuration names. Only that one is imported."""
    if config.cluster.launcher == "ray":
        from .ray import RayLauncher

        return RayLauncher
    if config.cluster.launcher == "process":
        from .process import ProcessLauncher

        return ProcessLauncher
    from .inprocess import InProcessLauncher

    return InProcessLauncher
