"""Choice of device and kernels, limits of GPUs and their kernels, and free memory of GPUs.

Imports torch only where a GPU may exist.
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

GPU_CODECS = ("fp8", "fp8_e5m2", "int8", "bfloat16")  # of keys and values alike

_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/kfd"), Path("/dev/dxg"))  # NVIDIA, AMD, either under WSL


def gpu_free_bytes() -> tuple[int, ...]:
    """Free bytes of each GPU that torch sees; empty without one. Without a GPU driver torch is not imported."""
    if not any(driver.exists() for driver in _DRIVERS) or not _sees_gpus():
        return ()
    import torch

    from_driver = None if "CUDA_VISIBLE_DEVICES" in os.environ else _driver_free_bytes()
    if from_driver is not None and len(from_driver) == torch.cuda.device_count():
        return from_driver
    return tuple(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count()))


def _sees_gpus() -> bool:
    """Return whether torch sees GPUs. False under Triton's interpreter, whose kernels need CPU tensors."""
    import torch

    return os.environ.get("TRITON_INTERPRET") != "1" and torch.cuda.is_available()


def _driver_free_bytes() -> tuple[int, ...] | None:
    """Free bytes of all GPUs from NVIDIA's driver; None without nvidia-ml-py. Unlike torch, it allocates no memory."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        free = tuple(int(pynvml.nvmlDeviceGetMemoryInfo(handle).free) for handle in handles)
        pynvml.nvmlShutdown()
    except Exception:  # the package's error classes exist only if it is installed
        return None
    return free


def chosen_kind(wanted: DeviceChoice, num_gpus: int) -> Literal["cpu", "cuda"]:
    """Device kind for a value of `model.device` on a machine with `num_gpus` GPUs.

    Raises:
        ConfigError: a GPU is requested, and there is none.
    """
    if wanted == "cuda" and not num_gpus:
        raise ConfigError(
            "model.device is 'cuda', and torch sees no GPU here; install torch for CUDA or ROCm, or use auto or cpu"
        )
    return "cuda" if wanted != "cpu" and num_gpus else "cpu"


def chosen_kernels(
    wanted: KernelsChoice, kind: Literal["cpu", "cuda"], find: Callable[[], object] = find_compiler
) -> Kernels:
    """Kernels for a value of `model.kernels` on a kind of device.

    `find` raises NativeUnavailable if there are no native kernels. The default only looks for a compiler; a caller that
    uses the kernels passes a function that builds them.

    Raises:
        ConfigError: native kernels are requested and not available.
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
    """Return the device on which a worker computes.

    Raises:
        ConfigError: the requested GPU does not exist.
    """
    import torch

    num_gpus = torch.cuda.device_count() if wanted != "cpu" and _sees_gpus() else 0
    if chosen_kind(wanted, num_gpus) == "cpu":
        return torch.device("cpu")
    if index >= num_gpus:
        raise ConfigError(f"this worker was given GPU {index}, and torch sees {num_gpus}; start fewer workers")
    return torch.device("cuda", index)


def gpu_uuid(index: int) -> str:
    """UUID of a GPU that torch sees, as NVML names it; empty if torch does not tell it.

    Torch counts GPUs in the order of CUDA_DEVICE_ORDER, which need not be NVML's.
    """
    import torch

    found = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    return f"GPU-{found}" if found else ""


def describe_device(device: torch.device) -> str:
    """Properties by which libraries choose their kernels on a GPU."""
    import torch

    found = torch.cuda.get_device_properties(device)
    return f"{found.name} with {found.multi_processor_count} processors"


def refuse_gpu_ranks(num_ranks: int, kind: Literal["cpu", "cuda"]) -> None:
    """Refuse a worker of several tensor-parallel ranks on GPUs.

    Raises:
        ConfigError: there are several, and the device is a GPU.
    """
    if kind == "cuda" and num_ranks > 1:
        raise ConfigError(
            f"a worker has {num_ranks} tensor-parallel ranks, and GPUs have one in this release: "
            "cluster.tensor_parallel_size, prefill_tp and decode_tp must be 1 there; tensor parallelism runs on CPUs "
            "(TWOSTROKE__MODEL__DEVICE=cpu)"
        )


def refuse_unserved(spec: ModelSpec, codec: str) -> None:
    """Refuse models and caches that a GPU's kernels do not support, before loading. `codec`: in `kv.spec.pair_name`.

    Raises:
        ConfigError: the model or the cache is not supported on a GPU; names the remedy.
    """
    if isinstance(spec.attention, LatentAttention):
        raise ConfigError(
            f"{spec.architecture} attends to a latent cache, which is not served on a GPU yet; use model.device: cpu"
        )
    if spec.delta is not None:
        raise ConfigError(
            f"{spec.architecture} has recurrent layers, which are not served on a GPU yet; use model.device: cpu"
        )
    if codec not in GPU_CODECS:
        raise ConfigError(
            f"cache.dtype is {codec!r}, which is not served on a GPU; use {', '.join(GPU_CODECS)}, or model.device: cpu"
        )
