"""Placement: the processes of a configuration on its machines, with roles, threads, ports and memory. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..checkpoint.activations import NO_STEP, StepBytes
from ..core.errors import ConfigError
from ..core.hosts import is_loopback_name
from ..core.request import Role
from ..kv.sizing import PoolSize
from ..kv.spec import KvSpec
from ..model.ops.device import chosen_kind, refuse_gpu_ranks
from ..worker.automatic import Decision, decided_patience, decided_router, size_worker
from ..worker.machine import MachineFacts
from .config import Config
from .nodes import LOOPBACK, TO_COME, Node, Wanted, spread


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
    state_bytes: int = 0  # of a sequence's recurrent state
    adapter_bytes: int = 0  # of a worker, kept for adapters
    draft_directory: str = ""  # of the draft model or heads; empty: there are none
    draft: str = ""  # its part of weights and KV, as text


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
    gpu_share: float = 1.0  # of its GPU, for this worker
    metrics_port: int | None = None  # of a worker; 0: any, None: off
    num_ranks: int = 1  # tensor-parallel ranks of a worker, with `num_threads` each
    first_core: int | None = None  # its ranks' cores begin here, among those of the machine; None: any cores
    index: int = 0  # of a router, among those that share its ports
    node: str = ""  # the launcher's name of its machine; empty: this one
    host: str = LOOPBACK  # address that it listens at, for the others


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
        router = {name: getattr(found.router, name) for name in ("max_running", "max_running_tokens", "internal_host")}
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
    """`place_on` this machine alone."""
    return place_on(config, (Node.alone(machine),), model)


def place_on(config: Config, nodes: Sequence[Node], model: ModelFacts) -> Plan:
    """Plan the routers, then prefill, then decode workers; cores and memory in equal shares, GPUs round-robin.

    All workers have pools of one size: that of the smallest share of memory.

    Raises:
        DoesNotFit: weights and pool of so many workers do not fit the nodes, or the configured context does not.
        ConfigError: no node has the configured device, it cannot have several ranks, or two members had one port.
    """
    decided: list[Decision] = []
    if model.state_bytes and config.cluster.prefill:
        why = "the model's recurrent layers have states, which are not handed over: combined workers"
        decided = [Decision("cluster.prefill", "0", why)]
        config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"prefill": 0})})
    cluster = config.cluster
    if cluster.prefill:
        roles = [("prefill", Role.PREFILL)] * cluster.prefill + [("decode", Role.DECODE)] * cluster.decode
    else:
        roles = [("combined", Role.COMBINED)] * cluster.decode
    device = chosen_kind(config.model.device, sum(len(node.machine.gpu_bytes) for node in nodes))
    usable = [node for node in nodes if node.units(device)]
    if not usable:
        what = "GPU" if device == "cuda" else "CPU"
        raise ConfigError(f"no node of the cluster has a {what} that may be used; `ray start --num-{what.lower()}s N`")
    refuse_gpu_ranks(max(cluster.ranks_of(role) for _, role in roles), device)
    most = config.num_places
    wanted = [Wanted(prefix, cluster.ranks_of(role)) for prefix, role in roles]
    wanted += wanted[-1:] * (most - len(wanted))  # the planner's workers all have the same number of ranks
    coming = most - _num_now(config, usable, device, len(roles))
    wanted = wanted[: most - coming]
    chosen = spread(usable, wanted, device)
    loads = [
        _Load(node, device, tuple(w.num_ranks for w, at in zip(wanted, chosen, strict=True) if at == n))
        for n, node in enumerate(usable)
    ]
    used_nodes = [load for load in loads if load.ranks]
    share = min(load.share(bytes_beside_workers(config)) for load in used_nodes)
    _check_metrics_ports(config, most)
    sized = size_worker(
        model,
        config.step,
        config.cache,
        device,
        memory_bytes=share,
        device_bytes=min(max(load.node.machine.gpu_bytes, default=0) for load in used_nodes),
        wanted=model.asked_max_model_len,
    )
    decisions = [*decided, *sized.decisions, _decided_threads(config, used_nodes)]
    decoders = most - 1 if most > len(roles) else cluster.decode
    router, more = decided_router(config.router, decoders, sized.step.max_num_seqs, sized.pool)
    decisions += more
    patience, more = decided_patience(cluster, model.weight_bytes, len(roles))
    decisions += more
    each = ProcessPlan("", "worker", memory_bytes=share, device=device)
    places = _places(replace(each, metrics_port=cluster.worker_metrics_port), chosen, wanted, loads, config)
    further = replace(places[-1], node=TO_COME, host="", gpu=0, gpu_share=1.0, first_core=None)
    ports = [port and port + n for n, port in enumerate([cluster.worker_metrics_port] * most)]
    places += [replace(further, metrics_port=port) for port in ports[len(places) :]]
    here = next((node for node in nodes if node.is_here), nodes[0])
    is_spread = coming > 0 or any(load.node is not here for load in used_nodes)
    if not is_spread:
        places = [replace(place, host=LOOPBACK) for place in places]
    counts: dict[str, int] = {}
    router_host = here.address if is_spread else LOOPBACK
    each_router = ProcessPlan("", "router", node=here.name, host=router_host)
    members = [replace(each_router, name=f"router-{index}", index=index) for index in range(cluster.routers)]
    for (prefix, role), empty in zip(roles, places, strict=False):
        index = counts.setdefault(prefix, 0)
        counts[prefix] += 1
        members.append(replace(empty, name=f"{prefix}-{index}", role=role))
    if is_spread and is_loopback_name(router.internal_host):
        router = router.model_copy(update={"internal_host": here.address})
    update = {"step": sized.step, "cache": sized.cache, "router": router, "cluster": patience}
    served = replace(model, max_model_len=sized.max_model_len)
    settled, free = config.model_copy(update=update), tuple(places[len(roles) :])
    return Plan(tuple(members), served, sized.pool, settled, tuple(decisions), _spare_gpus(members, nodes), free)


def _num_now(config: Config, nodes: Sequence[Node], device: str, num_configured: int) -> int:
    """Number of workers with a place on the present nodes. The others wait for further nodes."""
    if not config.planner.new_nodes:
        return config.num_places
    num_ranks = config.cluster.ranks_of(Role.DECODE)
    return min(config.num_places, max(num_configured, sum(node.units(device) // num_ranks for node in nodes)))


@dataclass(frozen=True, slots=True)
class _Load:
    """A node and the ranks of each of its workers."""

    node: Node
    device: str
    ranks: tuple[int, ...]

    @property
    def has_more_ranks(self) -> bool:
        return sum(self.ranks) > len(self.ranks)

    def threads(self, config: Config) -> int:
        """Threads of each rank."""
        return config.step.num_threads or max(1, self.node.machine.num_cores // sum(self.ranks))

    def share(self, beside_workers: int) -> int:
        """Memory of each worker in bytes: the smallest share over all devices of the node."""
        machine, num_workers = self.node.machine, len(self.ranks)
        if self.device == "cpu":
            more_ranks = (sum(self.ranks) - num_workers) * RANK_BYTES
            others = more_ranks + (beside_workers if self.node.is_here else 0)
            return max(0, machine.memory_bytes - others) // num_workers
        num_gpus = len(machine.gpu_bytes)
        workers = [len(range(gpu, num_workers, num_gpus)) for gpu in range(num_gpus)]
        return min(free // count for free, count in zip(machine.gpu_bytes, workers, strict=True) if count)


def _places(
    each: ProcessPlan, chosen: Sequence[int], wanted: Sequence[Wanted], loads: Sequence[_Load], config: Config
) -> list[ProcessPlan]:
    """Room for each worker that there may ever be, all like `each`, on the `chosen` of `loads`."""
    next_core, num_placed, places = Counter[int](), Counter[int](), list[ProcessPlan]()
    for number, (at, worker) in enumerate(zip(chosen, wanted, strict=True)):
        load = loads[at]
        machine, threads = load.node.machine, load.threads(config)
        num_gpus = len(machine.gpu_bytes) if each.device == "cuda" else 1
        gpu = num_placed[at] % num_gpus
        has_cores = load.has_more_ranks and threads * sum(load.ranks) <= machine.num_cores
        places.append(
            replace(
                each,
                num_threads=threads,
                gpu=gpu,
                gpu_share=1 / len(range(gpu, len(load.ranks), num_gpus)) if each.device == "cuda" else 1.0,
                metrics_port=each.metrics_port and each.metrics_port + number,
                num_ranks=worker.num_ranks,
                first_core=next_core[at] if has_cores else None,
                node=load.node.name,
                host=load.node.address,
            )
        )
        num_placed[at] += 1
        next_core[at] += threads * worker.num_ranks
    return places


def _decided_threads(config: Config, loads: Sequence[_Load]) -> Decision:
    threads = sorted({load.threads(config) for load in loads})
    value = " to ".join(dict.fromkeys((str(threads[0]), str(threads[-1]))))
    if config.step.num_threads:
        return Decision("step.num_threads", value, "as given")
    machine = loads[0].node.machine
    why = f"{machine.num_cores} cores{machine.cores_reason and f' ({machine.cores_reason})'} ÷ "
    more = f", on the first of {len(loads)} nodes" if len(loads) > 1 else ""
    return Decision("step.num_threads", value, f"{why}{_told_ranks(loads[0].ranks)}{more}")


def _spare_gpus(members: Sequence[ProcessPlan], nodes: Sequence[Node]) -> tuple[int, ...]:
    """GPUs of this machine without a worker. On several nodes the launcher finds another itself."""
    used = {member.gpu for member in members if member.device == "cuda"}
    return tuple(sorted(set(range(len(nodes[0].machine.gpu_bytes))) - used)) if used and len(nodes) == 1 else ()


def _told_ranks(ranks: Sequence[int]) -> str:
    return f"{len(ranks)} workers" if sum(ranks) == len(ranks) else f"{sum(ranks)} ranks of {len(ranks)} workers"


def bytes_beside_workers(config: Config) -> int:
    """Memory of the other processes of a cluster on this machine: routers, launcher, and a Ray of our own."""
    has_ray = config.cluster.launcher == "ray" and config.cluster.ray_address in (None, "local")
    further_routers = (config.cluster.routers - 1) * FURTHER_ROUTER_BYTES
    return ROUTER_BYTES + further_routers + (RAY_BYTES if has_ray else 0)


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
