"""The monitor of a worker's GPU, by its settings and environment; or one line that says why there is none."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from ...core.clock import Clock
from ...model.ops.device import gpu_uuid, resolve_device
from ..settings import WorkerSettings
from .monitor import GpuMonitor
from .nvml import Library, NvmlReader, load_library
from .verdict import Verdict
from .visible import DeviceName, device_of_process

_log = logging.getLogger(__name__)


def monitor_of(
    settings: WorkerSettings, clock: Clock, on_change: Callable[[Verdict], None], library: Library | None = None
) -> GpuMonitor | None:
    """A monitor, not started yet. `library`: a module of pynvml's shape; None: pynvml. May import torch: use a thread.

    Raises:
        ConfigError: the configured device is not there.
    """
    if settings.gpu_health == "off":
        return None
    is_used = resolve_device(settings.model.device, settings.gpu).type == "cuda"
    if not is_used and settings.gpu_health == "auto":
        return None
    library = library or load_library()
    if library is None:
        _log.info("no GPU is watched: nvidia-ml-py is not installed (pip install 'twostroke[gpu]')")
        return None
    name = device_of_process(os.environ, settings.gpu)
    if name is None:
        _log.info("no GPU is watched: CUDA_VISIBLE_DEVICES names none for this worker")
        return None
    if is_used and name.index is not None and (uuid := gpu_uuid(settings.gpu)):
        name = DeviceName(uuid=uuid)
    shown = name.uuid or f"GPU {name.index}"
    return GpuMonitor(NvmlReader(library, name), shown, clock, on_change)
