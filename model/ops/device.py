"""Which device computes, with which kernels, what it can serve, and how much memory it has left.

Imports torch only where a GPU may be.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ...checkpoint.config import DeviceChoice, Kernels, KernelsChoice
from ...checkpoint.spec import LatentAttention, ModelSpec
from ...core.errors import ConfigError
from ...kernels.cpu.build import NativeUnavailable, find_compiler

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/kfd"), Path("/dev/dxg"))  # NVIDIA, AMD, either under WSL


def gpu_free_bytes() -> tuple[int, ...]:
    """Free memory of each GPU that torch sees, now; empty without one. A launcher on a CPU never imports torch here."""
    if not any(driver.exists() for driver in _DRIVERS) or not _sees_gpus():
        return ()
    import torch

    from_driver = None if "CUDA_VISIBLE_DEVICES" in os.environ else _driver_free_bytes()
    if from_driver is not None and len(from_driver) == torch.cuda.device_count():
        return from_driver
    return tuple(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count()))


def _sees_gpus() -> bool:
    """Whether torch does; interpreted kernels (Triton's way of testing them) want CPU tensors."""
    import torch

    return os.environ.get("TRITON_INTERPRET") != "1" and torch.cuda.is_available()


def _driver_free_bytes() -> tuple[int, ...] | None:
    """What NVIDIA's driver says of all GPUs, if nvidia-ml-py is installed: unlike torch, it takes no memory to ask."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        free = tuple(int(pynvml.nvmlDeviceGetMemoryInfo(handle).free) for handle in handles)
        pynvml.nvmlShutdown()
    except Exception:  # the package's errors cannot be named without it
        return None
    return free


def chosen_kind(wanted: DeviceChoice, num_gpus: int) -> Literal["cpu", "cuda"]:
    """What `model.device` means where there are so many GPUs.

    Raises:
        ConfigError: it asks for one, and there is none.
    """
    if wanted == "cuda" and not num_gpus:
        raise ConfigError(
            "model.device is 'cuda', and torch sees no GPU here; install torch for CUDA or ROCm, or use auto or cpu"
        )
    return "cuda" if wanted != "cpu" and num_gpus else "cpu"


def chosen_kernels(
    wanted: KernelsChoice, kind: Literal["cpu", "cuda"], find: Callable[[], object] = find_compiler
) -> Kernels:
    """What `model.kernels` means on such a device.

    `find` raises NativeUnavailable where there are no native kernels. A launcher looks for a compiler; who is going to
    use them passes what builds them.

    Raises:
        ConfigError: it asks for native ones, and they cannot be had.
    """
    if kind == "cuda":
        return "triton"
    if wanted == "torch":
        return "torch"
    try:
        find()
    except NativeUnavailable as error:
        if wanted == "native":
            raise ConfigError(f"model.kernels is 'native', but {error}; or use auto or torch") from None
        _log.warning("running without native kernels, several times slower: %s", error)
        return "torch"
    return "native"


def resolve_device(wanted: DeviceChoice, index: int = 0) -> torch.device:
    """The device that a worker computes on.

    Raises:
        ConfigError: it asks for a GPU that is not there.
    """
    import torch

    num_gpus = torch.cuda.device_count() if wanted != "cpu" and _sees_gpus() else 0
    if chosen_kind(wanted, num_gpus) == "cpu":
        return torch.device("cpu")
    if index >= num_gpus:
        raise ConfigError(f"this worker was given GPU {index}, and torch sees {num_gpus}; start fewer workers")
    return torch.device("cuda", index)


def describe_device(device: torch.device) -> str:
    """A GPU as far as libraries choose their kernels by it."""
    import torch

    found = torch.cuda.get_device_properties(device)
    return f"{found.name} with {found.multi_processor_count} processors"


def refuse_unserved(spec: ModelSpec, codec: str) -> None:
    """Say what a GPU's kernels do not cover, before anything is loaded. `codec`: a name of `kv.spec.CODEC_NAMES`.

    Raises:
        ConfigError: the model or the cache needs something else; names the remedy.
    """
    if isinstance(spec.attention, LatentAttention):
        raise ConfigError(
            f"{spec.architecture} attends to a latent cache, which is not served on a GPU yet; use model.device: cpu"
        )
    if codec == "float32":
        raise ConfigError(
            "cache.dtype is 'float32', which is not served on a GPU; use fp8 or bfloat16, or model.device: cpu"
        )
