"""Places for further workers on this machine, and whether one fits now. Pure: the caller reads the machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ...core.request import Role
from ...worker.automatic import PROCESS_BYTES
from ...worker.machine import MachineFacts
from ..placement import RANK_BYTES, Plan, ProcessPlan


@dataclass(frozen=True, slots=True)
class NoRoom:
    """No further worker can be started, for this reason."""

    reason: str


class Room:
    """The places of a plan. A worker that goes leaves its place to another; names are never used again."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._here = next(member.node for member in plan.members if member.kind == "router")
        self._free: list[ProcessPlan] = list(plan.free_places)
        self._next: Counter[str] = Counter(_prefix(worker) for worker in plan.workers)
        places = [*plan.workers, *plan.free_places]
        self._most_on_gpu = Counter(place.gpu for place in places if place.device == "cuda")

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
        num_loading: int = 0,
    ) -> ProcessPlan | NoRoom:
        """A worker of this role in a free place. `members`: all present ones; `cordoned`: GPUs not to be used.

        `num_loading`: of them, those that do not hold their memory yet.

        The caller starts it, or gives it back.
        """
        if not self._free:
            return NoRoom(f"all {len(self._plan.workers) + len(self._plan.free_places)} places have a worker")
        on_gpu = Counter(member.gpu for member in members if member.device == "cuda")
        reasons = []
        for place in self._free:
            reason = self._obstacle(place, _left(machine, self._bytes_of(place) * num_loading), on_gpu, cordoned)
            if not reason:
                self._free.remove(place)
                return self._named(place, role)
            reasons.append(reason)
        return NoRoom(reasons[0])

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
        if reason := self._lack(replace(member, gpu=gpu), machine):
            return NoRoom(reason)
        role = member.role or Role.COMBINED
        port = member.metrics_port and 0  # its own is in use until the old worker is gone
        return self._named(replace(member, gpu=gpu, metrics_port=port), role)

    def give_back(self, member: ProcessPlan) -> None:
        """A worker is gone for good: its place is free."""
        self._free.append(replace(member, name="", role=None))

    def _named(self, place: ProcessPlan, role: Role) -> ProcessPlan:
        number = self._next[role.value]
        self._next[role.value] += 1
        return replace(place, name=f"{role.value}-{number}", role=role)

    def _obstacle(
        self, place: ProcessPlan, machine: MachineFacts, on_gpu: Counter[int], cordoned: Container[int]
    ) -> str:
        if place.device == "cuda" and place.gpu in cordoned:
            return f"GPU {place.gpu} is cordoned"
        if place.device == "cuda" and on_gpu[place.gpu] >= self._most_on_gpu[place.gpu]:
            return f"GPU {place.gpu} has a worker already"
        return self._lack(place, machine)

    def _lack(self, place: ProcessPlan, machine: MachineFacts) -> str:
        """What is missing for a worker in this place, as arithmetic; empty: nothing."""
        if place.node != self._here:
            return f"it is for {place.host}, another machine, and what is free there is not known here"
        model, pool = self._plan.model, self._plan.pool
        needed = self._bytes_of(place)
        have, where = machine.memory_bytes, "the machine has"
        if place.device == "cuda":
            have = machine.gpu_bytes[place.gpu] if place.gpu < len(machine.gpu_bytes) else 0
            where = f"GPU {place.gpu} has"
        if have >= needed:
            return ""
        return (
            f"{where} {have >> 20:,} MiB free, and a worker takes {needed >> 20:,}: {model.weight_bytes >> 20:,} for "
            f"weights, {pool.pool_bytes >> 20:,} for KV, the rest for its process"
        )

    def _bytes_of(self, place: ProcessPlan) -> int:
        """Memory of a worker, of its device."""
        on_device = self._plan.model.weight_bytes + self._plan.pool.pool_bytes
        return on_device if place.device == "cuda" else on_device + PROCESS_BYTES + RANK_BYTES * (place.num_ranks - 1)


def _left(machine: MachineFacts, num_bytes: int) -> MachineFacts:
    return replace(machine, memory_bytes=max(0, machine.memory_bytes - num_bytes))


def _prefix(worker: ProcessPlan) -> str:
    return worker.name.rpartition("-")[0]
