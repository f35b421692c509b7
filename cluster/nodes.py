"""The machines of a cluster, and which worker runs on which. Pure; launchers read the facts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..worker.machine import MachineFacts

LOOPBACK = "127.0.0.1"
TO_COME = "to come"
"""Name of the machine of a place whose machine is not there yet."""


@dataclass(frozen=True, slots=True)
class Node:
    """One machine."""

    name: str  # the launcher's name of it; empty: this machine, and the launcher knows no other
    address: str  # by which the others reach it
    machine: MachineFacts
    is_here: bool = False  # the launcher and the router run on it

    @classmethod
    def alone(cls, machine: MachineFacts) -> Node:
        """This machine, where nobody else must reach it."""
        return cls("", LOOPBACK, machine, is_here=True)

    def units(self, device: str) -> int:
        """Number of workers of one rank that have a device or core of their own: its GPUs, or its cores."""
        return len(self.machine.gpu_bytes) if device == "cuda" else self.machine.num_cores


class Wanted(NamedTuple):
    """A worker to place."""

    role: str
    num_ranks: int  # all on one node


class Living(NamedTuple):
    """A machine that answers now."""

    name: str
    address: str
    num_cpus: float  # that the launcher may use of it
    num_gpus: float

    def takes(self, device: str) -> bool:
        """True if a worker of this device may run there."""
        return (self.num_gpus if device == "cuda" else self.num_cpus) > 0


def stand_in(living: Sequence[Living], num_members: Mapping[str, int], device: str) -> Living | None:
    """The machine for a worker whose own is gone: of those with its device, the one with the fewest members.

    `num_members`: by the machine's name. None: no machine has the device; the worker waits for its own.
    """
    usable = [node for node in living if node.takes(device)]
    return min(usable, key=lambda node: (num_members.get(node.name, 0), node.name), default=None)


def spread(nodes: Sequence[Node], wanted: Sequence[Wanted], device: str) -> list[int]:
    """Place each worker on a node; returns indices of `nodes`, which have at least one unit of the device each.

    In order: nodes with a free unit for each of its ranks, then those with the fewest workers of its role, so that the
    loss of a node takes few of each. Then, on CPUs, the node that is used least, because workers share its cores; on
    GPUs, which nobody shares while one is free, the first, so that both roles are on each node and hand over inside it.
    """
    units = [node.units(device) for node in nodes]
    free = list(units)
    roles = [Counter[str]() for _ in nodes]
    chosen = []
    for worker in wanted:

        def cost(n: int, worker: Wanted = worker) -> tuple[bool, int, float, int]:
            use = 0.0 if device == "cuda" else 1 - (free[n] - worker.num_ranks) / units[n]
            return free[n] < worker.num_ranks, roles[n][worker.role], use, n

        at = min(range(len(nodes)), key=cost)
        free[at] -= worker.num_ranks
        roles[at][worker.role] += 1
        chosen.append(at)
    return chosen
