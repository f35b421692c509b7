"""What settings that nobody gave mean on a laptop, in a container, on large and small GPUs; and what is said of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from twostroke.cli.serve import show_plan
from twostroke.cluster.config import load_config
from twostroke.cluster.launch.launcher import Site, worker_settings
from twostroke.cluster.placement import ModelFacts, Plan, place
from twostroke.core.errors import ConfigError, DoesNotFit
from twostroke.kv.sizing import MAX_POOL_BLOCKS, MemoryFacts, size_pool
from twostroke.kv.spec import attention_spec
from twostroke.worker.cgroup import left_bytes, quota_cores
from twostroke.worker.machine import MachineFacts, usable_cores

SPEC = attention_spec(num_layers=32, kv_heads=8, head_dim=128, codec=1)  # 66,048 bytes/token
LLAMA_8B = ModelFacts("llama-8b", "anywhere", 16 << 30, SPEC, 131_072)
SMALL = ModelFacts("small", "anywhere", 1 << 30, SPEC, 32_768)
ONE = {"cluster.prefill": 0, "cluster.decode": 1}
LAPTOP = MachineFacts(8, 12 << 30)


def planned(model: ModelFacts, machine: MachineFacts, **flags: Any) -> Plan:
    given = ONE | {name.replace("__", "."): value for name, value in flags.items()}
    asked = given.get("model.max_model_len")
    model = replace(model, asked_max_model_len=asked, max_model_len=asked or model.max_model_len)
    return place(load_config(flags=given), machine, model)


def reason(plan: Plan, setting: str) -> str:
    return next(decision.reason for decision in plan.decisions if decision.setting == setting)


def test_a_gpus_pool_is_what_its_memory_allows():
    plan = planned(LLAMA_8B, MachineFacts(8, 100 << 30, (79 << 30,)))
    assert plan.pool.num_tokens > 900_000
    assert plan.pool.pool_bytes == pytest.approx(0.9 * (63 << 30), rel=0.001)
    assert (plan.config.step.max_num_seqs, plan.config.step.max_num_batched_tokens) == (256, 8192)
    assert plan.model.max_model_len == 131_072
    assert plan.config.router.max_running_tokens == 2_000_000
    small = planned(SMALL, MachineFacts(8, 100 << 30, (23 << 30,)))
    assert (small.config.step.max_num_seqs, small.config.step.max_num_batched_tokens) == (256, 2048)


def test_a_laptop_keeps_half_of_what_the_weights_leave():
    plan = planned(SMALL, LAPTOP)
    left = (12 << 30) - (400 << 20) - (1 << 30) - plan.config.cache.ring_bytes
    assert plan.pool.pool_bytes == pytest.approx(left / 2, rel=0.001)
    assert (plan.config.step.max_num_seqs, plan.config.step.max_num_batched_tokens) == (64, 1024)
    assert "other programs" in reason(plan, "cache.memory_fraction")


def test_a_cpus_pool_is_no_larger_than_all_seats_can_fill():
    plan = planned(replace(SMALL, max_model_len=512), MachineFacts(8, 400 << 30))
    assert plan.pool.num_tokens == 64 * 512
    assert "at most 32,768: all sequences of a step" in reason(plan, "cache.tokens")
    assert planned(SMALL, LAPTOP, cache__tokens=4096, model__max_model_len=1024).pool.num_tokens == 4096


def test_a_context_that_the_pool_does_not_hold_is_cut_and_told():
    plan = planned(replace(SMALL, max_model_len=1 << 20), LAPTOP)
    assert plan.model.max_model_len == plan.pool.num_tokens < 1 << 20
    assert reason(plan, "model.max_model_len").startswith(
        "the checkpoint was made for 1,048,576; a worker's pool holds"
    )


def test_a_context_that_was_asked_for_and_does_not_fit_is_refused_with_the_remedy():
    with pytest.raises(DoesNotFit) as caught:
        planned(replace(SMALL, max_model_len=1 << 20), LAPTOP, model__max_model_len=1 << 20)
    assert "model.max_model_len is 1,048,576" in str(caught.value)
    assert "leave it out to get what fits" in str(caught.value)


def test_what_is_given_holds_whatever_the_machine():
    given = {"step__max_num_seqs": 64, "step__max_num_batched_tokens": 1024, "cache__memory_fraction": 0.25}
    more = {"router__max_running": 512, "cluster__ready_timeout_s": 5.0}
    plan = planned(LLAMA_8B, MachineFacts(8, 100 << 30, (79 << 30,)), **given, **more)
    assert (plan.config.step.max_num_seqs, plan.config.step.max_num_batched_tokens) == (64, 1024)
    assert plan.pool.pool_bytes == pytest.approx(0.25 * (63 << 30), rel=0.001)
    assert (plan.config.router.max_running, plan.config.cluster.ready_timeout_s) == (512, 5.0)
    assert reason(plan, "step.max_num_seqs") == reason(plan, "cluster.ready_timeout_s") == "as given"


def test_null_in_a_file_is_not_given(tmp_path: Path):
    plain = place(load_config(), LAPTOP, SMALL)
    tried = 0
    for decision in plain.decisions:
        section, _, name = decision.setting.partition(".")
        (tmp_path / "c.yaml").write_text(f"{section}:\n  {name}: null\n")
        try:
            config = load_config(tmp_path / "c.yaml")
        except ConfigError:
            continue  # a setting that has no null
        tried += 1
        assert place(config, LAPTOP, SMALL).decisions == plain.decisions, decision.setting
    assert tried


def test_limits_grow_with_the_cluster_and_patience_with_the_weights():
    flags = {"cluster.prefill": 2, "cluster.decode": 4}
    plan = place(load_config(flags=flags), MachineFacts(64, 1 << 40, (79 << 30,) * 6), LLAMA_8B)
    assert plan.config.router.max_running == 2 * 4 * 256
    assert plan.config.router.max_running_tokens == 2 * 4 * plan.pool.num_tokens
    assert plan.config.cluster.ready_timeout_s == pytest.approx(120 + 6 * 16 * 1024 / 100, abs=1)


def test_every_process_goes_by_what_was_decided():
    config = load_config(flags=ONE)
    machine = MachineFacts(8, 100 << 30, (79 << 30,))
    plan = place(config, machine, replace(LLAMA_8B, max_model_len=1 << 22))
    settled = plan.settle(config)
    worker = worker_settings(Site(settled, "anywhere", "m", 1), plan.workers[0])
    assert worker.model.max_model_len == plan.pool.num_tokens
    assert worker.step.max_num_batched_tokens == 8192
    again = place(load_config(flags=settled.model_dump()), machine, LLAMA_8B)  # as a file that a launcher wrote
    assert again.pool.num_tokens == plan.pool.num_tokens
    assert (settled.cache.tokens, settled.cache.memory_fraction) == (plan.pool.num_tokens, 0.9)
    assert settled.router.port == config.router.port
    assert settled.cluster.key == config.cluster.key


def test_a_pool_has_no_more_blocks_than_can_be_kept_book_of():
    assert size_pool(attention_spec(1, 1, 8, 1), 16, None, 1.0, MemoryFacts(1 << 40, 0)).num_blocks == MAX_POOL_BLOCKS


def test_the_plan_says_each_value_its_reason_and_how_to_change_it():
    model = replace(SMALL, remarks=("something else is read",), sampling="temperature 0.6")
    config = load_config(flags=ONE)
    console = Console(record=True, width=200)
    show_plan(config, place(config, replace(LAPTOP, cores_reason="4 of them asleep"), model), console)
    text = console.export_text()
    for words in (
        "step.max_num_seqs (--max-num-seqs)",
        "cache.memory_fraction (--kv-cache-memory-fraction)",
        "8 cores (4 of them asleep) ÷ 1 workers",
        "where a request says nothing: temperature 0.6",
        "note: something else is read",
        "what the checkpoint was made for",
    ):
        assert words in text, words


# ------------------------------------------------------------------ cores and memory of a container


def test_two_threads_of_a_core_count_as_one():
    pairs = {0: "0,4", 1: "1,5", 4: "0,4", 5: "1,5"}
    assert usable_cores({0, 1, 4, 5}, None, pairs.__getitem__) == (2, "2 physical of 4 logical")
    assert usable_cores({0, 1}, None, lambda _: "") == (2, "2 physical")
    assert usable_cores({0, 1, 4, 5}, 1.5, pairs.__getitem__) == (
        1,
        "a cgroup's quota of 1.5, 2 physical of 4 logical",
    )
    assert usable_cores({0, 1}, 0.5, lambda _: "")[0] == 1
    assert usable_cores({0, 1}, 8.0, lambda _: "")[0] == 2


def written(directory: Path, **files: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text)


def test_reads_the_tightest_group_of_version_2(tmp_path: Path):
    own, root = tmp_path / "own", tmp_path / "cg"
    own.write_text("0::/user.slice/job\n")
    written(root, cpu__max="max 100000\n")
    assert (quota_cores(root, own), left_bytes(root, own)) == (None, None)
    written(root / "user.slice", cpu__max="150000 100000\n", memory__max="max\n", memory__current="5\n")
    stat = "anon 100\ninactive_file 300\n"
    written(
        root / "user.slice/job",
        cpu__max="400000 100000\n",
        memory__max="1000",
        memory__current="700",
        memory__stat=stat,
    )
    assert quota_cores(root, own) == 1.5
    assert left_bytes(root, own) == 1000 - (700 - 300)
    own.write_text("0::/\n")  # a container sees its own group as the root
    written(root, cpu__max="200000 100000\n", memory__max="900", memory__current="1000")
    assert (quota_cores(root, own), left_bytes(root, own)) == (2.0, 0)


def test_reads_version_1(tmp_path: Path):
    own, root = tmp_path / "own", tmp_path / "cg"
    own.write_text("5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n0::/\n")
    written(root / "cpu,cpuacct/docker/abc", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    written(root / "cpu,cpuacct/docker", cpu__cfs_quota_us="250000", cpu__cfs_period_us="100000")
    written(root / "memory", memory__limit_in_bytes="9223372036854771712", memory__usage_in_bytes="5")
    assert (quota_cores(root, own), left_bytes(root, own)) == (2.5, None)
    # The path may be the host's: in a container the mount is the group.
    written(root / "memory", memory__limit_in_bytes="5000", memory__usage_in_bytes="2000")
    assert left_bytes(root, own) == 3000


def test_without_control_groups_there_is_no_limit(tmp_path: Path):
    assert quota_cores(tmp_path / "none", tmp_path / "nothing") is None
    assert left_bytes(tmp_path / "none", tmp_path / "nothing") is None
