"""The part of a model that a tensor-parallel rank computes, and the parts of tensors that it reads. No numbers."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twostroke.checkpoint.cuts import rank_cuts
from twostroke.checkpoint.layout import EMBEDDING, HEAD, expected_shapes, weight_bytes
from twostroke.checkpoint.shards import WIDTH_MULTIPLE, Shard, group_sizes, shard_spec
from twostroke.checkpoint.spec import (
    DenseFfn,
    ExpertsFfn,
    LatentAttention,
    LayerSpec,
    ModelSpec,
    PlainAttention,
    RopeSpec,
    Routing,
)
from twostroke.core.errors import ConfigError
from twostroke.kv.spec import rank_heads


def model(
    attention: PlainAttention | LatentAttention, *ffns: DenseFfn | ExpertsFfn, vocab: int = 100, tied: bool = False
) -> ModelSpec:
    return ModelSpec(
        architecture="LlamaForCausalLM",
        hidden_size=24,
        vocab_size=vocab,
        attention=attention,
        layers=tuple(LayerSpec(ffn) for ffn in ffns),
        ropes=(RopeSpec(1e4, 4),),
        activation="silu",
        rms_eps=1e-5,
        tied_embeddings=tied,
        max_model_len=64,
        bos_id=None,
        eos_ids=(),
        dtype="bfloat16",
    )


def plain(heads: int, kv_heads: int, head_dim: int = 4, bias: bool = False) -> PlainAttention:
    return PlainAttention(heads, kv_heads, head_dim, 1.0, qkv_bias=bias, output_bias=bias)


def latent(heads: int, query_rank: int | None = None, bias: bool = False) -> LatentAttention:
    return LatentAttention(heads, query_rank, 8, 4, 6, 10, 1.0, False, bias)


@st.composite
def models(draw: st.DrawFn) -> ModelSpec:
    group, kv_heads, bias = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.booleans())
    attention = draw(
        st.sampled_from(
            [plain(group * kv_heads, kv_heads, 4, bias), latent(group * kv_heads, None, bias), latent(group, 12, bias)]
        )
    )
    widths = st.integers(1, 70)
    dense = st.builds(DenseFfn, widths, st.booleans())
    routing = Routing(3, 2)
    experts = st.builds(ExpertsFfn, widths, st.just(routing), st.none() | widths, st.booleans(), st.booleans())
    ffns = draw(st.lists(dense | experts, min_size=1, max_size=2))
    return model(attention, *ffns, vocab=draw(st.integers(1, 90)), tied=draw(st.booleans()))


def fused_names(spec: ModelSpec) -> set[str]:
    """Names of a checkpoint with all projections fused that can be."""
    ends = {"mlp.gate_up_proj", "mlp.shared_experts.gate_up_proj", *(f"mlp.experts.{e}.gate_up_proj" for e in range(3))}
    at = [f"model.layers.{layer}." for layer in range(spec.num_layers)]
    return {f"{layer}{end}.weight" for layer in at for end in ("self_attn.qkv_proj", *ends)}


@given(models(), st.booleans())
@settings(max_examples=300, deadline=None)
def test_the_ranks_parts_cover_every_tensor_once(spec: ModelSpec, fused: bool) -> None:
    present = fused_names(spec) if fused else set()
    whole = expected_shapes(spec, present)
    for size in group_sizes(spec):
        if size == 1:
            continue
        counts = {name: np.zeros(shape, np.int64) for name, shape in whole.items()}
        if spec.tied_embeddings:
            counts[HEAD] = np.zeros(whole[EMBEDDING], np.int64)
        for number in range(size):
            rank = shard_spec(spec, Shard(number, size))
            cuts = rank_cuts(rank, present)
            for name, shape in expected_shapes(rank.local, present).items():
                if name not in cuts:
                    assert shape == whole[name], name  # whole on every rank
                    counts[name] += 1
                    continue
                cut = cuts[name]
                assert cut.stored == (EMBEDDING if name == HEAD and spec.tied_embeddings else name)
                assert cut.shape(whole[cut.stored]) == shape, name
                for start, stop, room in cut.pieces:
                    assert 0 <= start <= stop <= whole[cut.stored][cut.axis]
                    assert stop - start <= room
                    np.moveaxis(counts[name], cut.axis, 0)[start:stop] += 1
        for name, count in counts.items():
            if name not in rank_cuts(shard_spec(spec, Shard(1, size)), present):
                assert (count == size).all(), name
            elif _is_a_key_or_value(name) and isinstance(spec.attention, PlainAttention):
                holders = max(1, size // spec.attention.num_kv_heads)
                queries = spec.attention.num_heads * spec.attention.head_dim
                copied = count[queries:] if "qkv_proj" in name else count
                assert (copied == holders).all(), name
                assert "qkv_proj" not in name or (count[:queries] == 1).all(), name
            else:  # one rank has a number, and adds a bias
                assert (count == 1).all(), name


def _is_a_key_or_value(name: str) -> bool:
    return any(part in name for part in ("k_proj", "v_proj"))


@given(models())
@settings(max_examples=50, deadline=None)
def test_all_ranks_have_parts_of_one_size_and_together_the_whole(spec: ModelSpec) -> None:
    for size in group_sizes(spec):
        ranks = [shard_spec(spec, Shard(number, size)) for number in range(size)]
        assert len({rank.local for rank in ranks}) == 1
        held = weight_bytes(ranks[0].local, "bfloat16", maps_table=True)
        whole = weight_bytes(dataclasses.replace(spec, tied_embeddings=False), "bfloat16", maps_table=True)
        assert size * held >= whole
        if size == 1:
            assert ranks[0].local is spec


def test_a_ranks_bytes_are_its_share_where_all_divides() -> None:
    spec = model(plain(4, 2), DenseFfn(64), vocab=160)
    norms = 3 * 24
    for size in (2, 4):
        copies = max(1, size // 2)
        numbers = (2 * 16 * 24 + 3 * 64 * 24 + 160 * 24 + 2 * 8 * 24 * copies) // size + norms
        rank = shard_spec(spec, Shard(size - 1, size))
        assert weight_bytes(rank.local, "bfloat16", maps_table=True) == 2 * numbers
        assert weight_bytes(rank.local, "bfloat16") == 2 * (numbers + 160 * 24)  # the table is whole


def test_padding_is_even_and_small() -> None:
    spec = model(plain(4, 2), DenseFfn(75), ExpertsFfn(24, Routing(3, 2), 41), vocab=157)
    local = shard_spec(spec, Shard(3, 4)).local
    assert (local.layers[0].ffn.width, local.layers[1].ffn.width, local.head_rows) == (24, 8, 40)
    assert local.layers[1].ffn.shared_width == 16
    assert local.vocab_size == 157
    assert Shard(3, 4).padded(24) == (24, 24, 8)  # nothing is left for the last rank
    assert Shard(1, 4).padded(75) == (24, 48, 24)
    assert Shard(3, 4).padded(75) == (72, 75, 24)
    assert all(Shard(0, n).padded(w).size % WIDTH_MULTIPLE == 0 for n in range(1, 9) for w in range(1, 99))


@pytest.mark.parametrize(
    ("attention", "size", "told"),
    [
        (plain(3, 1), 2, r"with 3 query and 1 KV heads .* 2 .*sizes that work: 1, 3$"),
        (plain(12, 4), 3, r"with 12 query and 4 KV heads .* 3 .*sizes that work: 1, 2, 4, 12$"),
        (plain(12, 4), 8, r"sizes that work: 1, 2, 4, 12$"),
        (latent(5), 2, r"with 5 heads .* 2 .*sizes that work: 1, 5$"),
    ],
)
def test_refuses_heads_that_cannot_be_split(attention: PlainAttention | LatentAttention, size: int, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        shard_spec(model(attention, DenseFfn(32)), Shard(0, size))


def test_heads_of_the_cache_go_to_the_ranks_whose_queries_read_them() -> None:
    for heads, kv_heads in ((8, 8), (8, 4), (8, 2), (8, 1), (12, 4), (6, 3)):
        spec = model(plain(heads, kv_heads), DenseFfn(8))
        for size in group_sizes(spec):
            for number in range(size):
                mine = rank_heads(kv_heads, number, size)
                queries = range(number * heads // size, (number + 1) * heads // size)
                assert {query * kv_heads // heads for query in queries} == set(mine)
                cache = shard_spec(spec, Shard(number, size)).kv_spec("fp8").main.components
                assert [(c.first_head, c.heads, c.holders) for c in cache] == [
                    (mine.start, len(mine), max(1, size // kv_heads))
                ] * 2


def test_of_each_head_one_holder_is_the_first() -> None:
    for attention, heads in ((plain(8, 2), 2), (plain(8, 1), 1), (plain(8, 8), 8), (latent(8), 1)):
        ranks = [shard_spec(model(attention, DenseFfn(8)), Shard(number, 4)) for number in range(4)]
        sent = [
            head
            for rank in ranks
            for c in rank.kv_spec("fp8").main.components[:1]
            if rank.shard.rank % c.holders == 0
            for head in range(c.first_head, c.first_head + c.heads)
        ]
        assert sent == list(range(heads))


def test_a_latent_cache_is_whole_on_every_rank() -> None:
    spec = model(latent(4), DenseFfn(8))
    for number in range(4):
        cache = shard_spec(spec, Shard(number, 4)).kv_spec("fp8")
        assert cache.bytes_per_token == spec.kv_spec("fp8").bytes_per_token
        assert [(c.first_head, c.heads, c.holders) for c in cache.main.components] == [(0, 1, 4)] * 2
