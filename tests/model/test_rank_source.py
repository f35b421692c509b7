"""A rank reads its part of each tensor, and of the files' bytes no more than that."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from support.checkpoints.gguf_files import write_gguf
from support.checkpoints.tiny_families import TinyFamily, write_family

from twostroke.checkpoint.config_json import load_spec
from twostroke.checkpoint.cuts import COLUMNS, rank_cuts
from twostroke.checkpoint.layout import EMBEDDING, HEAD, expected_shapes
from twostroke.checkpoint.shards import RankSpec, Shard, shard_spec
from twostroke.core.errors import CheckpointError
from twostroke.model.weights.rank_source import cut_source
from twostroke.model.weights.tensors import PartSource, open_source

# Fused and separate projections, biases, a tied head, several files, experts, latents; widths that do not divide.
NAMES = ["llama-biases", "llama-llama3", "phi3", "mixtral", "qwen2-moe", "deepseek-v2", "gpt-oss"]
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_key_value_heads": 2}


def ranks_of(path: Path, size: int) -> list[RankSpec]:
    return [shard_spec(load_spec(path), Shard(rank, size)) for rank in range(size)]


def expected(source: PartSource, rank: RankSpec, name: str) -> torch.Tensor:
    """A rank's tensor, cut out of the whole one in memory."""
    cut = rank_cuts(rank, source.shapes()).get(name)
    if cut is None:
        return source.take(name)
    whole = source.take(cut.stored)
    shape = list(whole.shape)
    parts = []
    for start, stop, size in cut.pieces:
        shape[cut.axis] = size - (stop - start)
        parts += [whole.narrow(cut.axis, start, stop - start), whole.new_zeros(shape)]
    return torch.cat(parts, cut.axis)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_gives_each_ranks_numbers_and_zeros(name: str, size: int, family_directory: Callable[[str], Path]) -> None:
    directory = family_directory(name)
    source = open_source(directory)
    for rank in ranks_of(directory, size):
        cut = cut_source(source, rank)
        shapes = expected_shapes(rank.local, source.shapes())
        assert shapes.items() <= cut.shapes().items()
        for tensor in shapes:
            got = cut.take(tensor)
            assert tuple(got.shape) == shapes[tensor], tensor
            assert torch.equal(got, expected(source, rank, tensor)), tensor
        assert cut.fingerprint() == source.fingerprint()


@pytest.mark.parametrize("name", NAMES)
def test_reads_safetensors_as_views_and_copies_only_a_ranks_numbers(
    name: str, family_directory: Callable[[str], Path]
) -> None:
    directory = family_directory(name)
    source = open_source(directory)
    copied = 0
    for rank in ranks_of(directory, 4):
        cut, cuts = cut_source(source, rank), rank_cuts(rank, source.shapes())
        for tensor in expected_shapes(rank.local, source.shapes()):
            got = cut.take(tensor)
            stored = source.take(cuts[tensor].stored if tensor in cuts else tensor).untyped_storage()
            begin = stored.data_ptr()
            if begin <= got.data_ptr() < begin + stored.nbytes():
                continue  # the file's own bytes
            copied += 1
            assert len(cuts[tensor].pieces) > 1 or any(p.stop - p.start < p.size for p in cuts[tensor].pieces), tensor
            assert got.untyped_storage().nbytes() == got.nbytes, tensor
    assert copied > 0  # 80 columns of the feed-forward layer are 24 per rank, the last one with 16 zeros


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_K, Kind.Q6_K])
@pytest.mark.parametrize("size", [2, 4])
def test_reads_gguf_by_rows_and_blocks(kind: Kind, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_family(TinyFamily("m", "LlamaConfig", {**WIDE, "attention_bias": True}), tmp_path)
    path = tmp_path / "m.gguf"
    write_gguf(tmp_path, path, kind)
    source = open_source(path)
    read = counted(monkeypatch)
    elements, bytes_ = gguf.GGML_QUANT_SIZES[kind]
    for rank in ranks_of(path, size):
        cut, cuts = cut_source(source, rank), rank_cuts(rank, source.shapes())
        for name, shape in expected_shapes(rank.local, source.shapes()).items():
            wanted = expected(source, rank, name)
            read.clear()
            assert torch.equal(cut.take(name), wanted), name
            if not read:
                assert len(shape) == 1 or kind in (Kind.F32, Kind.F16, Kind.BF16), name
                continue
            rows, columns = shape
            if name in cuts and cuts[name].axis == COLUMNS:
                (piece,) = cuts[name].pieces
                columns = (-(-piece.stop // elements) - piece.start // elements) * elements
            assert sum(read) == rows * columns // elements * bytes_, name


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each call that dequantises."""
    sizes: list[int] = []
    real = gguf.quants.dequantize

    def dequantize(data: Any, kind: Kind) -> Any:
        sizes.append(data.nbytes)
        return real(data, kind)

    monkeypatch.setattr(gguf.quants, "dequantize", dequantize)
    return sizes


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0])
@pytest.mark.parametrize(
    ("name", "config", "fields"),
    [
        ("mixtral", "MixtralConfig", {"num_local_experts": 3, "intermediate_size": 96, "num_attention_heads": 2}),
        ("phi3", "Phi3Config", {"intermediate_size": 96}),
        (
            "deepseek",
            "DeepseekV2Config",
            {
                "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 32, "qk_nope_head_dim": 32,
                "qk_rope_head_dim": 32, "v_head_dim": 32, "moe_intermediate_size": 32, "n_routed_experts": 4,
                "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_shared_experts": 1, "intermediate_size": 96,
                "topk_method": "greedy",
            },
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value.islower() else "",
)  # fmt: skip
def test_reads_a_ranks_part_of_stacks_fused_rows_and_ways_up(
    name: str, config: str, fields: dict[str, Any], kind: Kind, tmp_path: Path
) -> None:
    write_family(TinyFamily(name, config, fields), tmp_path)
    path = tmp_path / "m.gguf"
    write_gguf(tmp_path, path, kind)
    source = open_source(path)
    for rank in ranks_of(path, 2):
        cut = cut_source(source, rank)
        for tensor, shape in expected_shapes(rank.local, source.shapes()).items():
            got = cut.take(tensor)
            assert tuple(got.shape) == shape, tensor
            assert torch.equal(got, expected(source, rank, tensor)), tensor


def test_a_tied_head_is_a_ranks_rows_of_the_embedding(family_directory: Callable[[str], Path]) -> None:
    directory = family_directory("llama-biases")
    source = open_source(directory)
    assert HEAD not in source.shapes()
    heads = [cut_source(source, rank).take(HEAD) for rank in ranks_of(directory, 4)]
    assert torch.equal(torch.cat(heads), source.take(EMBEDDING))


def test_one_rank_reads_the_checkpoint_itself(family_directory: Callable[[str], Path]) -> None:
    (rank,) = ranks_of(family_directory("mistral"), 1)
    source = open_source(family_directory("mistral"))
    assert cut_source(source, rank) is source


def test_refuses_a_checkpoint_that_is_not_the_whole_models(family_directory: Callable[[str], Path]) -> None:
    directory = family_directory("mistral")
    (_, rank) = ranks_of(directory, 2)
    with pytest.raises(CheckpointError, match=r"has shape \[160, 64\]; config.json says \(80, 64\)"):
        cut_source(open_source(directory), RankSpec(rank.local, rank.shard, rank.local))
