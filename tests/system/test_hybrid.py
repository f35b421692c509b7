"""A model with recurrent layers behind the whole cluster: transformers' texts, prefixes found, and what is refused."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from twostroke import AsyncClient, Client
from twostroke.cluster.config import load_config
from twostroke.cluster.model_facts import model_facts
from twostroke.cluster.operations.operator import Operator
from twostroke.cluster.placement import place
from twostroke.core.errors import ConfigError, Unavailable
from twostroke.core.request import Role
from twostroke.worker.machine import machine_facts

BUNDLED = Path(__file__).parents[2] / "model" / "bundled"
VOCAB = 4096
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "max_position_embeddings": 2048, "eos_token_id": 1,
    "initializer_range": 0.15, "dtype": "float32",
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3.5 with the bundled model's tokenizer."""
    import transformers

    directory = tmp_path_factory.mktemp("hybrid")
    torch.manual_seed(5)
    transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**SHAPE)).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, directory / name)
    return directory


def settings(checkpoint: Path, **more: Any) -> dict[str, Any]:
    common = {"cluster__launcher": "inprocess", "step__num_threads": 1, "cache__dtype": "float32"}
    return {**common, "model__path": str(checkpoint), "cache__tokens": 16384, **more}


def prompts() -> list[list[int]]:
    random = torch.Generator().manual_seed(7)
    draw = lambda count: torch.randint(10, VOCAB, (count,), generator=random).tolist()  # noqa: E731
    system = draw(200)
    return [[*system, *draw(own)] for own in (3, 16, 30, 61)] + [draw(length) for length in (1, 15, 16, 17, 90)]


def test_texts_are_transformers_with_every_prompt_at_once(run_cluster, checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM

    given = [{"prompt": ids, "max_tokens": 24, "temperature": 0.0, "ignore_eos": True} for ids in prompts()]

    async def all_at_once(address: str) -> list[Any]:
        async with AsyncClient(address, timeout_s=120) as client:
            return list(await asyncio.gather(*(client.generate(**one) for one in given)))

    with run_cluster(**settings(checkpoint, step__max_num_batched_tokens=64)) as cluster:
        answers = asyncio.run(all_at_once(cluster.grpc))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    for one, answer in zip(given, answers, strict=True):
        expected = model.generate(torch.tensor([one["prompt"]]), max_new_tokens=24, min_new_tokens=24, do_sample=False)
        assert list(answer.choices[0].token_ids) == expected[0, len(one["prompt"]) :].tolist()
    # The second of four may come just after the first has passed the end of the system prompt; it marks the place.
    assert sum(answer.usage.cached_tokens for answer in answers) >= 2 * 192


def test_a_role_that_hands_over_is_refused_while_it_runs(run_cluster, checkpoint: Path) -> None:
    with run_cluster(**settings(checkpoint)) as cluster, Client(cluster.grpc) as client:
        (worker,) = client.cluster()["workers"]
        assert worker["worker_id"] == "combined-0"  # decided for such a model, where nothing is said
        shared = cluster.supervisor.config.cluster
        with pytest.raises(Unavailable, match="not handed over"):
            cluster.run(Operator(shared.key, shared.tls).set_role(worker["address"], Role.PREFILL))
        assert client.cluster()["workers"][0]["role"] == "combined"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"cluster__prefill": 1}, "--prefill 0"),
        ({"speculation__method": "ngram"}, r"speculation\.method is 'ngram'"),
        ({"cache__swap_space": 1.0}, r"cache\.swap_space is 1\.0"),
        ({"model__enable_lora": True}, "enable_lora is True"),
        ({"cluster__tensor_parallel_size": 2}, "tensor_parallel_size 1"),
    ],
)
def test_settings_that_are_not_served_are_refused_before_the_start(
    checkpoint: Path, change: dict[str, Any], named: str
) -> None:
    flags = {name.replace("__", "."): value for name, value in settings(checkpoint, **change).items()}
    with pytest.raises(ConfigError, match=named):
        model_facts(load_config(flags=flags))


def test_the_plan_counts_states_and_tells_them(checkpoint: Path) -> None:
    flags = {name.replace("__", "."): value for name, value in settings(checkpoint).items()}
    config = load_config(flags=flags)
    plan = place(config, machine_facts(), model_facts(config))
    told = {decision.setting: decision for decision in plan.decisions}
    assert "2 × 64 sequences" in told["cache.state_snapshots"].reason
    assert "recurrent states" in plan.pool.arithmetic
    assert plan.config.cache.state_snapshots == 256
