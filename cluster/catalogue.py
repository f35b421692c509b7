"""GPUs by name, for plans of machines that are not here. Pure: data and its parser.

Rates are dense (without structured sparsity), with float32 accumulation. `reported_mib` is what the driver reports as
total memory, with ECC as it is by default: less than the datasheet's number where ECC takes a part of it.
Sources: the makers' datasheets, named per entry; totals as `nvidia-smi` and `rocm-smi` show them.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from ..core.errors import ConfigError

MAX_NODES, MAX_GPUS_PER_NODE = 1024, 64
CONTEXT_BYTES = 600 << 20  # CUDA context, libraries and kernels of one process


@dataclass(frozen=True, slots=True)
class GpuModel:
    """One kind of GPU."""

    name: str
    memory_gb: int  # of the datasheet
    reported_mib: int
    bandwidth_gb_per_s: int  # of its memory
    bf16_tflops: float
    fp8_tflops: float | None  # None: no such units
    link_gb_per_s: int  # NVLink or Infinity Fabric, both directions together; 0: PCIe only
    source: str

    @property
    def free_bytes(self) -> int:
        """Memory of an idle GPU that one process can use."""
        return (self.reported_mib << 20) - CONTEXT_BYTES


_GPUS = (
    GpuModel("A10", 24, 23_028, 600, 125, None, 0, "NVIDIA A10 datasheet"),
    GpuModel("A10G", 24, 23_028, 600, 70, None, 0, "NVIDIA A10G datasheet; AWS G5"),
    GpuModel("A6000", 48, 46_068, 768, 154.8, None, 112, "NVIDIA RTX A6000 datasheet"),
    GpuModel("A100-40GB", 40, 40_960, 1_555, 312, None, 600, "NVIDIA A100 datasheet (SXM, 40 GB)"),
    GpuModel("A100-80GB", 80, 81_920, 2_039, 312, None, 600, "NVIDIA A100 datasheet (SXM, 80 GB)"),
    GpuModel("A100-80GB-PCIe", 80, 81_920, 1_935, 312, None, 600, "NVIDIA A100 datasheet (PCIe, 80 GB, with a bridge)"),
    GpuModel("L4", 24, 23_034, 300, 121, 242, 0, "NVIDIA L4 datasheet"),
    GpuModel("L40S", 48, 46_068, 864, 362, 733, 0, "NVIDIA L40S datasheet"),
    GpuModel("H100-SXM", 80, 81_559, 3_350, 989, 1_979, 900, "NVIDIA H100 datasheet (SXM)"),
    GpuModel("H100-PCIe", 80, 81_559, 2_000, 756, 1_513, 600, "NVIDIA H100 datasheet (PCIe, with a bridge)"),
    GpuModel("H100-NVL", 94, 95_830, 3_900, 835, 1_671, 600, "NVIDIA H100 datasheet (NVL)"),
    GpuModel("H200", 141, 143_771, 4_800, 989, 1_979, 900, "NVIDIA H200 datasheet (SXM)"),
    GpuModel("B200", 180, 183_359, 8_000, 2_250, 4_500, 1_800, "NVIDIA HGX B200 datasheet, per GPU"),
    GpuModel("RTX-4090", 24, 24_564, 1_008, 165.2, 330.3, 0, "NVIDIA Ada architecture white paper, appendix A"),
    GpuModel("MI300X", 192, 196_592, 5_300, 1_307, 2_615, 896, "AMD Instinct MI300X datasheet"),
)
_ALIASES = {
    "A100": "A100-80GB",
    "A100-40": "A100-40GB",
    "A100-80": "A100-80GB",
    "A100-PCIE": "A100-80GB-PCIe",
    "H100": "H100-SXM",
    "H100-80GB": "H100-SXM",
    "H200-SXM": "H200",
    "RTX4090": "RTX-4090",
    "4090": "RTX-4090",
    "RTX-A6000": "A6000",
}
GPU_BY_NAME = {gpu.name: gpu for gpu in _GPUS}
_BY_UPPER = {name.upper(): gpu for name, gpu in GPU_BY_NAME.items()} | {
    alias: GPU_BY_NAME[name] for alias, name in _ALIASES.items()
}
_FORM = re.compile(r"(?:(\d+)[xX])?(?:(\d+)[xX])?(\w[\w -]*)")


@dataclass(frozen=True, slots=True)
class MachineShape:
    """Nodes with GPUs of one kind."""

    num_nodes: int
    gpus_per_node: int
    gpu: GpuModel

    @property
    def num_gpus(self) -> int:
        """GPUs of all nodes."""
        return self.num_nodes * self.gpus_per_node

    def __str__(self) -> str:
        nodes = f"{self.num_nodes} nodes of " if self.num_nodes > 1 else ""
        gpu = self.gpu
        fp8 = f"{gpu.fp8_tflops:,g} in fp8" if gpu.fp8_tflops else "none in fp8"
        link = f"{gpu.link_gb_per_s:,} GB/s to its neighbours" if gpu.link_gb_per_s else "PCIe to its neighbours"
        return (
            f"{nodes}{self.gpus_per_node} × {gpu.name}: {gpu.reported_mib:,} MiB at {gpu.bandwidth_gb_per_s:,} GB/s, "
            f"{gpu.bf16_tflops:,g} TFLOP/s in bf16, {fp8}, {link} ({gpu.source})"
        )


def parse_machine(text: str) -> MachineShape:
    """Read "H100", "8xH100" or "2x8xH100": nodes x GPUs per node x kind.

    Raises:
        ConfigError: another form, a number out of bounds, or an unknown kind; names the nearest.
    """
    found = _FORM.fullmatch(text.strip())
    if found is None:
        raise ConfigError(
            f"--machine is {text!r}; must be GPUs x kind or nodes x GPUs x kind, e.g. 8xH100 or 2x4xA100-80GB"
        )
    first, second, kind = found[1], found[2], found[3].strip()
    nodes, gpus = (int(first), int(second)) if first and second else (1, int(first or 1))
    if not 1 <= nodes <= MAX_NODES or not 1 <= gpus <= MAX_GPUS_PER_NODE:
        raise ConfigError(
            f"--machine is {text!r}: {nodes} nodes with {gpus} GPUs each; must be 1 to {MAX_NODES} nodes and "
            f"1 to {MAX_GPUS_PER_NODE} GPUs per node"
        )
    return MachineShape(nodes, gpus, gpu_of(kind))


def gpu_of(name: str) -> GpuModel:
    """The kind of GPU of that name, in any case.

    Raises:
        ConfigError: it is not in the catalogue; names the nearest.
    """
    wanted = name.upper().replace(" ", "-").replace("_", "-")
    gpu = _BY_UPPER.get(wanted)
    if gpu is not None:
        return gpu
    near = difflib.get_close_matches(wanted, _BY_UPPER, n=1, cutoff=0.4)
    hint = f"did you mean {_BY_UPPER[near[0]].name}? Known" if near else "known"
    raise ConfigError(
        f"--machine names the GPU {name!r}, which is not in the catalogue; {hint}: {', '.join(GPU_BY_NAME)}"
    )
