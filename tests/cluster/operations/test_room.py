"""Places for further workers: how many there are, and what is missing, as arithmetic."""

from dataclasses import replace

import pytest

from twostroke.cluster.config import load_config
from twostroke.cluster.operations.room import NoRoom, Room
from twostroke.cluster.placement import ModelFacts, Plan, ProcessPlan, place
from twostroke.core.errors import ConfigError
from twostroke.core.request import Role
from twostroke.kv.spec import attention_spec
from twostroke.worker.machine import MachineFacts

GIB = 1 << 30
SPEC = attention_spec(num_layers=4, kv_heads=2, head_dim=64, codec=1)
MODEL = ModelFacts("model", "anywhere", 1 * GIB, SPEC, 2048)
PLANNER = {"planner.enabled": True, "planner.max_workers": 4, "cache.tokens": 16384, "model.device": "auto"}
CPU = MachineFacts(8, 64 * GIB)
GPUS = MachineFacts(8, 64 * GIB, (40 * GIB, 40 * GIB, 40 * GIB))


def planned(machine: MachineFacts, **more: object) -> Plan:
    return place(load_config(flags=PLANNER | more), machine, MODEL)


def taken(found: ProcessPlan | NoRoom) -> ProcessPlan:
    assert isinstance(found, ProcessPlan), found
    return found


def test_the_planners_most_workers_share_the_machine_from_the_start() -> None:
    plan = planned(CPU, **{"cluster.worker_metrics_port": 9100})
    few = place(load_config(flags={"cache.tokens": 16384}), CPU, MODEL)
    assert [worker.num_threads for worker in (*plan.workers, *plan.free_places)] == [2] * 4
    assert plan.workers[0].memory_bytes * 2 == pytest.approx(few.workers[0].memory_bytes, rel=0.01)
    assert [worker.metrics_port for worker in (*plan.workers, *plan.free_places)] == [9100, 9101, 9102, 9103]
    assert few.free_places == ()


def test_names_are_new_and_places_are_used_again() -> None:
    plan = planned(CPU)
    room, members = Room(plan), list(plan.members)
    first = taken(room.take(Role.DECODE, CPU, members))
    second = taken(room.take(Role.PREFILL, CPU, [*members, first]))
    assert (first.name, second.name) == ("decode-1", "prefill-1")
    assert room.take(Role.DECODE, CPU, [*members, first, second]) == NoRoom("all 4 places have a worker")
    room.give_back(first)
    third = taken(room.take(Role.DECODE, CPU, [*members, second]))
    assert third == replace(first, name="decode-2")


def test_a_machine_that_is_full_is_told_with_the_arithmetic() -> None:
    plan = planned(CPU)
    room = Room(plan)
    full = room.take(Role.DECODE, replace(CPU, memory_bytes=1 * GIB), plan.members)
    assert isinstance(full, NoRoom)
    assert full.reason.startswith("the machine has 1,024 MiB free, and a worker takes ")
    assert "1,024 for weights" in full.reason
    assert room.num_free == 2  # nothing was taken
    needed = MODEL.weight_bytes + plan.pool.pool_bytes + (300 << 20)
    exact = replace(CPU, memory_bytes=needed)
    assert isinstance(room.take(Role.DECODE, exact, plan.members, loading=plan.workers[:1]), NoRoom)
    assert isinstance(room.take(Role.DECODE, exact, plan.members), ProcessPlan)


def test_a_gpu_that_is_cordoned_or_in_use_is_no_place() -> None:
    plan = planned(GPUS, **{"planner.max_workers": 3})
    room = Room(plan)
    assert [worker.gpu for worker in plan.workers] == [0, 1]
    assert room.take(Role.DECODE, GPUS, plan.members, {2}) == NoRoom("GPU 2 is cordoned")
    moved = replace(plan.workers[1], gpu=2)  # its own GPU was cordoned, so it got the spare one
    assert room.take(Role.DECODE, GPUS, [plan.workers[0], moved]) == NoRoom("GPU 2 has a worker already")
    assert taken(room.take(Role.DECODE, GPUS, plan.members)).gpu == 2


def test_a_gpu_has_as_many_workers_as_the_plan_gave_it() -> None:
    two = replace(GPUS, gpu_bytes=GPUS.gpu_bytes[:2])
    plan = planned(two)
    room, members = Room(plan), list(plan.members)
    members += [taken(room.take(Role.DECODE, two, members))]
    members += [taken(room.take(Role.DECODE, two, members))]
    assert sorted(member.gpu for member in members if member.kind == "worker") == [0, 0, 1, 1]


def test_beside_a_worker_on_a_gpu_another_one_must_be_free() -> None:
    plan = planned(GPUS, **{"planner.max_workers": 3, "cluster.worker_metrics_port": 9100})
    room, old = Room(plan), plan.workers[1]
    new = taken(room.beside(old, GPUS, plan.members))
    assert (new.name, new.role, new.gpu, new.metrics_port) == ("decode-1", Role.DECODE, 2, 0)
    two = replace(GPUS, gpu_bytes=GPUS.gpu_bytes[:2])
    assert room.beside(old, two, plan.members) == NoRoom("every GPU has a worker")
    assert room.beside(old, GPUS, plan.members, {2}) == NoRoom("every GPU has a worker")
    small = replace(GPUS, gpu_bytes=(40 * GIB, 40 * GIB, 1 << 20))
    assert "GPU 2 has 1 MiB free" in getattr(room.beside(old, small, plan.members), "reason", "")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"cluster.prefill": 0}, "combined workers have no roles to plan"),
        ({"cluster.decode": 4}, "make 5 workers; must be within planner.min_workers"),
        ({"cluster.prefill": 2, "planner.max_prefill_workers": 1}, "cluster.prefill is 2; must be within"),
        ({"cluster.decode": 1, "planner.min_decode_workers": 2}, "cluster.decode is 1; must be within"),
        ({"cluster.prefill_tp": 2, "model.deterministic": False}, "a worker keeps its ranks when its role changes"),
    ],
)
def test_a_planner_that_contradicts_the_cluster_is_refused(more: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(flags=PLANNER | more)
