"""Which worker runs on which machine of a cluster, with how many threads and how much memory."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twostroke.checkpoint import locate
from twostroke.checkpoint.config import BUNDLED
from twostroke.checkpoint.locate import located, located_on_node
from twostroke.cluster.config import load_config
from twostroke.cluster.nodes import LOOPBACK, TO_COME, Living, Node, Wanted, spread, stand_in
from twostroke.cluster.operations.room import NoRoom, Room
from twostroke.cluster.placement import ModelFacts, bytes_beside_workers, place, place_on
from twostroke.core.errors import CheckpointError, ConfigError
from twostroke.core.request import Role
from twostroke.kv.spec import attention_spec
from twostroke.worker.machine import MachineFacts

SPEC = attention_spec(num_layers=32, kv_heads=8, head_dim=128, codec=1)
MODEL = ModelFacts("llama-8b", "anywhere", 16 << 30, SPEC, 8192)
GIB = 1 << 30
ON_RAY = {"cluster.ray_address": "10.0.0.1:6379", "cluster.launcher": "ray"}


def node(number: int, cores: int = 8, memory: int = 100 * GIB, gpus: tuple[int, ...] = ()) -> Node:
    return Node(f"n{number}", f"10.0.0.{number}", MachineFacts(cores, memory, gpus), is_here=number == 1)


def plan_of(nodes: list[Node], **flags: object):
    return place_on(load_config(flags=ON_RAY | {name.replace("__", "."): f for name, f in flags.items()}), nodes, MODEL)


def test_the_roles_are_spread_over_equal_nodes():
    plan = plan_of([node(1), node(2)], cluster__prefill=2, cluster__decode=2)
    assert [(m.name, m.node, m.host) for m in plan.workers] == [
        ("prefill-0", "n1", "10.0.0.1"),
        ("prefill-1", "n2", "10.0.0.2"),
        ("decode-0", "n1", "10.0.0.1"),
        ("decode-1", "n2", "10.0.0.2"),
    ]
    assert {m.num_threads for m in plan.workers} == {4}
    router = plan.members[0]
    assert (router.name, router.node, router.host) == ("router-0", "n1", "10.0.0.1")
    assert plan.config.router.internal_host == "10.0.0.1"


def test_a_pair_uses_the_cores_of_both_nodes():
    plan = plan_of([node(1, cores=4), node(2, cores=6)])
    assert [(m.name, m.node, m.num_threads) for m in plan.workers] == [("prefill-0", "n2", 6), ("decode-0", "n1", 4)]


def test_a_pair_of_gpus_is_on_one_node():
    nodes = [node(1, gpus=(80 * GIB,) * 2), node(2, gpus=(80 * GIB,) * 2)]
    assert [(m.node, m.gpu) for m in plan_of(nodes).workers] == [("n1", 0), ("n1", 1)]
    both = plan_of(nodes, cluster__prefill=2, cluster__decode=2)
    assert [(m.name, m.node) for m in both.workers] == [
        ("prefill-0", "n1"),
        ("prefill-1", "n2"),
        ("decode-0", "n1"),
        ("decode-1", "n2"),
    ]


def test_gpus_of_all_nodes_are_used_before_one_is_shared():
    nodes = [node(1, gpus=(80 * GIB,)), node(2), node(3, gpus=(80 * GIB, 60 * GIB))]
    plan = plan_of(nodes, cluster__prefill=1, cluster__decode=2)
    assert sorted((m.node, m.gpu) for m in plan.workers) == [("n1", 0), ("n3", 0), ("n3", 1)]
    assert {m.gpu_share for m in plan.workers} == {1.0}
    assert {m.memory_bytes for m in plan.workers} == {60 * GIB}  # pools are equal
    assert plan.spare_gpus == ()
    shared = plan_of(nodes[:1], cluster__prefill=1, cluster__decode=1)
    assert {m.gpu_share for m in shared.workers} == {0.5}


def test_memory_is_shared_by_the_workers_of_a_node():
    config = load_config(flags=ON_RAY | {"cluster.prefill": 1, "cluster.decode": 2})
    nodes = [node(1, memory=80 * GIB + bytes_beside_workers(config)), node(2, memory=200 * GIB)]
    plan = place_on(config, nodes, MODEL)
    on = Counter(m.node for m in plan.workers)
    assert sorted(on.values()) == [1, 2]
    assert {m.memory_bytes for m in plan.workers} == {40 * GIB if on["n1"] == 2 else 80 * GIB}


def test_workers_on_one_node_alone_keep_to_loopback():
    plan = plan_of([node(1)], cluster__prefill=1, cluster__decode=1)
    assert {m.host for m in plan.members} == {LOOPBACK}
    assert plan.config.router.internal_host == LOOPBACK
    facts = MachineFacts(8, 100 * GIB)
    assert place(load_config(), facts, MODEL).members == place_on(load_config(), [Node.alone(facts)], MODEL).members


def test_workers_on_another_node_alone_are_not_on_loopback():
    plan = plan_of([node(1, cores=0), node(2)])
    assert {m.host for m in plan.workers} == {"10.0.0.2"}
    assert plan.members[0].host == "10.0.0.1"


def test_nodes_without_the_device_are_refused_together():
    with pytest.raises(ConfigError, match="no node"):
        plan_of([node(1, cores=0), node(2, cores=0)])


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.lists(st.tuples(st.sampled_from(["prefill", "decode"]), st.integers(1, 4)), min_size=1, max_size=20),
)
def test_spread_fills_before_it_shares_and_spreads_roles(cores: list[int], workers: list[tuple[str, int]]):
    nodes = [node(n + 1, cores=c) for n, c in enumerate(cores)]
    wanted = [Wanted(*worker) for worker in workers]
    chosen = spread(nodes, wanted, "cpu")
    free = list(cores)
    for worker, at in zip(wanted, chosen, strict=True):
        if free[at] < worker.num_ranks:  # shared, so nobody had room
            assert all(left < worker.num_ranks for left in free)
        free[at] -= worker.num_ranks
    if len(set(cores)) == 1 and {w.num_ranks for w in wanted} == {1} and len(wanted) <= sum(cores):
        for role in ("prefill", "decode"):
            counts = [
                sum(w.role == role and at == n for w, at in zip(wanted, chosen, strict=True)) for n in range(len(nodes))
            ]
            assert max(counts) - min(counts) <= 1 or min(free) == 0


def test_a_worker_without_its_machine_goes_where_its_device_is_and_fewest_members_are():
    cpu, gpu, busy = Living("a", "10.0.0.1", 8, 0), Living("b", "10.0.0.2", 8, 1), Living("c", "10.0.0.3", 8, 1)
    assert stand_in([cpu, busy, gpu], {"c": 2, "b": 1}, "cuda") == gpu
    assert stand_in([cpu, busy, gpu], {"c": 2, "b": 1}, "cpu") == cpu
    assert stand_in([cpu], {}, "cuda") is None
    assert stand_in([Living("head", "10.0.0.9", 0, 0)], {}, "cpu") is None


def test_no_worker_is_added_where_free_memory_is_not_known():
    flags = {"planner.enabled": True, "planner.max_workers": 4, "cache.tokens": 4096}
    plan = plan_of([node(1), node(2)], cluster__prefill=1, cluster__decode=1, **flags)
    room, here = Room(plan), MachineFacts(8, 100 * GIB)
    assert {place.node for place in plan.free_places} == {"n1", "n2"}
    taken = room.take(Role.DECODE, here, plan.members)
    assert not isinstance(taken, NoRoom)
    assert taken.node == "n1"
    refused = room.take(Role.DECODE, here, plan.members)
    assert isinstance(refused, NoRoom)
    assert "it is for 10.0.0.2, another machine" in refused.reason
    elsewhere = next(worker for worker in plan.workers if worker.node == "n2")
    assert isinstance(room.beside(elsewhere, here, plan.members), NoRoom)


def test_where_nodes_may_come_workers_beyond_the_devices_wait_for_them_and_have_room_of_their_own():
    flags = {"planner.enabled": True, "planner.max_workers": 6, "cache.tokens": 4096}
    asks = {"planner.new_nodes": True}
    two = [node(1, cores=1), node(2, cores=2)]
    crowded = plan_of(two, cluster__prefill=1, cluster__decode=1, **flags)
    plan = plan_of(two, cluster__prefill=1, cluster__decode=1, **flags, **asks)
    assert [place.node for place in plan.free_places] == ["n2", TO_COME, TO_COME, TO_COME]
    assert {place.memory_bytes for place in plan.free_places} == {plan.workers[0].memory_bytes}
    assert plan.workers[0].memory_bytes > crowded.workers[0].memory_bytes
    alone = plan_of([node(1, cores=1)], cluster__prefill=1, cluster__decode=1, **flags, **asks)
    assert [worker.node for worker in alone.workers] == ["n1", "n1"]  # as configured, on what is there
    room, nodes = Room(plan), list(two)
    assert [place.node for place in room.places_to_come(1)] == [TO_COME]
    small = replace(two[1], machine=MachineFacts(2, 1 << 20))
    lacks = room.take(Role.DECODE, two[0].machine, plan.members, nodes=[two[0], small])
    assert isinstance(lacks, NoRoom)
    assert lacks.num_to_come == 3  # its own node is there, without the memory
    first = room.take(Role.DECODE, nodes[0].machine, plan.members, nodes=nodes)
    assert not isinstance(first, NoRoom)
    assert first.node == "n2"
    members = [*plan.members, first]
    full = room.take(Role.DECODE, nodes[0].machine, members, nodes=nodes)
    assert isinstance(full, NoRoom)
    assert (full.num_to_come, room.num_free) == (3, 3)
    nodes.append(replace(node(3, cores=1), machine=MachineFacts(1, 1 << 20)))
    small = room.take(Role.DECODE, nodes[0].machine, members, nodes=nodes)
    assert isinstance(small, NoRoom)
    assert small.reason.startswith("10.0.0.3 has 1 MiB free")
    nodes.append(node(4, cores=1))
    came = room.take(Role.PREFILL, nodes[0].machine, members, nodes=nodes)
    assert not isinstance(came, NoRoom)
    assert (came.name, came.node, came.host) == ("prefill-1", "n4", "10.0.0.4")
    room.give_back(came)
    assert [place.node for place in room.places_to_come(2)] == [TO_COME, TO_COME]
    assert [place.host for place in room.free] == [""] * 3


def test_a_loading_worker_counts_on_its_own_node_only():
    flags = {"planner.enabled": True, "planner.max_workers": 4, "cache.tokens": 4096}
    plan = plan_of([node(1), node(2)], cluster__prefill=1, cluster__decode=1, **flags)
    room, worker = Room(plan), next(worker for worker in plan.workers if worker.node == "n2")
    needed = room._bytes_of(worker)
    other = replace(node(2), machine=MachineFacts(8, needed))
    nothing = MachineFacts(8, 0)
    loading = [worker]
    assert isinstance(room.take(Role.DECODE, nothing, plan.members, loading=loading, nodes=[other]), NoRoom)
    found = room.take(Role.DECODE, nothing, plan.members, loading=[replace(worker, node="n1")], nodes=[other])
    assert not isinstance(found, NoRoom)
    assert found.node == "n2"


def test_a_checkpoint_is_found_again_on_another_node(tmp_path, monkeypatch):
    assert located_on_node(str(tmp_path)) == tmp_path
    assert located_on_node(f"/elsewhere/site-packages/twostroke/model/{BUNDLED}") == located(BUNDLED)
    asked = []
    monkeypatch.setattr(locate, "_download", lambda *given: asked.append(given) or tmp_path)
    revision = "0123456789abcdef" * 2 + "01234567"
    located_on_node(f"/root/.cache/huggingface/hub/models--a-b--Some-Model_1.0/snapshots/{revision}")
    assert asked == [("a-b/Some-Model_1.0", "model.path", revision)]
    with pytest.raises(CheckpointError, match=r"'/models/mine', and .* has no such .* same place on every node"):
        located_on_node("/models/mine")
