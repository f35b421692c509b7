"""What settings that nobody gave mean on a laptop, in a container, on large and small GPUs; and what is said of it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.checkpoints.gguf_files import write_gguf
from typer.testing import CliRunner

from twostroke.cli.main import app
from twostroke.cli.plans import show_plan
from twostroke.cluster.config import load_config
from twostroke.cluster.launch.launcher import Site, worker_settings
from twostroke.cluster.model_facts import model_facts
from twostroke.cluster.nodes import Node
from twostroke.cluster.placement import ModelFacts, Plan, ProcessPlan, bytes_beside_workers, place
from twostroke.core.errors import ConfigError, DoesNotFit
from twostroke.core.request import Role
from twostroke.kv.config import CacheConfig
from twostroke.kv.sizing import MAX_POOL_BLOCKS, MemoryFacts, size_pool
from twostroke.kv.spec import attention_spec
from twostroke.model.resolved import resolve
from twostroke.worker import build
from twostroke.worker.automatic import PROCESS_BYTES
from twostroke.worker.build import _sized
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
    left = (12 << 30) - bytes_beside_workers(plan.config) - PROCESS_BYTES - (1 << 30) - plan.config.cache.ring_bytes
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
    worker = worker_settings(Site(settled, "anywhere", "m", (1,)), plan.workers[0])
    assert worker.model.max_model_len == plan.pool.num_tokens
    assert worker.step.max_num_batched_tokens == 8192
    again = place(load_config(flags=settled.model_dump()), machine, LLAMA_8B)  # as a file that a launcher wrote
    assert again.pool.num_tokens == plan.pool.num_tokens
    assert (settled.cache.tokens, settled.cache.memory_fraction) == (plan.pool.num_tokens, 0.9)
    assert settled.router.port == config.router.port
    assert settled.cluster.key == config.cluster.key


@pytest.mark.parametrize("form", ["safetensors", "gguf"])
@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"cache.tokens": 127, "cache.block_size": 64},  # one block, and less than a context
        {"cache.memory_fraction": 0.0001},  # a pool of less than a context
        {"cache.swap_space": 0.01, "cluster.prefill": 1, "cluster.decode": 2},
        {"model.quantization": "int8", "cache.dtype": "float32", "model.dtype": "float32"},
        {"model.max_model_len": 64, "step.max_num_seqs": 3, "step.max_num_batched_tokens": 48},
        {"model.kernels": "torch", "cluster.prefill": 3, "cluster.decode": 5},
    ],
)
def test_each_worker_gets_what_the_plan_says(
    flags: dict[str, Any], form: str, family_directory: Callable[[str], Path], tmp_path: Path
):
    path = family_directory("qwen3")
    if form == "gguf":
        write_gguf(path, tmp_path / "tiny.gguf")
        path = tmp_path / "tiny.gguf"
    config = load_config(flags=ONE | {"model.path": str(path), "model.device": "cpu"} | flags)
    processes = bytes_beside_workers(config) + (config.cluster.prefill + config.cluster.decode) * PROCESS_BYTES
    plan = place(config, MachineFacts(8, processes + (2 << 30)), model_facts(config))
    site = Site(plan.settle(config), plan.model.directory, plan.model.name, (1,))
    for member in plan.workers:
        settings = worker_settings(site, member)
        model = resolve(Path(settings.model_directory), settings.model, settings.cache.dtype, "cpu")
        sized = _sized(settings, model)
        assert replace(sized.pool, arithmetic="") == replace(plan.pool, arithmetic="")
        assert sized.max_model_len == plan.model.max_model_len
        assert sized.step == plan.config.step
        assert model.weight_bytes == plan.model.weight_bytes


def test_a_context_may_fill_the_pool_and_no_more():
    plan = planned(SMALL, LAPTOP, cache__tokens=4096, model__max_model_len=4096)
    assert plan.pool.num_tokens == plan.model.max_model_len == 4096
    with pytest.raises(DoesNotFit):
        planned(SMALL, LAPTOP, cache__tokens=4096, model__max_model_len=4097)


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_workers_accept_what_is_decided_for_the_smallest_pools(num_blocks: int):
    """The file that a launcher writes for its members has the bounds of any other."""
    one = SPEC.bytes_per_token * 16
    rings = CacheConfig().shared_bytes
    other = bytes_beside_workers(load_config()) + PROCESS_BYTES
    machine = MachineFacts(8, other + SMALL.weight_bytes + rings + num_blocks * one)
    plan = planned(SMALL, machine, cache__memory_fraction=1.0)
    assert plan.pool.num_tokens == plan.model.max_model_len == 16 * num_blocks
    again = load_config(
        flags={"model": plan.settle(plan.config).model.model_dump(), "cache": plan.config.cache.model_dump()}
    )
    assert again.model.max_model_len == 16 * num_blocks


@pytest.mark.parametrize(("free_bytes", "tokens"), [((64 << 30) - 1, 2048), (64 << 30, 8192)])
def test_steps_are_sized_by_the_whole_gpu_and_not_by_a_share_of_it(
    free_bytes: int, tokens: int, family_directory: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
):
    """In the plan and in a worker's process alike."""
    path, machine = family_directory("qwen3"), MachineFacts(8, 100 << 30, (free_bytes,))
    assert planned(SMALL, machine, cluster__decode=4).config.step.max_num_batched_tokens == tokens
    monkeypatch.setattr(build, "machine_facts", lambda: machine)
    config = load_config(flags=ONE | {"model.path": str(path)})
    member = ProcessPlan("decode-0", "worker", Role.DECODE, 1, 1 << 30, "cuda")
    settings = worker_settings(Site(config, str(path), "m", (1,)), member)
    sized = build._sized(settings, resolve(path, settings.model, "auto", "cuda"))
    assert sized.step.max_num_batched_tokens == tokens
    assert sized.pool.pool_bytes <= 1 << 30


def test_no_memory_is_not_all_memory(tiny_checkpoint: Path):
    config = load_config(flags=ONE | {"model.path": str(tiny_checkpoint), "model.device": "cpu"})
    plan = place(config, LAPTOP, model_facts(config))
    settings = worker_settings(Site(plan.settle(config), plan.model.directory, "m", (1,)), plan.workers[0])
    model = resolve(tiny_checkpoint, settings.model, settings.cache.dtype, "cpu")
    with pytest.raises(DoesNotFit, match="memory 0 MiB"):
        _sized(settings.model_copy(update={"memory_bytes": 0}), model)
    asked = ["worker", "--role", "decode", "--router", "127.0.0.1:1", "--memory-bytes", "0"]
    assert CliRunner().invoke(app, asked).exit_code == 2


def test_a_pool_has_no_more_blocks_than_can_be_kept_book_of():
    assert size_pool(attention_spec(1, 1, 8, 1), 16, None, 1.0, MemoryFacts(1 << 40, 0)).num_blocks == MAX_POOL_BLOCKS


def test_the_plan_says_each_value_its_reason_and_how_to_change_it():
    model = replace(SMALL, remarks=("something else is read",), sampling="temperature 0.6")
    config = load_config(flags=ONE)
    console = Console(record=True, width=200)
    machine = replace(LAPTOP, cores_reason="4 of them asleep")
    show_plan(config, place(config, machine, model), console, [Node.alone(machine)])
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
