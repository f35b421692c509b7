"""Several ranks, as threads or processes, say what one rank says and what transformers says, for every family."""

import dataclasses
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from support.checkpoints.gguf_files import write_gguf
from support.checkpoints.logits_oracle import assert_same_logits, oracle
from support.checkpoints.models import GREEDY, Hand, resolved
from support.checkpoints.tiny_families import _OSS, FAMILIES, TinyFamily, _mla, _moe, write_family
from support.engines import rank_steps
from support.engines.thread_group import Ranks, ThreadGroup, make_ranks

from twostroke.checkpoint.shards import Shard
from twostroke.checkpoint.spec import PlainAttention, Quantization
from twostroke.core.errors import ConfigError
from twostroke.core.request import SamplingParams
from twostroke.kv.spec import rank_heads
from twostroke.model.loader import RunnerOptions, load_runner
from twostroke.model.ops.torch_ops import TorchLinear
from twostroke.model.weights.weights import PlainWeights

NAMES = [family.name for family in FAMILIES if "linear_num_key_heads" not in family.fields]  # those are refused
BY_NAME = {family.name: family for family in FAMILIES}
LENGTHS = (1, 17, 63)
NEW_TOKENS = 8
# A vocabulary and widths of feed-forward layers, experts and shared experts that no number of ranks divides.
ODD = {"vocab_size": 157, "intermediate_size": 75}
ODD_FAMILIES = [
    TinyFamily("odd-llama", "LlamaConfig", {**ODD, "mlp_bias": True, "tie_word_embeddings": True}),
    TinyFamily("odd-phi3", "Phi3Config", ODD),  # fused projections
    TinyFamily("odd-gemma2", "Gemma2Config", {**ODD, "head_dim": 24, "sliding_window": 20, "num_key_value_heads": 1}),
    TinyFamily(
        "odd-qwen2-moe",
        "Qwen2MoeConfig",
        {**_moe(shared_expert_intermediate_size=41, decoder_sparse_step=2), **ODD, "moe_intermediate_size": 20},
    ),
    TinyFamily(
        "odd-deepseek-v3",
        "DeepseekV3Config",
        {
            **_mla(n_group=4, topk_group=2, n_shared_experts=1),
            **ODD,
            "moe_intermediate_size": 4,
        },  # nothing for three ranks
    ),
    TinyFamily("odd-gpt-oss", "GptOssConfig", {**_OSS, **ODD, "num_local_experts": 4, "intermediate_size": 20}),
]


def prompts(lengths: tuple[int, ...] = LENGTHS, vocab: int = 157) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]


def continued(hand: Hand | Ranks, texts: list[list[int]], count: int = NEW_TOKENS) -> list[torch.Tensor]:
    """Greedy continuation of the texts, in place; logits of all their rows but the last."""
    logits = hand.logits([(str(i), 0, ids) for i, ids in enumerate(texts)])
    for _ in range(count):
        for ids, rows in zip(texts, logits, strict=True):
            ids.append(int(rows[-1].argmax()))
        step = hand.logits([(str(i), len(ids) - 1, ids[-1:]) for i, ids in enumerate(texts)])
        logits = [torch.cat(pair) for pair in zip(logits, step, strict=True)]
    return logits


def assert_right(path: Path, directory: Path, size: int, served_len: int | None = None) -> None:
    ranks, texts = make_ranks(path, size, max_model_len=served_len), prompts()
    logits = continued(ranks, texts)
    expected = oracle(directory)
    for ids, rows in zip(texts, logits, strict=True):
        # One pass over prompt and our continuation: the top token of every row is the text that transformers writes.
        assert_same_logits(rows, expected(ids))
    longest, whole = texts[-1], logits[-1]
    parts = [ranks.logits([("chunked", a, longest[a:b])])[0] for a, b in ((0, 3), (3, 40), (40, len(longest)))]
    assert torch.equal(torch.cat(parts), whole)  # the bits depend on the text alone, also over several ranks


@pytest.mark.parametrize("size", [2, 4])  # four ranks share two KV heads
@pytest.mark.parametrize("name", NAMES)
def test_ranks_agree_with_transformers(name: str, size: int, family_directory: Callable[[str], Path]) -> None:
    directory = family_directory(name)
    assert_right(directory, directory, size, BY_NAME[name].served_len)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", ODD_FAMILIES, ids=lambda family: family.name)
def test_pads_vocabularies_and_widths_that_do_not_divide(family: TinyFamily, size: int, tmp_path: Path) -> None:
    write_family(family, tmp_path)
    ranks = make_ranks(tmp_path, size)
    assert ranks.logits([("a", 0, [1, 2])])[0].shape == (2, 157)
    assert_right(tmp_path, tmp_path, size)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["llama-biases", "mixtral", "deepseek-v3", "gpt-oss"])
def test_reads_gguf_for_each_rank(
    name: str, size: int, family_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    directory, path = family_directory(name), tmp_path / "m.gguf"
    write_gguf(directory, path)
    assert_right(path, directory, size)


@pytest.mark.parametrize("size", [2, 4])
def test_reads_quantised_gguf_for_each_rank(size: int, tmp_path: Path) -> None:
    write_family(TinyFamily("m", "LlamaConfig", {"intermediate_size": 96}), tmp_path)
    write_gguf(tmp_path, tmp_path / "m.gguf", Kind.Q8_0)
    (text,) = prompts((63,))
    (alone,) = make_ranks(tmp_path / "m.gguf", 1).logits([("a", 0, text)])
    (split,) = make_ranks(tmp_path / "m.gguf", size).logits([("a", 0, text)])
    assert_same_logits(split, alone)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_native_kernels_agree_over_ranks(name: str, size: int, family_directory: Callable[[str], Path]) -> None:
    directory, served_len = family_directory(name), BY_NAME[name].served_len
    texts = [(str(i), 0, ids) for i, ids in enumerate(prompts())]
    alone, split = (make_native(directory, n, served_len).logits(texts) for n in (1, size))
    for mine, theirs in zip(split, alone, strict=True):
        assert_same_logits(mine, theirs)


def make_native(directory: Path, size: int, served_len: int | None, *more: Any, **options: Any) -> Ranks:
    try:
        return make_ranks(directory, size, *more, kernels="native", max_model_len=served_len, **options)
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama-biases", "gemma2", "qwen3-moe", "deepseek-v2"])
@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_fewer_bits_stay_as_close_to_the_exact_logits_as_on_one_rank(
    kernels: str, name: str, dtype: str, quantization: Quantization, family_directory: Callable[[str], Path]
) -> None:
    directory = family_directory(name)
    work = [("a", 0, prompts((100,))[0])]
    (exact,) = make_ranks(directory, 1).logits(work)
    errors = []
    for size in (1, 2, 4):
        make = make_native if kernels == "native" else lambda d, n, _, *a, **o: make_ranks(d, n, *a, **o)
        (rows,) = make(directory, size, None, dtype, "fp8", quantization=quantization).logits(work)
        # A token whose experts stand nearly equal may choose others: some rows may differ.
        errors.append(1 - torch.nn.functional.cosine_similarity(rows, exact).quantile(0.1).item())
    assert max(errors) < 0.02
    assert max(errors[1:]) < 2 * errors[0] + 1e-4


@pytest.mark.parametrize("size", [2, 4])
def test_one_rank_keeps_the_native_stack_and_several_run_op_by_op(
    size: int, family_directory: Callable[[str], Path]
) -> None:
    directory = family_directory("mistral")
    assert make_native(directory, 1, None).hands[0].decoder.is_fused
    assert not any(hand.decoder.is_fused for hand in make_native(directory, size, None).hands)


# ---------------------------------------------------------------- the cache


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kv", ["fp8", "float32"])
@pytest.mark.parametrize("name", ["llama-linear", "qwen3", "phi3", "deepseek-v2"])
def test_the_first_layers_cache_is_the_one_ranks_by_heads(
    name: str, kv: str, size: int, family_directory: Callable[[str], Path]
) -> None:
    directory, texts = family_directory(name), [(str(i), 0, ids) for i, ids in enumerate(prompts())]
    alone, split = make_ranks(directory, 1, kv=kv), make_ranks(directory, size, kv=kv)
    alone.logits(texts)
    split.logits(texts)
    attention = alone.hands[0].spec.attention
    for hand, rank in zip(split.hands, range(size), strict=True):
        heads = slice(None)
        if isinstance(attention, PlainAttention):
            mine = rank_heads(attention.num_kv_heads, rank, size)
            heads = slice(mine.start, mine.stop)
        for ours, whole in zip(hand.store.components, alone.hands[0].store.components, strict=True):
            assert torch.equal(ours.payload[0], whole.payload[0][:, heads])
            if whole.scales is not None:
                assert torch.equal(ours.scales[0], whole.scales[0][:, heads])


def test_a_key_that_is_not_finite_on_one_rank_is_known_to_all(family_directory: Callable[[str], Path]) -> None:
    ranks = make_ranks(family_directory("mistral"), 2)
    decoder = ranks.hands[1].decoder
    layer = decoder.weights.layers[-1]  # no later layer would show it
    assert isinstance(layer.attention, PlainWeights)
    assert isinstance(layer.attention.qkv, TorchLinear)
    broken = layer.attention.qkv.matrix.clone()
    broken[2 * 16] = float("inf")  # the first row of keys, after two heads of queries
    qkv = dataclasses.replace(layer.attention.qkv, matrix=broken)
    attention = dataclasses.replace(layer.attention, qkv=qkv)
    layers = (*decoder.weights.layers[:-1], dataclasses.replace(layer, attention=attention))
    decoder.weights = dataclasses.replace(decoder.weights, layers=layers)
    seen: list[torch.Tensor] = []
    for hand in ranks.hands:
        hidden = hand.decoder.hidden
        hand.decoder.hidden = lambda *a, hidden=hidden: _kept(hidden(*a), seen)  # type: ignore[method-assign]
    ranks.logits([("a", 0, [5, 6, 7])])
    assert [rows[:3].tolist() for rows in seen] == [[1, 1, 1]] * 2


def _kept(hidden: Any, seen: list[torch.Tensor]) -> Any:
    seen.append(hidden.non_finite)
    return hidden


# ---------------------------------------------------------------- whole runners


SEEDED = SamplingParams(max_tokens=64, temperature=1.1, top_p=0.95, top_k=50, seed=11, logprobs=2, prompt_logprobs=1)


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("name", ["qwen3", "deepseek-v2"])
def test_runners_of_all_ranks_say_the_one_runners_tokens(
    name: str, params: SamplingParams, family_directory: Callable[[str], Path]
) -> None:
    directory, options = family_directory(name), RunnerOptions(num_blocks=32, digest_key=9)
    model = resolved(directory, kv_dtype="float32")
    alone = rank_steps.run(load_runner(model, options), prompts(), params, NEW_TOKENS)
    group = ThreadGroup(2)
    runners = [load_runner(model, options, end) for end in group.ends()]
    first, second = group.run([lambda r=r: rank_steps.run(r, prompts(), params, NEW_TOKENS) for r in runners])
    assert first == second
    assert [result.tokens for result in first] == [result.tokens for result in alone]
    for rank, runner in enumerate(runners):
        components = runner.store.spec.main.components
        assert [c.first_head for c in components] == ([rank, rank] if name == "qwen3" else [0, 0])


def test_two_processes_over_gloo_say_the_one_processs_tokens(
    family_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    model, options = resolved(family_directory("qwen2-moe")), RunnerOptions(num_blocks=32, digest_key=9)
    work = (prompts(), GREEDY, NEW_TOKENS)
    alone = rank_steps.run(load_runner(model, options), *work)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        ranks = [
            pool.submit(rank_steps.run_by_gloo, tmp_path / "meet", Shard(rank, 2), model, options, work)
            for rank in range(2)
        ]
        first, second = (rank.result() for rank in ranks)
    assert first == second
    assert [result.tokens for result in first] == [result.tokens for result in alone]


def test_refuses_ranks_that_the_heads_do_not_divide(family_directory: Callable[[str], Path]) -> None:
    end = ThreadGroup(3).ends()[1]
    with pytest.raises(ConfigError, match=r"4 query and 2 KV heads .* 3 .*sizes that work: 1, 2, 4$"):
        load_runner(resolved(family_directory("qwen3")), RunnerOptions(num_blocks=4), end)
