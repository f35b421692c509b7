"""Placement: the processes of a configuration on this machine, with roles, threads, ports and memory. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ..checkpoint.activations import NO_STEP, StepBytes
from ..core.errors import ConfigError
from ..core.request import Role
from ..kv.sizing import PoolSize
from ..kv.spec import KvSpec
from ..model.ops.device import chosen_kind
from ..worker.automatic import Decision, decided_patience, decided_router, size_worker
from ..worker.machine import MachineFacts
from .config import Config


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Requirements of a checkpoint, in the chosen dtypes."""

    name: str
    directory: str
    weight_bytes: int
    kv_spec: KvSpec
    max_model_len: int
    arithmetic: str = ""  # dtype, weights, kernels, device, as text for display
    asked_max_model_len: int | None = None  # as configured
    remarks: tuple[str, ...] = ()  # differences between the checkpoint's statements and our reading of them
    sampling: str = ""  # the checkpoint's sampling defaults, as text; empty: none
    step_bytes: StepBytes = NO_STEP  # of a step's intermediate values


@dataclass(frozen=True, slots=True)
class ProcessPlan:
    """One process to start."""

    name: str  # "prefill-0", "router-0"
    kind: Literal["worker", "router"]
    role: Role | None = None
    num_threads: int = 1
    memory_bytes: int = 0  # of its device
    device: Literal["cpu", "cuda"] = "cpu"
    gpu: int = 0
    metrics_port: int | None = None  # of a worker; 0: any, None: off
    num_ranks: int = 1  # tensor-parallel ranks of a worker, with `num_threads` each
    first_core: int | None = None  # its ranks' cores begin here, among those of the machine; None: any cores
    index: int = 0  # of a router, among those that share its ports


@dataclass(frozen=True, slots=True)
class Plan:
    """All processes of the cluster, and the settings decided for them."""

    members: tuple[ProcessPlan, ...]
    model: ModelFacts
    pool: PoolSize  # of each worker
    config: Config  # with decided values for settings that were not given
    decisions: tuple[Decision, ...]
    spare_gpus: tuple[int, ...] = ()  # without a worker
    free_places: tuple[ProcessPlan, ...] = ()  # for workers that the planner may start; without name and role

    @property
    def workers(self) -> tuple[ProcessPlan, ...]:
        """Members that hold an engine."""
        return tuple(member for member in self.members if member.kind == "worker")

    def settle(self, config: Config) -> Config:
        """`config` with this plan's decided values, so that every process of the cluster uses the same."""
        found = self.config
        router = {name: getattr(found.router, name) for name in ("max_running", "max_running_tokens")}
        return config.model_copy(
            update={
                "step": found.step,
                "cache": found.cache,
                "model": config.model.model_copy(update={"max_model_len": self.model.max_model_len}),
                "router": config.router.model_copy(update=router),
                "cluster": config.cluster.model_copy(update={"ready_timeout_s": found.cluster.ready_timeout_s}),
            }
        )


ROUTER_BYTES = 400 << 20  # memory of a router (without torch) and of the launcher
FURTHER_ROUTER_BYTES = 200 << 20  # of each router after the first
RAY_BYTES = 450 << 20  # memory of the processes of a local Ray: 340 MiB measured, and its object store
RANK_BYTES = 300 << 20  # memory of a further rank's process, without weights and pool


def place(config: Config, machine: MachineFacts, model: ModelFacts) -> Plan:
    """Plan the routers, then prefill, then decode workers; cores and memory in equal shares, GPUs round-robin.

    Raises:
        DoesNotFit: weights and pool of so many workers do not fit the machine, or the configured context does not.
        ConfigError: the configured device is not there, cannot have several ranks, or two members would have one port.
    """
    cluster = config.cluster
    if cluster.prefill:
        roles = [("prefill", Role.PREFILL)] * cluster.prefill + [("decode", Role.DECODE)] * cluster.decode
    else:
        roles = [("combined", Role.COMBINED)] * cluster.decode
    device = chosen_kind(config.model.device, len(machine.gpu_bytes))
    most = config.num_places
    ranks = [cluster.ranks_of(role) for _, role in roles]
    ranks += ranks[-1:] * (most - len(ranks))  # the planner's workers all have the same number
    _check_ranks(config, device)
    more_ranks = sum(ranks) - most
    share = _share(machine, device, most, more_ranks * RANK_BYTES + bytes_beside_workers(config))
    threads = config.step.num_threads or max(1, machine.num_cores // sum(ranks))
    _check_metrics_ports(config, most)
    sized = size_worker(
        model,
        config.step,
        config.cache,
        device,
        memory_bytes=share,
        device_bytes=max(machine.gpu_bytes, default=0),
        wanted=model.asked_max_model_len,
    )
    decisions = list(sized.decisions)
    reason = f"{machine.num_cores} cores{machine.cores_reason and f' ({machine.cores_reason})'} ÷ {_told_ranks(ranks)}"
    decisions.append(Decision("step.num_threads", str(threads), "as given" if config.step.num_threads else reason))
    decoders = most - 1 if most > len(roles) else cluster.decode
    router, more = decided_router(config.router, decoders, sized.step.max_num_seqs, sized.pool)
    decisions += more
    patience, more = decided_patience(cluster, model.weight_bytes, len(roles))
    decisions += more
    has_cores = bool(more_ranks) and threads * sum(ranks) <= machine.num_cores
    each = ProcessPlan("", "worker", num_threads=threads, memory_bytes=share, device=device)
    places = _places(each, ranks, len(machine.gpu_bytes), cluster.worker_metrics_port, has_cores=has_cores)
    counts: dict[str, int] = {}
    members = [ProcessPlan(f"router-{index}", "router", index=index) for index in range(cluster.routers)]
    for (prefix, role), empty in zip(roles, places, strict=False):
        index = counts.setdefault(prefix, 0)
        counts[prefix] += 1
        members.append(replace(empty, name=f"{prefix}-{index}", role=role))
    update = {"step": sized.step, "cache": sized.cache, "router": router, "cluster": patience}
    served = replace(model, max_model_len=sized.max_model_len)
    used = {member.gpu for member in members if member.device == "cuda"}
    spare = tuple(sorted(set(range(len(machine.gpu_bytes))) - used)) if device == "cuda" else ()
    settled, free = config.model_copy(update=update), tuple(places[len(roles) :])
    return Plan(tuple(members), served, sized.pool, settled, tuple(decisions), spare, free)


def _places(
    each: ProcessPlan, ranks: list[int], num_gpus: int, first_port: int | None, *, has_cores: bool
) -> list[ProcessPlan]:
    """Room for each worker that there may ever be, all like `each`. `ranks`: of each; `has_cores`: has its own."""
    next_core, places = 0, list[ProcessPlan]()
    for number, num_ranks in enumerate(ranks):
        places.append(
            replace(
                each,
                gpu=number % num_gpus if each.device == "cuda" else 0,
                metrics_port=first_port and first_port + number,
                num_ranks=num_ranks,
                first_core=next_core if has_cores else None,
            )
        )
        next_core += each.num_threads * num_ranks
    return places


def _told_ranks(ranks: list[int]) -> str:
    return f"{len(ranks)} workers" if sum(ranks) == len(ranks) else f"{sum(ranks)} ranks of {len(ranks)} workers"


def _check_ranks(config: Config, device: str) -> None:
    cluster = config.cluster
    if device == "cuda" and max(cluster.ranks_of(Role.PREFILL), cluster.ranks_of(Role.DECODE)) > 1:
        raise ConfigError(
            "cluster.tensor_parallel_size, prefill_tp and decode_tp must be 1 on GPUs in this release; tensor "
            "parallelism runs on CPUs (TWOSTROKE__MODEL__DEVICE=cpu)"
        )


def bytes_beside_workers(config: Config) -> int:
    """Memory of the other processes of a cluster on this machine: routers, launcher, and a Ray of our own."""
    has_ray = config.cluster.launcher == "ray" and config.cluster.ray_address in (None, "local")
    further_routers = (config.cluster.routers - 1) * FURTHER_ROUTER_BYTES
    return ROUTER_BYTES + further_routers + (RAY_BYTES if has_ray else 0)


def _share(machine: MachineFacts, device: str, num_workers: int, other_bytes: int) -> int:
    """Memory of each worker in bytes: the smallest share over all devices. `other_bytes`: of other processes."""
    if device == "cpu":
        return max(0, machine.memory_bytes - other_bytes) // num_workers
    num_gpus = len(machine.gpu_bytes)
    workers = [len(range(gpu, num_workers, num_gpus)) for gpu in range(num_gpus)]
    return min(free // count for free, count in zip(machine.gpu_bytes, workers, strict=True) if count)


def _check_metrics_ports(config: Config, num_workers: int) -> None:
    first, router = config.cluster.worker_metrics_port, config.router
    if not first:
        return
    ports = range(first, first + num_workers)
    inside = range(router.internal_port, router.internal_port + config.cluster.routers) if router.internal_port else ()
    shared = [port for port in (router.port, router.grpc_port, *inside) if port in ports]
    if shared or ports[-1] > 65535:
        what = f"the router has {shared[0]}" if shared else "65535 is the last port"
        raise ConfigError(
            f"cluster.worker_metrics_port is {first}, so {num_workers} workers take {first} to {ports[-1]}, and "
            f"{what}; choose another, 0 for any, or none"
        )
