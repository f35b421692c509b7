"""Preconditions of a plan: free ports, a launcher, the checkpoint, the native kernels.

Configuration errors are found here if possible, before any process runs.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.adapters.config import read_config
from ..checkpoint.config import LoraModule
from ..checkpoint.locate import located, served_name
from ..core.errors import CheckpointError, ConfigError
from ..kernels.cpu.build import NativeUnavailable, found_library
from ..kernels.cpu.folder import forget_empty_folder
from ..model.ops.device import chosen_kind, gpu_free_bytes
from ..router.ports import check_ports
from ..worker.machine import machine_facts
from .certificates import face_tls
from .config import Config
from .launch.launchers import launcher_class
from .model_facts import model_facts
from .nodes import Node
from .placement import ModelFacts, Plan, place_on

Show = Callable[[str], None]
"""Callback that shows a line of progress; the next line replaces it."""

_log = logging.getLogger(__name__)

_STOP_S = 1.0  # longest time for the builder to end its compilers


async def prepare(config: Config, show: Show) -> tuple[Config, Plan]:
    """Check, fetch, compile, place. The returned configuration names a local checkpoint.

    Work ends when the caller is cancelled, except a download, which ends with the process.

    Raises:
        ConfigError, CheckpointError, DoesNotFit: the cluster cannot be started; with the reason and a remedy.
    """
    check_ports(config.router)  # not as shared ones: other routers on them would share our clients
    _check_launcher(config)
    if config.cluster.launcher == "ray":
        show("loading Ray")
    await asyncio.to_thread(launcher_class, config)  # importing an engine takes seconds; the loop must handle signals
    config = await asyncio.to_thread(_with_checkpoint, config)
    config = await _with_kernels(config, show)
    nodes = await found_nodes(config, show)
    plan = await asyncio.to_thread(plan_on, config, nodes)
    return config, plan


def plan_on(config: Config, nodes: Sequence[Node]) -> Plan:
    """Place the configured checkpoint's workers on these machines.

    Raises:
        CheckpointError, ConfigError, DoesNotFit: as `model_facts` and `place_on`.
    """
    return place_on(config, nodes, model_facts(config, sum(len(node.machine.gpu_bytes) for node in nodes)))


def check_files(config: Config) -> None:
    """Check the files that the settings name beside the checkpoint: adapters, certificates, chat template.

    Raises:
        ConfigError, CheckpointError: one cannot be used.
    """
    for module in config.model.lora_modules:
        _located_adapter(module)
    face_tls(config.router)


def prepare_again(config: Config, model: ModelFacts, kernels: str) -> Config:
    """The configuration as `prepare` returned it, for a cluster that runs: nothing is checked, fetched or compiled."""
    adapters = tuple(_located_adapter(module) for module in config.model.lora_modules)
    update = {"path": model.directory, "name": model.name, "kernels": kernels, "lora_modules": adapters}
    config = _with_draft(config, model.draft_directory) if model.draft_directory else config
    return _with_files(config.model_copy(update={"model": config.model.model_copy(update=update)}))


async def found_nodes(config: Config, show: Show) -> list[Node]:
    """The machines that members may run on: those of a joined Ray, which takes seconds, or this one.

    Raises:
        ConfigError: the Ray cannot be joined, or one of its nodes does not answer.
    """
    address = config.cluster.ray_address
    if config.cluster.launcher != "ray" or address in (None, "local"):
        return [Node.alone(await asyncio.to_thread(machine_facts))]
    from .launch.ray_nodes import nodes_of

    show(f"asking the nodes of the Ray at {address} what they have")
    return await asyncio.to_thread(nodes_of, address)


def _check_launcher(config: Config) -> None:
    if config.cluster.launcher == "ray" and importlib.util.find_spec("ray") is None:
        raise ConfigError("Ray is not installed: pip install 'twostroke[ray]', or use --launcher process")


def _with_checkpoint(config: Config) -> Config:
    """The configuration with the checkpoint's local path; downloads the checkpoint if necessary."""
    path, name = config.model.path, config.model.name
    try:
        place_of_it = located(path).absolute()  # members may have another working folder
    except OSError as error:
        raise CheckpointError(f"model.path is {path!r}: it cannot be read: {error.strerror}") from None
    draft = config.speculation.checkpoint
    if draft is not None:
        config = _with_draft(config, str(located(draft, "speculation.model").absolute()))
    adapters = tuple(_located_adapter(module) for module in config.model.lora_modules)
    decided = {"path": str(place_of_it), "name": served_name(path, name), "lora_modules": adapters}
    return _with_files(config.model_copy(update={"model": config.model.model_copy(update=decided)}))


def _with_draft(config: Config, directory: str) -> Config:
    speculation = config.speculation.model_copy(update={"model": directory})
    return config.model_copy(update={"speculation": speculation})


def _with_files(config: Config) -> Config:
    """The configuration with absolute paths of the router's files."""
    named: dict[str, Any] = {
        name: _absolute(getattr(config.router, name)) for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs")
    }
    for name in ("decision_log", "api_key_file"):
        file: Path | None = getattr(config.router, name)
        named[name] = file and file.expanduser().absolute()
    router = config.router.model_copy(update=named)
    return config.model_copy(update={"router": router})


def _located_adapter(module: LoraModule) -> LoraModule:
    """An adapter with its absolute path; what its config asks for is refused here, before anything starts."""
    directory = Path(module.path).expanduser().absolute()
    read_config(directory)
    return module.model_copy(update={"path": str(directory)})


def _absolute(path: str | None) -> str | None:
    return str(Path(path).expanduser().absolute()) if path else None


async def _with_kernels(config: Config, show: Show) -> Config:
    """The configuration with `model.kernels` decided; builds the native kernels if this machine uses them.

    So one process compiles for all members, and its progress is shown. On a joined Ray cluster nothing is built here,
    because members may run on machines of another kind, and each builds for its own.
    """
    if config.cluster.ray_address or config.model.kernels == "torch":
        return config
    if chosen_kind(config.model.device, len(gpu_free_bytes())) != "cpu":
        return config
    try:
        if await asyncio.to_thread(found_library) is None:
            await asyncio.to_thread(model_facts, config, 0)  # first: a checkpoint without weights is told at once
            await _build(show)
    except NativeUnavailable as error:
        if config.model.kernels == "native":
            raise ConfigError(f"model.kernels is 'native', but {error}; or use auto or torch") from None
        _log.warning("running without native kernels, several times slower: %s", error)
        return config.model_copy(update={"model": config.model.model_copy(update={"kernels": "torch"})})
    return config


async def _build(show: Show) -> None:
    """Compile the kernels in a child process, which can be ended.

    Raises:
        NativeUnavailable: the build failed.
    """
    builder = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "twostroke.kernels.cpu.build", str(os.getpid())),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C reaches only this process
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
    """Terminate the builder, which ends its compilers and removes their output; kill it if it does not end."""
    if builder.returncode is not None:
        return
    builder.terminate()
    try:
        async with asyncio.timeout(_STOP_S):
            await builder.wait()
    except TimeoutError:
        builder.kill()
        await builder.wait()
        forget_empty_folder()
