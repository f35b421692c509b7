"""Machines that come and go: which takes a worker, and what is asked for in all."""

from dataclasses import replace

from twostroke.cluster.nodes import TO_COME, Node
from twostroke.cluster.placement import ProcessPlan
from twostroke.cluster.wanted import bundles_of, options_on, told
from twostroke.worker.machine import MachineFacts

GIB = 1 << 30
ON_CPU = ProcessPlan("", "worker", num_threads=2, node=TO_COME, host="")
ON_GPU = replace(ON_CPU, device="cuda")
ROUTER = ProcessPlan("router-0", "router", node="a")


def node(name: str, cores: int = 4, gpus: int = 0) -> Node:
    return Node(name, f"host-{name}", MachineFacts(cores, 64 * GIB, (40 * GIB,) * gpus))


def on(name: str, place: ProcessPlan = ON_CPU, **more: object) -> ProcessPlan:
    return replace(place, name=f"decode-{name}", node=name, **more)


def test_the_machine_with_the_fewest_workers_comes_first_and_a_full_one_not_at_all():
    nodes = [node("a"), node("b"), node("c"), node("d", cores=0)]
    members = [ROUTER, on("a"), on("b"), on("b")]
    assert [(each.node, each.host) for each in options_on(nodes, ON_CPU, members)] == [("c", "host-c"), ("a", "host-a")]


def test_a_machine_with_too_few_cores_takes_one_worker():
    wide = replace(ON_CPU, num_threads=8)
    assert [each.node for each in options_on([node("a")], wide, [ROUTER])] == ["a"]
    assert options_on([node("a")], wide, [on("a")]) == []
    assert options_on([node("a", cores=7)], replace(ON_CPU, num_ranks=3), [on("a")]) == []


def test_on_gpus_a_worker_gets_one_of_its_own_and_shares_it_only_where_it_wants_a_share():
    nodes = [node("a"), node("b", gpus=2)]
    (found,) = options_on(nodes, ON_GPU, [on("b", ON_GPU, gpu=0)])
    assert (found.node, found.gpu) == ("b", 1)
    assert options_on(nodes, ON_GPU, [on("b", ON_GPU, gpu=0), on("b", ON_GPU, gpu=1)]) == []
    half = replace(ON_GPU, gpu_share=0.5)
    assert [each.gpu for each in options_on(nodes, half, [on("b", half, gpu=0), on("b", half, gpu=1)])] == [0]


def test_workers_of_one_machine_ask_for_what_it_has_and_others_for_all_of_theirs():
    workers = [on("a"), on("a"), on("a"), on("gone"), ON_CPU]
    bundles = bundles_of(workers, {"a": 4.0, "b": 4.0})
    assert bundles == [{"CPU": 1.33}] * 3 + [{"CPU": 2.0}] * 2
    assert bundles_of([on("a", num_ranks=2)], {"a": 8.0}) == [{"CPU": 4.0}]
    assert bundles_of([on("b", ON_GPU, gpu_share=0.5)], {"b": 4.0}) == [{"GPU": 0.5}]
    assert told(bundles) == "3 × 1.33 CPU, 2 × 2 CPU"
    assert told([]) == "none"
