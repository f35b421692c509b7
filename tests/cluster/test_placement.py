"""What a configuration means on a machine, and what cannot fit."""

from dataclasses import replace
from typing import Any

import pytest

from twostroke.cluster.config import load_config
from twostroke.cluster.placement import (
    FURTHER_ROUTER_BYTES,
    RANK_BYTES,
    RAY_BYTES,
    ROUTER_BYTES,
    ModelFacts,
    bytes_beside_workers,
    place,
)
from twostroke.core.errors import ConfigError, DoesNotFit
from twostroke.core.request import Role
from twostroke.kv.sizing import MemoryFacts, size_pool
from twostroke.kv.spec import attention_spec
from twostroke.worker.automatic import PROCESS_BYTES
from twostroke.worker.machine import MachineFacts

SPEC = attention_spec(num_layers=32, kv_heads=8, head_dim=128, codec=1)
MODEL = ModelFacts("llama-8b", "anywhere", 16 << 30, SPEC, 8192)


def test_bytes_per_token_are_those_of_the_formula():
    # 2 (K and V) · 32 layers · 8 KV heads · (128 bytes of e4m3 + 1 exponent byte)
    assert SPEC.bytes_per_token == 2 * 32 * 8 * 129
    assert SPEC.bf16_bytes_per_token == 2 * 32 * 8 * 128 * 2


def test_roles_threads_and_memory_are_shared_out():
    config = load_config(flags={"cluster.prefill": 2, "cluster.decode": 2})
    plan = place(config, MachineFacts(num_cores=8, memory_bytes=(200 << 30) + bytes_beside_workers(config)), MODEL)
    assert [m.name for m in plan.members] == ["router-0", "prefill-0", "prefill-1", "decode-0", "decode-1"]
    assert [m.role for m in plan.workers] == [Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE]
    assert {m.num_threads for m in plan.workers} == {2}
    assert {m.memory_bytes for m in plan.workers} == {50 << 30}


def test_gpus_are_given_out_in_turn_and_their_memory_shared():
    config = load_config(flags={"cluster.prefill": 1, "cluster.decode": 2, "cache.tokens": None, "cache.swap_space": 4})
    plan = place(config, MachineFacts(8, 8 << 30, (80 << 30, 60 << 30)), MODEL)
    assert [(m.device, m.gpu) for m in plan.workers] == [("cuda", 0), ("cuda", 1), ("cuda", 0)]
    assert {m.memory_bytes for m in plan.workers} == {40 << 30}
    assert "swap" not in plan.pool.arithmetic  # it lies in the host's memory
    on_cpu = load_config(flags={"model.device": "cpu"})
    assert {m.device for m in place(on_cpu, MachineFacts(8, 200 << 30, (80 << 30,)), MODEL).workers} == {"cpu"}
    asked = load_config(flags={"model.device": "cuda"})
    with pytest.raises(ConfigError, match=r"model.device is 'cuda', and torch sees no GPU"):
        place(asked, MachineFacts(8, 200 << 30), MODEL)


@pytest.mark.parametrize(
    ("asked", "ports"), [(0, [0, 0, 0]), ("none", [None] * 3), ("9100", [9100, 9101, 9102]), (None, [0, 0, 0])]
)
def test_each_worker_has_a_metrics_port_of_its_own(asked: object, ports: list[int | None]):
    config = load_config(flags={"cluster.decode": 2, "cluster.worker_metrics_port": asked})
    plan = place(config, MachineFacts(8, 200 << 30), MODEL)
    assert [worker.metrics_port for worker in plan.workers] == ports
    assert plan.members[0].metrics_port is None  # the router has its own door


@pytest.mark.parametrize(("first", "words"), [(7999, "the router has 8000"), (65535, "65535 is the last port")])
def test_a_metrics_port_that_another_needs_is_refused(first: int, words: str):
    config = load_config(flags={"cluster.worker_metrics_port": first})
    with pytest.raises(ConfigError, match=words):
        place(config, MachineFacts(8, 200 << 30), MODEL)


def test_no_prefill_workers_means_combined_ones():
    plan = place(load_config(flags={"cluster.prefill": 0, "cluster.decode": 2}), MachineFacts(1, 100 << 30), MODEL)
    assert [m.role for m in plan.workers] == [Role.COMBINED, Role.COMBINED]
    assert {m.num_threads for m in plan.workers} == {1}


def test_the_pool_is_the_smaller_of_tokens_and_memory():
    facts = MemoryFacts(memory_bytes=20 << 30, weight_bytes=16 << 30)
    by_memory = size_pool(SPEC, 16, None, 0.5, facts)
    assert by_memory.num_blocks == (2 << 30) // (SPEC.bytes_per_token * 16)
    assert size_pool(SPEC, 16, 1000, 0.5, facts).num_tokens == 992


def test_the_memory_of_the_processes_themselves_is_counted_and_shown():
    small = ModelFacts("small", "anywhere", 64 << 20, SPEC, 64)
    flags = {"cluster.prefill": 1, "cluster.decode": 1, "cache.tokens": 64, "cache.memory_fraction": 1.0}
    process, ray = (load_config(flags=flags | {"cluster.launcher": launcher}) for launcher in ("process", "ray"))
    pool = 64 * SPEC.bytes_per_token
    fits = bytes_beside_workers(process) + 2 * (PROCESS_BYTES + (64 << 20) + process.cache.shared_bytes + pool)
    plan = place(process, MachineFacts(2, fits), small)
    assert plan.pool.num_tokens == 64
    assert f"− process {PROCESS_BYTES >> 20} MiB" in plan.pool.arithmetic
    with pytest.raises(DoesNotFit, match="no KV block fits"):
        place(process, MachineFacts(2, fits - 2 * PROCESS_BYTES), small)
    with pytest.raises(DoesNotFit, match="no KV block fits"):
        place(ray, MachineFacts(2, fits), small)  # Ray's own processes take memory, too
    assert place(ray, MachineFacts(2, fits + RAY_BYTES), small).pool.num_tokens == 64


def test_each_router_after_the_first_takes_memory_of_its_own():
    one, three = (load_config(flags={"cluster.routers": routers, "cluster.launcher": "process"}) for routers in (1, 3))
    assert bytes_beside_workers(one) == ROUTER_BYTES
    assert bytes_beside_workers(three) == ROUTER_BYTES + 2 * FURTHER_ROUTER_BYTES


@pytest.mark.parametrize("memory_bytes", [0, 16 << 30, (16 << 30) + 1000])
def test_what_cannot_fit_is_refused_with_the_arithmetic(memory_bytes: int):
    with pytest.raises(DoesNotFit) as caught:
        size_pool(SPEC, 16, 65536, 0.9, MemoryFacts(memory_bytes, 16 << 30))
    assert "weights 16,384 MiB" in str(caught.value)
    assert "66,048 bytes/token" in str(caught.value)


GIB = 1 << 30
ON_GPU: dict[str, Any] = {"swaps_elsewhere": True, "device_bytes": 20 * GIB}


@pytest.mark.parametrize(
    ("facts", "remedy"),
    [
        (MemoryFacts(8 * GIB, 16 * GIB), "settings: use a smaller model or dtype or fewer workers"),
        (
            MemoryFacts(20 * GIB, 40 * GIB, 5 * GIB, **ON_GPU, activation_bytes=GIB),
            "settings: use a smaller model or a GPU with more memory",
        ),
        (
            MemoryFacts(10 * GIB, 16 * GIB, **ON_GPU),
            "settings: use a smaller model, a GPU with more memory or fewer workers on a GPU",
        ),
        (
            MemoryFacts(20 * GIB, 19 * GIB, **ON_GPU, activation_bytes=GIB),
            "Use a smaller model, a GPU with more memory or less step.max_num_batched_tokens or step.max_num_seqs",
        ),
        (
            MemoryFacts(20 * GIB, 16 * GIB, 4 * GIB, ring_bytes=GIB, state_bytes=GIB),
            "Use a smaller model or dtype, fewer workers, less cache.swap_space, less cache.ring_bytes or "
            "less step.max_num_seqs or cache.state_snapshots",
        ),
        (MemoryFacts(16 * GIB + (1 << 21), 16 * GIB), "fewer workers or a larger cache.memory_fraction"),
    ],
)
def test_only_remedies_that_can_help_are_named(facts: MemoryFacts, remedy: str):
    with pytest.raises(DoesNotFit) as caught:
        size_pool(SPEC, 16, 65536, 0.4, facts)
    assert str(caught.value).endswith(remedy)


@pytest.mark.parametrize(
    ("machine", "flags", "ways"),
    [
        (MachineFacts(8, 200 * GIB), {"cache.tokens": 1024}, "a larger cache.tokens"),
        (
            MachineFacts(8, 64 * GIB, (20 * GIB,) * 2),
            {},
            "a GPU with more memory, a larger cache.memory_fraction, a smaller model",
        ),
        (
            MachineFacts(8, 64 * GIB, (40 * GIB,)),
            {},
            "a GPU with more memory, fewer workers on a GPU, a larger cache.memory_fraction, a smaller model",
        ),
        (
            MachineFacts(8, 44 * GIB),
            {"cache.tokens": 65536},
            "fewer workers, a larger cache.memory_fraction, a smaller model or dtype",
        ),
    ],
)
def test_a_context_that_does_not_fit_is_refused_with_what_can_help(machine: MachineFacts, flags: dict, ways: str):
    config = load_config(flags={"model.max_model_len": 65536, "cluster.prefill": 1, "cluster.decode": 1} | flags)
    with pytest.raises(DoesNotFit) as caught:
        place(config, machine, replace(MODEL, max_model_len=65536, asked_max_model_len=65536))
    assert str(caught.value).endswith(f"give the pool more: {ways}")


def test_swap_space_is_taken_from_the_same_memory_and_counted_in_blocks():
    block_bytes = SPEC.bytes_per_token * 16
    config = load_config(flags={"cluster.prefill": 0, "cluster.decode": 1, "cache.swap_space": 2, "cache.tokens": None})
    machine = MachineFacts(1, (20 << 30) + bytes_beside_workers(config))
    plan = place(config, machine, MODEL)
    assert plan.pool.num_swap_blocks == (2 << 30) // block_bytes
    assert "swap space 2,048 MiB" in plan.pool.arithmetic
    without = place(load_config(flags={"cluster.prefill": 0, "cluster.decode": 1}), machine, MODEL)
    assert without.pool.num_swap_blocks == 0
    by_memory = size_pool(SPEC, 16, None, 0.5, MemoryFacts(20 << 30, 16 << 30, 2 << 30))
    assert by_memory.num_blocks == (1 << 30) // block_bytes


def test_a_swap_space_that_holds_no_block_is_refused():
    with pytest.raises(DoesNotFit, match=r"cache.swap_space is 1,000 bytes and one KV block takes 1,056,768"):
        size_pool(SPEC, 16, None, 0.5, MemoryFacts(20 << 30, 16 << 30, 1000))


# ---------------------------------------------------------------- tensor-parallel ranks


def test_cores_are_shared_out_to_ranks_and_memory_to_workers():
    flags = {"cluster.prefill": 1, "cluster.decode": 2, "cluster.tensor_parallel_size": 2}
    config = load_config(flags=flags)
    memory = (120 << 30) + bytes_beside_workers(config) + 3 * RANK_BYTES
    plan = place(config, MachineFacts(num_cores=13, memory_bytes=memory), MODEL)
    assert [(m.num_ranks, m.num_threads, m.first_core) for m in plan.workers] == [(2, 2, 0), (2, 2, 4), (2, 2, 8)]
    assert {m.memory_bytes for m in plan.workers} == {40 << 30}
    (reason,) = (d.reason for d in plan.decisions if d.setting == "step.num_threads")
    assert reason == "13 cores ÷ 6 ranks of 3 workers"


def test_ranks_that_outnumber_the_cores_are_not_bound_to_any():
    config = load_config(flags={"cluster.prefill": 0, "cluster.tensor_parallel_size": 4})
    (worker,) = place(config, MachineFacts(2, 200 << 30), MODEL).workers
    assert (worker.num_ranks, worker.num_threads, worker.first_core) == (4, 1, None)
    (alone,) = place(load_config(flags={"cluster.prefill": 0}), MachineFacts(2, 200 << 30), MODEL).workers
    assert (alone.num_ranks, alone.num_threads, alone.first_core) == (1, 2, None)


def test_a_role_may_have_ranks_of_its_own_where_bits_may_differ():
    flags = {"cluster.tensor_parallel_size": 2, "cluster.prefill_tp": 4}
    free = load_config(flags=flags | {"model.deterministic": False})
    assert [m.num_ranks for m in place(free, MachineFacts(8, 200 << 30), MODEL).workers] == [4, 2]
    alone = load_config(flags={"cluster.prefill": 0, "cluster.decode_tp": 3})
    assert [m.num_ranks for m in place(alone, MachineFacts(8, 200 << 30), MODEL).workers] == [3]


def test_gpus_have_one_rank_each():
    config = load_config(flags={"cluster.tensor_parallel_size": 2})
    with pytest.raises(
        ConfigError,
        match="GPUs have one in this release",
    ):
        place(config, MachineFacts(8, 8 << 30, (80 << 30,)), MODEL)
