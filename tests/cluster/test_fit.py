"""What fits GPUs that are not here, and those that are: weights, activations and KV pool, with the arithmetic."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.checkpoints.quantised_checkpoints import as_fp8
from typer.testing import CliRunner

from twostroke.checkpoint.activations import step_bytes
from twostroke.checkpoint.config_json import load_spec
from twostroke.cli.main import app
from twostroke.cluster.catalogue import CONTEXT_BYTES, GPU_BY_NAME, gpu_of, parse_machine
from twostroke.cluster.config import load_config
from twostroke.cluster.fit import fits, kinds_that_hold, nodes_of
from twostroke.cluster.launch.launcher import Site, worker_settings
from twostroke.cluster.model_facts import model_facts, needs_by_ranks
from twostroke.cluster.nodes import Node
from twostroke.cluster.placement import ProcessPlan, place
from twostroke.cluster.prepare import plan_on
from twostroke.core.errors import ConfigError, DoesNotFit
from twostroke.core.request import Role
from twostroke.kv.sizing import MemoryFacts, size_pool
from twostroke.kv.spec import attention_spec
from twostroke.model.resolved import resolve
from twostroke.worker import build
from twostroke.worker.machine import MachineFacts

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
MIB = 1 << 20


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A model whose weights take 131 GiB: its config is all that a plan reads."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    return tmp_path


def dry_run(*words: str) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["serve", "--dry-run", *words])
    return result.exit_code, " ".join(result.output.split()) + (str(result.exception) if result.exception else "")


# ------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("text", "nodes", "gpus", "name"),
    [
        ("H100", 1, 1, "H100-SXM"),
        ("8xH100", 1, 8, "H100-SXM"),
        ("8XH100-PCIe", 1, 8, "H100-PCIe"),
        ("2x4xA100-80GB", 2, 4, "A100-80GB"),
        ("4xa100-40", 1, 4, "A100-40GB"),
        ("2x8xMI300X", 2, 8, "MI300X"),
        ("RTX 4090", 1, 1, "RTX-4090"),
        ("2x4090", 1, 2, "RTX-4090"),
        ("1x1xL40S", 1, 1, "L40S"),
    ],
)
def test_reads_machines(text: str, nodes: int, gpus: int, name: str):
    shape = parse_machine(text)
    assert (shape.num_nodes, shape.gpus_per_node, shape.gpu.name) == (nodes, gpus, name)
    assert shape.num_gpus == nodes * gpus


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("8xH1000", "did you mean H100-SXM?"),
        ("B20", "did you mean B200?"),
        ("MI300", "did you mean MI300X?"),
        ("8xabacus9", "'abacus9', which is not in the catalogue"),
        ("0xH100", "1 nodes with 0 GPUs each"),
        ("2000x8xH100", "must be 1 to 1024 nodes"),
        ("65xH100", "1 to 64 GPUs per node"),
        ("", "must be GPUs x kind"),
        ("8x", "8x"),
        ("-1xH100", "must be GPUs x kind"),
    ],
)
def test_names_the_nearest_of_what_it_does_not_know(text: str, words: str):
    with pytest.raises(ConfigError) as caught:
        parse_machine(text)
    assert words in str(caught.value)


def test_gpus_of_several_nodes_are_named_by_their_node():
    pair = nodes_of(parse_machine("2x2xL4"))
    assert [(node.name, node.address, node.is_here, len(node.machine.gpu_bytes)) for node in pair] == [
        ("node 0", "node 0", True, 2),
        ("node 1", "node 1", False, 2),
    ]
    (alone,) = nodes_of(parse_machine("4xL4"))
    assert (alone.name, alone.is_here, len(alone.machine.gpu_bytes)) == ("", True, 4)


def test_each_entry_of_the_catalogue_is_plausible_and_has_a_source():
    wanted = {
        "A10",
        "A100-40GB",
        "A100-80GB",
        "L4",
        "L40S",
        "H100-SXM",
        "H100-PCIe",
        "H200",
        "B200",
        "RTX-4090",
        "MI300X",
    }
    assert wanted <= GPU_BY_NAME.keys()
    for name, gpu in GPU_BY_NAME.items():
        assert gpu_of(name.lower()) is gpu
        assert gpu.source, name
        # a datasheet's GB are GiB, or a little less where ECC takes its part or the maker counts in powers of ten
        assert 0.93 <= gpu.reported_mib / (gpu.memory_gb * 1024) <= 1.03, name
        assert gpu.fp8_tflops is None or 1.9 < gpu.fp8_tflops / gpu.bf16_tflops < 2.1, name
        assert 0 < gpu.free_bytes < gpu.reported_mib * MIB


# ------------------------------------------------------------------ what fits


def test_intermediate_values_are_those_of_the_largest_part_of_a_layer(large: Path):
    spec = load_spec(large)
    found = step_bytes(spec, "bfloat16")
    assert found.per_token == 2 * (4 * 8192 + 3 * 28672)
    assert found.per_row == 128256 * 12


@pytest.mark.parametrize("family", ["qwen3", "mixtral", "deepseek-v2-lite", "gpt-oss"])
def test_every_family_has_intermediate_values(family: str, family_directory: Callable[[str], Path]):
    spec = load_spec(family_directory(family))
    assert step_bytes(spec, "float32").per_token == 2 * step_bytes(spec, "bfloat16").per_token > 8 * spec.hidden_size


def test_a_worker_is_sized_by_what_its_ranks_take(large: Path):
    shape = parse_machine("8xH100")
    config = load_config(flags={"model.path": str(large)})
    found = {fit.num_ranks: fit for fit in fits(needs_by_ranks(config, 8), config, shape.gpu)}
    assert sorted(found) == [1, 2, 4, 8]
    assert not found[1].is_possible
    assert "no KV block fits: memory 80,959 MiB − weights 134,571 MiB − activations 2,232 MiB" in found[1].arithmetic
    for ranks in (2, 4, 8):
        fit = found[ranks]
        left = shape.gpu.free_bytes - fit.weight_bytes - fit.activation_bytes
        assert fit.pool_bytes == pytest.approx(0.9 * left, rel=0.001)
        assert fit.num_tokens == pytest.approx(ranks * fit.pool_bytes / (2 * 80 * 8 * 129), rel=0.001)
    assert found[8].num_tokens > found[4].num_tokens > found[2].num_tokens
    assert found[2].max_model_len == found[2].num_tokens < 131_072 == found[8].max_model_len
    assert found[1].read_ms(shape.gpu) == pytest.approx(141.1e9 / 3350e9 * 1e3, rel=0.01)


def test_a_context_that_does_not_fit_is_refused_per_number_of_ranks(large: Path):
    config = load_config(flags={"model.path": str(large), "model.max_model_len": 131_072})
    one, two, four, _ = fits(needs_by_ranks(config, 8), config, gpu_of("H100"))
    assert not one.is_possible
    assert not two.is_possible
    assert "model.max_model_len is 131,072, and a worker's pool holds 129,136" in two.arithmetic
    assert four.is_possible


def test_activations_are_taken_before_the_share_of_the_pool():
    spec = attention_spec(num_layers=32, kv_heads=8, head_dim=128, codec=1)
    facts = MemoryFacts(memory_bytes=20 << 30, weight_bytes=16 << 30, swaps_elsewhere=True, activation_bytes=2 << 30)
    pool = size_pool(spec, 16, None, 0.5, facts)
    assert pool.num_blocks == (1 << 30) // (spec.bytes_per_token * 16)
    assert "memory 20,480 MiB − weights 16,384 MiB − activations 2,048 MiB = 2,048 MiB; × 0.5" in pool.arithmetic


def test_the_plan_for_a_machine_that_is_not_here_is_that_of_one_that_is(family_directory: Callable[[str], Path]):
    """Dry run, plan and worker add up the same."""
    path, shape = family_directory("qwen3"), parse_machine("2xL4")
    config = load_config(flags={"model.path": str(path)})
    plan = plan_on(config, nodes_of(shape))
    assert [(member.device, member.gpu) for member in plan.workers] == [("cuda", 0), ("cuda", 1)]
    assert plan.spare_gpus == ()
    (one, *_) = fits(needs_by_ranks(config, 1), config, shape.gpu)
    assert plan.pool.num_tokens == one.num_tokens
    assert plan.pool.arithmetic == one.arithmetic
    assert "activations" in one.arithmetic
    spare = plan_on(config, nodes_of(parse_machine("4xL4")))
    assert spare.spare_gpus == (2, 3)


# ------------------------------------------------------------------ the command


def test_a_dry_run_shows_what_a_machine_holds(large: Path):
    code, shown = dry_run("--model", str(large), "--machine", "8xB200")
    assert code == 0, shown
    assert "8 × B200: 183,359 MiB at 8,000 GB/s, 2,250 TFLOP/s in bf16" in shown
    assert "a worker fits 1 GPU of this kind" in shown
    for words in ("134,571 MiB", "68,289 MiB", "prefill-0", "GPU 1: 182,759 MiB", "triton kernels on cuda"):
        assert words in shown, words
    assert f"memory {(183_359 * MIB - CONTEXT_BYTES) // MIB:,} MiB − weights 134,571 MiB − activations" in shown


def test_a_dry_run_refuses_with_the_arithmetic_what_does_not_fit(large: Path):
    code, shown = dry_run("--model", str(large), "--machine", "2x8xH100")
    assert code != 0
    assert shown.count("no KV block fits: memory 80,959 MiB − weights 134,571 MiB − activations 2,232 MiB") == 1
    told = (
        "The weights alone leave nothing, whatever the cache's settings: use a smaller model or a GPU with more memory"
    )
    assert told in shown
    assert "fewer workers" not in shown
    assert "cache.tokens" not in shown
    assert "2 nodes of 8 × H100-SXM" in shown
    assert "a worker would need 2 GPUs of this kind, and this release runs workers of one GPU" in shown
    assert "One GPU of these holds it: H200, B200, MI300X" in shown
    assert "129,136" in shown
    assert shown.count("no: one GPU per worker") == 3
    assert "int8" not in shown
    code, rounded = dry_run("--model", str(large), "--machine", "2x8xH100", "--quantization", "int8")
    assert code != 0
    assert rounded.count("model.quantization int8 saves no memory on a GPU") == 1
    code, shown = dry_run("--model", str(large), "--machine", "4xL4")
    assert code != 0
    assert "a worker does not fit 4 GPUs, the most of a node that its heads can be split over" in shown


def test_a_plan_of_several_nodes_is_that_of_a_start_on_them(family_directory: Callable[[str], Path]):
    """Roles are spread as on the nodes of a joined Ray: both on each node."""
    model = str(family_directory("qwen3"))
    code, shown = dry_run("--model", model, "--machine", "2x4xH100", "--prefill", "2", "--decode", "2")
    assert code == 0, shown
    places = re.findall(r"(prefill-\d|decode-\d) │ \w+ │ 1 │ \d+ │ (node \d GPU \d)", shown)
    config = load_config(flags={"model.path": model, "cluster.prefill": 2, "cluster.decode": 2})
    nodes = [
        Node(f"id-{number}", f"10.0.0.{number}", MachineFacts(32, 256 << 30, (80 << 30,) * 4), is_here=number == 0)
        for number in range(2)
    ]
    real = plan_on(config, nodes)
    assert places == [(m.name, f"node {m.node.removeprefix('id-')} GPU {m.gpu}") for m in real.workers]
    assert {where[:6] for name, where in places if name.startswith("prefill")} == {"node 0", "node 1"}
    assert "4 GPUs have no worker" in shown
    assert "give the address of a Ray on all of them: --ray-address" in shown
    assert "without the Ray that is joined" in shown
    assert "a Ray that is started for them" not in shown
    assert "free now" not in shown
    assert "a limit, not an estimate: 120 s, and 4 ×" in shown
    code, shown = dry_run("--model", model, "--machine", "2x4xH100", "--ray-address", "10.0.0.1:6379")
    assert code == 0, shown
    assert "without the Ray that is joined" in shown
    assert "give the address" not in shown
    code, shown = dry_run("--model", model, "--machine", "4xH100")
    assert "a Ray that is started for them" in shown
    assert "node 0" not in shown
    code, shown = dry_run("--model", model, "--machine", "2x4xH100", "--launcher", "process")
    assert code != 0
    assert "--machine names 2 nodes, and the launcher process starts workers on one" in shown


def test_the_gpus_that_hold_a_model_are_named_from_small_to_large(large: Path, tmp_path: Path):
    config = load_config(flags={"model.path": str(large)})
    needs = needs_by_ranks(config, 1)[1]
    assert kinds_that_hold(needs, config) == ["H200", "B200", "MI300X"]
    assert kinds_that_hold(replace(needs, weight_bytes=400 << 30), config) == []


def test_a_worker_with_adapters_has_one_rank(large: Path):
    code, shown = dry_run("--model", str(large), "--machine", "8xB200", "--enable-lora")
    assert code == 0, shown
    assert "no: one GPU per worker" not in shown
    assert "a worker fits 1 GPU of this kind" in shown


def test_rounding_and_decoding_are_noted_where_they_save_nothing(tmp_path: Path, family_directory: Callable[..., Path]):
    as_fp8(family_directory("qwen3"), tmp_path / "fp8", tmp_path / "floats")
    gpu, cpu = (model_facts(load_config(flags={"model.path": str(tmp_path / "fp8")}), num) for num in (1, 0))
    assert [word for word in gpu.remarks if "decoded to" in word]
    assert not [word for word in cpu.remarks if "decoded to" in word]
    rounded = load_config(flags={"model.path": str(family_directory("qwen3")), "model.quantization": "int8"})
    assert "saves no memory on a GPU" in " ".join(model_facts(rounded, 1).remarks)
    assert model_facts(rounded, 0).remarks == ()


def test_up_plans_as_serve_does(large: Path):
    words = ["--dry-run", "--model", str(large), "--machine", "8xB200"]
    first, second = (CliRunner(env={"COLUMNS": "200"}).invoke(app, [command, *words]) for command in ("serve", "up"))
    assert first.exit_code == second.exit_code == 0
    assert first.output == second.output
    assert "prefill-0" in second.output
    refused = CliRunner().invoke(app, ["up", "--machine", "8xH100"])
    assert "give --dry-run with it" in str(refused.exception) + refused.output


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--dry-run", "--machine", "8xH1000"], "did you mean H100-SXM"),
        (["--machine", "8xH100"], "give --dry-run with it"),
    ],
)
def test_the_command_refuses_other_machines(words: list[str], told: str):
    result = CliRunner().invoke(app, ["serve", *words])
    assert result.exit_code != 0
    assert told in str(result.exception) + result.output


def test_a_model_for_the_cpu_has_no_machine_of_gpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TWOSTROKE__MODEL__DEVICE", "cpu")
    result = CliRunner().invoke(app, ["serve", "--dry-run", "--machine", "8xH100"])
    assert result.exit_code != 0
    assert "model.device is 'cpu'" in str(result.exception) + result.output


# ------------------------------------------------------------------ a device that is here


def test_a_worker_adds_up_what_is_free_when_it_starts(large: Path, monkeypatch: pytest.MonkeyPatch):
    """Not what was free when the plan was made: another program has taken 60 GiB of it since."""
    free = 180 << 30
    config = load_config(flags={"model.path": str(large), "cluster.prefill": 0})
    plan = place(config, MachineFacts(8, 100 << 30, (free,)), model_facts(config, 1))
    settings = worker_settings(Site(plan.settle(config), str(large), "m", (1,)), plan.workers[0])
    model = resolve(large, settings.model, settings.cache.dtype, "cuda")
    monkeypatch.setattr(build, "machine_facts", lambda: MachineFacts(8, 100 << 30, (free,)))
    assert build._sized(settings, model).pool.num_tokens == plan.pool.num_tokens
    monkeypatch.setattr(build, "machine_facts", lambda: MachineFacts(8, 100 << 30, (free - (60 << 30),)))
    with pytest.raises(DoesNotFit, match="memory 122,880 MiB − weights 134,571 MiB − activations 2,232 MiB"):
        build._sized(settings, model)
    # a share of the GPU, of which more is free, stays a share
    short = settings.model.model_copy(update={"max_model_len": 4096})
    half = settings.model_copy(update={"memory_bytes": 150 << 30, "model": short})
    monkeypatch.setattr(build, "machine_facts", lambda: MachineFacts(8, 100 << 30, (free,)))
    assert "memory 153,600 MiB" in build._sized(half, model).pool.arithmetic


def test_a_worker_on_a_gpu_by_hand_takes_what_is_free(large: Path, monkeypatch: pytest.MonkeyPatch):
    config = load_config(flags={"model.path": str(large)})
    member = ProcessPlan("decode-0", "worker", Role.DECODE, 1, 0, "cuda")
    settings = worker_settings(Site(config, str(large), "m", (1,)), member).model_copy(update={"memory_bytes": None})
    monkeypatch.setattr(build, "machine_facts", lambda: MachineFacts(8, 100 << 30, (170 << 30,)))
    sized = build._sized(settings, resolve(large, settings.model, "auto", "cuda"))
    assert "memory 174,080 MiB" in sized.pool.arithmetic
