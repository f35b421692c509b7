"""Places for further workers, and whether one fits now. Pure: the caller reads the machines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ...core.request import Role
from ...worker.automatic import PROCESS_BYTES
from ...worker.machine import MachineFacts
from ..nodes import TO_COME, Node
from ..placement import RANK_BYTES, Plan, ProcessPlan
from ..wanted import options_on


@dataclass(frozen=True, slots=True)
class NoRoom:
    """No further worker can be started, for this reason."""

    reason: str
    num_to_come: int = 0  # further workers that could start if machines came


class Room:
    """The places of a plan. A worker that goes leaves its place to another; names are never used again."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._here = next(member.node for member in plan.members if member.kind == "router")
        self._free: list[ProcessPlan] = list(plan.free_places)
        self._next: Counter[str] = Counter(_prefix(worker) for worker in plan.workers)
        places = [*plan.workers, *plan.free_places]
        self._most_on_gpu = Counter((place.node, place.gpu) for place in places if place.device == "cuda")
        self._planned_nodes = {place.node for place in places}

    @property
    def num_free(self) -> int:
        """Places without a worker."""
        return len(self._free)

    @property
    def free(self) -> tuple[ProcessPlan, ...]:
        """Those places."""
        return tuple(self._free)

    @property
    def next_numbers(self) -> dict[str, int]:
        """Number of the next worker, by the first part of its name."""
        return dict(self._next)

    def restore(self, free: Iterable[ProcessPlan], next_numbers: Mapping[str, int]) -> None:
        """Go on where another supervisor of the same plan was."""
        self._free, self._next = list(free), Counter(next_numbers)

    def take(
        self,
        role: Role,
        machine: MachineFacts,
        members: Sequence[ProcessPlan],
        cordoned: Container[int] = (),
        *,
        loading: Iterable[ProcessPlan] = (),
        nodes: Sequence[Node] = (),
    ) -> ProcessPlan | NoRoom:
        """A worker of this role in a free place. `members`: all present ones; `cordoned`: GPUs not to be used here.

        `machine`: this one; `nodes`: all that answer, where there are several.
        `loading`: members that do not hold their memory yet.

        The caller starts it, or gives it back.
        """
        if not self._free:
            return NoRoom(f"all {len(self._plan.workers) + len(self._plan.free_places)} places have a worker")
        machines = {self._here: machine} | {node.name: node.machine for node in nodes}
        on_gpu = Counter((member.node, member.gpu) for member in members if member.device == "cuda")
        num_loading = Counter(member.node for member in loading)
        moves = self._plan.config.planner.new_nodes
        reasons = list[str]()
        for place in self._free:
            is_homeless = moves and place.node not in machines
            for on in options_on(nodes, place, members) if is_homeless else [place]:
                there = machines.get(on.node)
                left = there and _left(there, self._bytes_of(on) * num_loading[on.node])
                taken = 0 if is_homeless else on_gpu[on.node, on.gpu]
                reason = self._obstacle(on, left, taken, cordoned)
                if not reason:
                    self._free.remove(place)
                    return self._named(on, role)
                reasons.append(reason)
        homeless = sum(1 for place in self._free if moves and place.node not in machines)
        return NoRoom(reasons[0] if reasons else "no machine of the cluster has a device for one more worker", homeless)

    def places_to_come(self, count: int) -> list[ProcessPlan]:
        """So many of the free places, those first whose machine is not there yet."""
        return sorted(self._free, key=lambda place: place.node != TO_COME)[:count]

    def beside(
        self, member: ProcessPlan, machine: MachineFacts, members: Iterable[ProcessPlan], cordoned: Container[int] = ()
    ) -> ProcessPlan | NoRoom:
        """A worker that takes the place of `member`, which still runs, when it serves: both must fit for a while.

        On GPUs it needs one without a worker. It has no cores and no fixed metrics port of its own.
        """
        gpu = member.gpu
        if member.device == "cuda":
            used = {each.gpu for each in members if each.device == "cuda"}
            free = [g for g in range(len(machine.gpu_bytes)) if g not in used and g not in cordoned]
            if not free:
                return NoRoom("every GPU has a worker")
            gpu = free[0]
        if reason := self._lack(replace(member, gpu=gpu), machine if member.node == self._here else None):
            return NoRoom(reason)
        role = member.role or Role.COMBINED
        port = member.metrics_port and 0  # its own is in use until the old worker is gone
        return self._named(replace(member, gpu=gpu, metrics_port=port), role)

    def give_back(self, member: ProcessPlan) -> None:
        """A worker is gone for good: its place is free. A machine that came for it may go, too."""
        if member.node not in self._planned_nodes:
            member = replace(member, node=TO_COME, host="", gpu=0)
        self._free.append(replace(member, name="", role=None))

    def _named(self, place: ProcessPlan, role: Role) -> ProcessPlan:
        number = self._next[role.value]
        self._next[role.value] += 1
        return replace(place, name=f"{role.value}-{number}", role=role)

    def _obstacle(
        self, place: ProcessPlan, machine: MachineFacts | None, num_on_gpu: int, cordoned: Container[int]
    ) -> str:
        if place.device == "cuda" and place.node == self._here and place.gpu in cordoned:
            return f"GPU {place.gpu} is cordoned"
        if place.device == "cuda" and num_on_gpu >= max(1, self._most_on_gpu[place.node, place.gpu]):
            return f"GPU {place.gpu} has a worker already"
        return self._lack(place, machine)

    def _lack(self, place: ProcessPlan, machine: MachineFacts | None) -> str:
        """What is missing for a worker in this place, as arithmetic; empty: nothing. None: its machine is not known."""
        if machine is None:
            return f"it is for {place.host}, another machine, and what is free there is not known here"
        model, pool = self._plan.model, self._plan.pool
        needed = self._bytes_of(place)
        have, where = machine.memory_bytes, "the machine has" if place.node == self._here else f"{place.host} has"
        if place.device == "cuda":
            have = machine.gpu_bytes[place.gpu] if place.gpu < len(machine.gpu_bytes) else 0
            where = f"GPU {place.gpu} has"
        if have >= needed:
            return ""
        adapters = f"{model.adapter_bytes >> 20:,} for adapters, " if model.adapter_bytes else ""
        return (
            f"{where} {have >> 20:,} MiB free, and a worker takes {needed >> 20:,}: {model.weight_bytes >> 20:,} for "
            f"weights, {adapters}{pool.pool_bytes >> 20:,} for KV, the rest for its process"
        )

    def _bytes_of(self, place: ProcessPlan) -> int:
        """Memory of a worker, of its device."""
        on_device = self._plan.model.weight_bytes + self._plan.model.adapter_bytes + self._plan.pool.pool_bytes
        return on_device if place.device == "cuda" else on_device + PROCESS_BYTES + RANK_BYTES * (place.num_ranks - 1)


def _left(machine: MachineFacts, num_bytes: int) -> MachineFacts:
    return replace(machine, memory_bytes=max(0, machine.memory_bytes - num_bytes))


def _prefix(worker: ProcessPlan) -> str:
    return worker.name.rpartition("-")[0]
