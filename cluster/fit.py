"""What a model takes on a kind of GPU, rank by rank, and how many tokens of KV are left. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..core.errors import DoesNotFit
from ..model.resolved import MemoryNeeds
from ..worker.automatic import size_worker
from ..worker.machine import MachineFacts
from .catalogue import GPU_BY_NAME, GpuModel, MachineShape
from .config import Config
from .nodes import Node

CORES_PER_GPU = 8  # of a machine that is not here; only the number of threads depends on it
HOST_BYTES_PER_GPU = 64 << 30


@dataclass(frozen=True, slots=True)
class RankFit:
    """One worker of `num_ranks` GPUs. Bytes are those of one rank."""

    num_ranks: int
    weight_bytes: int
    activation_bytes: int  # of the largest step
    pool_bytes: int  # 0: it does not fit
    num_tokens: int  # that the worker's pool holds
    max_model_len: int  # tokens of the longest context that is served
    arithmetic: str  # of all ranks together, or why nothing fits

    @property
    def is_possible(self) -> bool:
        """True if weights, activations and at least one KV block fit."""
        return self.pool_bytes > 0

    @property
    def is_served(self) -> bool:
        """True if this release runs such a worker: GPUs have one rank."""
        return self.is_possible and self.num_ranks == 1

    def read_ms(self, gpu: GpuModel) -> float:
        """Time to read a rank's weights once: no decode step of a dense model is shorter."""
        return self.weight_bytes / gpu.bandwidth_gb_per_s / 1e6


def fits(needs: Mapping[int, MemoryNeeds], config: Config, gpu: GpuModel) -> list[RankFit]:
    """One line per number of ranks, ascending. `needs`: of all ranks together, by their number."""
    return [_fit(num_ranks, needs[num_ranks], config, gpu) for num_ranks in sorted(needs)]


def kinds_that_hold(needs: MemoryNeeds, config: Config) -> list[str]:
    """Names of the catalogue's GPUs that hold a worker of one rank, those with the least memory first."""
    held = [gpu for gpu in GPU_BY_NAME.values() if _fit(1, needs, config, gpu).is_possible]
    return [gpu.name for gpu in sorted(held, key=lambda gpu: (gpu.memory_gb, gpu.name))]


def nodes_of(shape: MachineShape) -> list[Node]:
    """Machines that are not here: idle GPUs, and cores that are assumed. The first one has the launcher.

    Several have names, as those of a joined Ray have.
    """
    num_gpus = shape.gpus_per_node
    facts = MachineFacts(
        num_cores=CORES_PER_GPU * num_gpus,
        memory_bytes=HOST_BYTES_PER_GPU * num_gpus,
        gpu_bytes=(shape.gpu.free_bytes,) * num_gpus,
        cores_reason=f"assumed: {CORES_PER_GPU} per GPU",
    )
    if shape.num_nodes == 1:
        return [Node.alone(facts)]
    names = [f"node {number}" for number in range(shape.num_nodes)]
    return [Node(name, name, facts, is_here=name == names[0]) for name in names]


def _fit(num_ranks: int, needs: MemoryNeeds, config: Config, gpu: GpuModel) -> RankFit:
    try:
        sized = size_worker(
            needs,
            config.step,
            config.cache,
            "cuda",
            memory_bytes=num_ranks * gpu.free_bytes,
            device_bytes=gpu.free_bytes,
            wanted=config.model.max_model_len,
        )
    except DoesNotFit as error:
        return RankFit(num_ranks, needs.weight_bytes // num_ranks, 0, 0, 0, 0, str(error))
    pool = sized.pool
    return RankFit(
        num_ranks,
        needs.weight_bytes // num_ranks,
        sized.activation_bytes // num_ranks,
        pool.pool_bytes // num_ranks,
        pool.num_tokens,
        sized.max_model_len,
        pool.arithmetic,
    )
