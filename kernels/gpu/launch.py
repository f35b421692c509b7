"""Launch parameters of kernels on each architecture, and options of all launches. Knows no kernel's code.

Fused multiply-add is off everywhere, and warps and stages are pinned, so that a compiler's default cannot change bits.
Parameters change speed and memory. Those of attention may also change bits, but only on architectures whose tensor
cores sum in another order anyway: a numerics class names its architecture.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton

LIMITED = ("sm_86", "sm_89", "sm_120")  # 99 KiB of shared memory for one block


class Attention(NamedTuple):
    """Launch parameters of an attention kernel."""

    num_warps: int
    num_stages: int
    rows: int  # rows of scores per program: query tokens times the query heads that share a KV head


def options(num_warps: int, num_stages: int = 1) -> dict[str, Any]:
    """Keyword arguments of a launch."""
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": False}


def interpreted() -> bool:
    """True if kernels run in Triton's interpreter, on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def architecture(device: torch.device) -> str:
    """The target's name, such as "sm_90" or "gfx942"; "interpreter" where kernels are interpreted."""
    return "interpreter" if interpreted() else _architecture(device.index)


@lru_cache
def _architecture(index: int | None) -> str:
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(index).gcnArchName).split(":", maxsplit=1)[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def casts_fp8(arch: str) -> bool:
    """True if the target decodes e4m3 by an instruction."""
    return arch.startswith("sm_") and int(arch.removeprefix("sm_")) >= 89


def prefill(arch: str, width: int, group: int) -> Attention:
    """Launch parameters of ragged prefill attention. On sm_90, the most rows whose accumulators fit the registers.

    There, groups of four warps multiply 64 rows at a time, and keys and values are loaded to shared memory meanwhile.
    """
    warps, stages, rows = (4, 2, 64) if width <= 64 else (8, 1, 32) if width <= 128 else (8, 1, 16)
    if arch == "sm_90" and width <= 128:
        warps, stages, rows = 8, 3, 128
    if arch.startswith("gfx") or arch in LIMITED:
        stages = 1
    return Attention(warps, stages, max(rows, triton.next_power_of_2(group)))


def decode(arch: str, width: int, group: int) -> Attention:
    """Launch parameters of split decode attention. Rows: the query heads of one token, padded to 16 for `tl.dot`."""
    warps, stages = 4, 1 if width > 128 or arch.startswith("gfx") else 2
    if arch == "sm_90" and width <= 128:
        warps, stages = 2, 3
    return Attention(warps, stages, max(16, triton.next_power_of_2(group)))
