"""What must be there before a plan can be started: free ports, a launcher, the checkpoint, the native kernels.

Mistakes that can be seen show here, before any process runs.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import sys
from collections.abc import Callable

from ..checkpoint.locate import resolve, served_name
from ..core.errors import CheckpointError, ConfigError
from ..kernels.cpu.build import NativeUnavailable, found_library
from ..kernels.cpu.folder import forget_empty_folder
from ..model.ops.device import chosen_kind, gpu_free_bytes
from ..router.ports import check_ports
from ..worker.machine import machine_facts
from .config import Config
from .model_facts import model_facts
from .placement import Plan, place
from .supervisor import launcher_class

Show = Callable[[str], None]
"""Shows what is under way; the next line replaces it."""

_log = logging.getLogger(__name__)

_STOP_S = 1.0  # for the builder to end its compilers


async def prepare(config: Config, show: Show) -> tuple[Config, Plan]:
    """Check, fetch, compile, place. The configuration that comes back names a checkpoint that is here.

    Work is given up when the caller is cancelled, but for a download, which ends with the process.

    Raises:
        ConfigError, CheckpointError, DoesNotFit: it cannot be started; says why and what would help.
    """
    check_ports(config.router)
    _check_launcher(config)
    await asyncio.to_thread(launcher_class, config)  # importing an engine takes seconds, and signals want to be heard
    config = await asyncio.to_thread(_with_checkpoint, config)
    config = await _with_kernels(config, show)
    plan = await asyncio.to_thread(lambda: place(config, machine_facts(), model_facts(config)))
    return config, plan


def _check_launcher(config: Config) -> None:
    if config.cluster.launcher == "ray" and importlib.util.find_spec("ray") is None:
        raise ConfigError("Ray is not installed: pip install 'twostroke[ray]', or use --launcher process")


def _with_checkpoint(config: Config) -> Config:
    """The same with the checkpoint's own place, downloaded if need be."""
    path, name = config.model.path, config.model.name
    try:
        place_of_it = resolve(path).absolute()  # members may stand elsewhere
    except OSError as error:
        raise CheckpointError(f"model.path is {path!r}: it cannot be read: {error.strerror}") from None
    model = config.model.model_copy(update={"path": str(place_of_it), "name": served_name(path, name)})
    log = config.router.decision_log
    router = config.router.model_copy(update={"decision_log": log and log.expanduser().absolute()})
    return config.model_copy(update={"model": model, "router": router})


async def _with_kernels(config: Config, show: Show) -> Config:
    """The same with `model.kernels` decided, and the kernels built if this machine wants native ones.

    Members find them built: one process compiles, and its progress can be seen. On a Ray cluster that we join, members
    may run on machines of another kind, and each builds for its own.
    """
    if config.cluster.ray_address or config.model.kernels == "torch":
        return config
    if chosen_kind(config.model.device, len(gpu_free_bytes())) != "cpu":
        return config
    try:
        if await asyncio.to_thread(found_library) is None:
            await _build(show)
    except NativeUnavailable as error:
        if config.model.kernels == "native":
            raise ConfigError(f"model.kernels is 'native', but {error}; or use auto or torch") from None
        _log.warning("running without native kernels, several times slower: %s", error)
        return config.model_copy(update={"model": config.model.model_copy(update={"kernels": "torch"})})
    return config


async def _build(show: Show) -> None:
    """Compile in a process of its own, which can be ended.

    Raises:
        NativeUnavailable: it failed.
    """
    builder = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "twostroke.kernels.cpu.build", str(os.getpid())),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C reaches us alone
    )
    assert builder.stdout is not None
    line = ""
    try:
        async for raw in builder.stdout:
            line = raw.decode(errors="replace").strip()
            show(line)
        await builder.wait()
    finally:
        await _end(builder)
    if await asyncio.to_thread(found_library) is None:
        raise NativeUnavailable(line.partition("but slower: ")[2] or line or "building the native kernels failed")


async def _end(builder: asyncio.subprocess.Process) -> None:
    """Have it end its compilers and remove what they made; by force if it does not."""
    if builder.returncode is not None:
        return
    builder.terminate()
    try:
        await asyncio.wait_for(builder.wait(), _STOP_S)
    except TimeoutError:
        builder.kill()
        await builder.wait()
        forget_empty_folder()
