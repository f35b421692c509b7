"""Room for workers on machines that come and go: which machine takes a worker, and what is asked for in all. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from .nodes import Node
from .placement import ProcessPlan

Bundle = dict[str, float]
"""Resources that must be together on one machine, by Ray's names of them."""


def options_on(nodes: Iterable[Node], place: ProcessPlan, members: Iterable[ProcessPlan]) -> list[ProcessPlan]:
    """The place on each machine that has a device for one more worker beside `members`; emptier ones first.

    A machine takes a worker for which it has too few cores, if it has no other worker: the plan's numbers are those of
    the machine on which it was made.
    """
    workers = [member for member in members if member.kind == "worker"]
    found: list[tuple[int, ProcessPlan]] = []
    for node in nodes:
        there = [worker for worker in workers if worker.node == node.name]
        on = replace(place, node=node.name, host=node.address)
        if place.device == "cuda":
            count = Counter(worker.gpu for worker in there)
            gpu = min(range(len(node.machine.gpu_bytes)), key=lambda each: (count[each], each), default=None)
            if gpu is not None and (count[gpu] + 1) * place.gpu_share <= 1:
                found.append((len(there), replace(on, gpu=gpu)))
        elif node.machine.num_cores and (not there or _cores(there) + _cores([place]) <= node.machine.num_cores):
            found.append((len(there), on))
    return [on for _, on in sorted(found, key=lambda each: each[0])]


def bundles_of(workers: Iterable[ProcessPlan], cpus_of: Mapping[str, float]) -> list[Bundle]:
    """Room for all these workers. `cpus_of`: CPUs of each present machine, by its name.

    Workers of one machine share its CPUs, so together they ask for what it has and no more. Those without a machine, or
    whose machine is gone, ask for all of theirs.
    """
    workers = list(workers)
    count = Counter(worker.node for worker in workers if worker.device == "cpu")
    found = []
    for worker in workers:
        if worker.device == "cuda":
            found.append({"GPU": worker.gpu_share})
            continue
        cpus = float(_cores([worker]))
        if worker.node in cpus_of:
            cpus = min(cpus, math.floor(cpus_of[worker.node] / count[worker.node] * 100) / 100)
        found.append({"CPU": cpus})
    return found


def told(bundles: Iterable[Bundle]) -> str:
    """Bundles for people: "2 × 1 CPU, 1 × 1 GPU"; "none" if there are none."""
    kinds = Counter(", ".join(f"{count:g} {name}" for name, count in bundle.items()) for bundle in bundles)
    return ", ".join(f"{number} × {kind}" for kind, number in kinds.items()) or "none"


def _cores(workers: Iterable[ProcessPlan]) -> int:
    return sum(worker.num_threads * worker.num_ranks for worker in workers)
