"""Which launcher a configuration names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from ..config import Config
from ..deployment.leftovers import ProcessTraces, Traces
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


def traces_of(folder: Path, addresses: Iterable[str | None]) -> list[Traces]:
    """What deployments of a run folder have on this machine, and on the Rays at these addresses."""
    found: list[Traces] = [ProcessTraces(folder)]
    joined = {address for address in addresses if address not in (None, "local")}
    if joined:
        from .ray_detached import RayTraces

        found += [RayTraces(folder, str(address)) for address in sorted(joined, key=str)]
    return found
