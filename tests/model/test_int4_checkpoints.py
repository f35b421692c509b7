"""Checkpoints of 4-bit groups: their matrices stay as stored, give the decoded numbers, and take the planned memory."""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from support.checkpoints.gguf_files import write_gguf
from support.checkpoints.models import Hand
from support.checkpoints.quantised_checkpoints import PLACE, expected
from support.checkpoints.tiny_families import TinyFamily, write_family

from twostroke.checkpoint.config import ModelConfig
from twostroke.checkpoint.config_json import load_spec
from twostroke.checkpoint.gguf.file import StoredTensor
from twostroke.checkpoint.gguf.names import Piece
from twostroke.checkpoint.int4 import GGUF_Q4_0, int4_bytes, int4_matrices, is_gguf_int4
from twostroke.checkpoint.layout import HEAD, layer_layout, weight_bytes
from twostroke.checkpoint.quantised.matrices import AwqMatrix, GptqMatrix, PackedMatrix, ScaledMatrix, StoredMatrix
from twostroke.checkpoint.sizes import held_bytes
from twostroke.kernels.cpu.build import NativeUnavailable
from twostroke.kernels.cpu.library import INT4 as INT4_KIND
from twostroke.model.ops.int4 import decoded
from twostroke.model.ops.native_ops import NativeOps
from twostroke.model.weights.quantised import int4
from twostroke.model.weights.quantised.decode import Decoder
from twostroke.model.weights.quantised.int4 import read_int4
from twostroke.model.weights.tensors import Int4Source, open_source
from twostroke.model.weights.weights import load_weights

INT4 = ["awq", "gptq-first", "gptq-second", "compressed-w4a16", "auto-round-gptq", "auto-round-own"]
OTHERS = ["fp8-block32", "compressed-float", "bitsandbytes-nf4", "modelopt-mixed"]


@pytest.fixture(scope="module")
def native() -> NativeOps:
    try:
        return NativeOps(torch.float32, 2)
    except NativeUnavailable as error:
        pytest.skip(str(error))


def taken(path: Path) -> dict[str, torch.Tensor]:
    """All matrices of a checkpoint that stay in 4-bit groups, by their definition."""
    source = open_source(path)
    assert isinstance(source, Int4Source)
    found = {name: source.take_int4(name) for name, shape in source.shapes().items() if len(shape) == 2}
    return {name: decoded(matrix) for name, matrix in found.items() if matrix is not None}


@pytest.mark.parametrize("name", INT4)
def test_matrices_as_stored_are_the_decoded_ones(name: str) -> None:
    matrices, source = taken(PLACE / name), open_source(PLACE / name)
    assert set(matrices) == set(int4_matrices(PLACE / name))
    assert matrices
    for matrix, numbers in matrices.items():
        assert torch.equal(numbers, source.take(matrix)), matrix


@pytest.mark.parametrize("name", OTHERS)
def test_matrices_of_other_forms_are_decoded(name: str) -> None:
    assert not int4_matrices(PLACE / name)
    assert not taken(PLACE / name)


FAMILIES = {
    "llama": TinyFamily("llama", "LlamaConfig", {"attention_bias": True}),  # GGUF has an order of its own for its heads
    "qwen2": TinyFamily("qwen2", "Qwen2Config", {"tie_word_embeddings": True}),
    "mixtral": TinyFamily("mixtral", "MixtralConfig", {"num_local_experts": 3}),
    "gemma2": TinyFamily("gemma2", "Gemma2Config", {"query_pre_attn_scalar": 24, "head_dim": 24}),
}


def write_q4_0(name: str, path: Path) -> None:
    """A tiny family with rows of whole blocks of 32 numbers."""
    family = FAMILIES[name]
    more = {"intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
    write_family(replace(family, fields=family.fields | more), path.parent)
    write_gguf(path.parent, path, Kind.Q4_0)


@pytest.mark.parametrize("name", FAMILIES)
def test_gguf_q4_0_stays_as_stored(name: str, make_hand: Callable[..., Hand], tmp_path: Path) -> None:
    """Rows in an order of their own, stacks of experts, biases, tied heads."""
    path = tmp_path / "q4_0.gguf"
    write_q4_0(name, path)
    matrices, source = taken(path), open_source(path)
    assert set(matrices) == set(int4_matrices(path))
    assert len(matrices) > 8
    for matrix, numbers in matrices.items():
        assert torch.equal(numbers, source.take(matrix)), matrix
    assert close_to_torch(path, make_hand)


def test_other_types_of_gguf_are_decoded(tmp_path: Path) -> None:
    write_family(FAMILIES["llama"], tmp_path)
    write_gguf(tmp_path, tmp_path / "m.gguf", Kind.F16)
    assert not int4_matrices(tmp_path / "m.gguf")
    assert not taken(tmp_path / "m.gguf")


def close_to_torch(path: Path, make_hand: Callable[..., Hand]) -> bool:
    """Whether logits in float32 are those of torch over the decoded matrices."""
    ids = list(range(3, 40))
    (ours,) = make_hand(path, kernels="native").logits([("a", 0, ids)])
    (theirs,) = make_hand(path).logits([("a", 0, ids)])
    return bool((ours - theirs).abs().max() <= 1e-4 * theirs.abs().max())


@pytest.mark.parametrize("name", INT4)
def test_logits_are_those_of_the_decoded_model(name: str, make_hand: Callable[..., Hand]) -> None:
    assert close_to_torch(PLACE / name, make_hand)


@pytest.mark.parametrize("name", INT4)
def test_the_plan_counts_matrices_as_they_are_held(name: str, native: NativeOps) -> None:
    path, model = PLACE / name, ModelConfig(dtype="float32")
    spec = load_spec(path)
    weights = load_weights(open_source(path), spec, native)
    held = [part for layer in weights.layers for part in (layer.attention, layer.ffn)]
    linears = [value for part in held for value in part_values(part)]
    memory = weights.embedding.nbytes + weights.head.num_bytes + sum(linear.num_bytes for linear in linears)
    planned = held_bytes(path, spec, model, "native")
    assert 0.9 * planned <= memory <= planned
    stay = int4_matrices(path)
    whole = [all(name + ".weight" in stay for name, _ in m.parts) for m in layer_layout(spec, 0, ()).matrices.values()]
    assert [linear.matrix.kind == INT4_KIND for linear in linears] == whole
    assert any(whole)
    for other in (held_bytes(path, spec, model, "torch"), held_bytes(path, spec, model, "native", part=True)):
        assert planned < other
    rounded = ModelConfig(dtype="float32", quantization="int8")
    assert held_bytes(path, spec, rounded, "native") == held_bytes(path, spec, rounded, "native", part=True)


def part_values(part: object) -> list:  # type: ignore[type-arg]
    return [value for field in dataclasses.fields(part) if hasattr(value := getattr(part, field.name), "num_bytes")]  # type: ignore[arg-type]


def test_a_tied_head_of_q4_0_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "q4_0.gguf"
    write_q4_0("gemma2", path)
    spec = load_spec(path)
    assert spec.tied_embeddings
    saved = held_bytes(path, spec, ModelConfig(), "native", part=True) - held_bytes(path, spec, ModelConfig(), "native")
    matrices = {name: count for name, count in int4_matrices(path).items() if name != HEAD}  # the table is the head
    numbers = sum(rows * columns for name, (rows, columns) in shapes(path, matrices).items())
    assert saved == 2 * numbers - sum(matrices.values())


def test_only_whole_matrices_that_are_packed_as_such_save_memory(family_directory: Callable[[str], Path]) -> None:
    def bytes_with(name: str, *stay: str) -> int:
        return weight_bytes(load_spec(family_directory(name)), "bfloat16", as_stored=dict.fromkeys(stay, 1))

    at = "model.layers.1."
    for name, inside in (
        ("llama-biases", "self_attn.q_proj"),  # joined with keys and values, which do not stay
        ("deepseek-v2", "self_attn.kv_b_proj"),  # taken apart
        ("deepseek-v2", "mlp.gate"),  # exact
    ):
        assert bytes_with(name, f"{at}{inside}.weight") == bytes_with(name), inside
    output = "self_attn.o_proj"
    assert bytes_with("llama-biases", f"{at}{output}.weight") < bytes_with("llama-biases")


def shapes(path: Path, names: object) -> dict[str, tuple[int, int]]:
    return {name: shape for name, shape in open_source(path).shapes().items() if name in names}  # type: ignore[operator, misc]


@pytest.mark.parametrize(
    ("matrix", "stays"),
    [
        (PackedMatrix(64, 256, "w", "s", 4, 128, scale_bytes=2), 64 * (128 + 2 * 2 + 4)),
        (PackedMatrix(64, 256, "w", "s", 4, 32, "z", scale_bytes=2), 64 * (128 + 8 * 3 + 4)),
        (PackedMatrix(64, 256, "w", "s", 4, 256), 64 * (128 + 4 + 4)),
        (GptqMatrix(64, 256, "w", "s", "z", 4, 128, 1, "g", 2), 64 * (128 + 2 * 3 + 4) + 4 * 256),
        (AwqMatrix(64, 256, "w", "s", "z", 64, 2), 64 * (128 + 4 * 3 + 4)),
        (AwqMatrix(64, 256, "w", "s", None, 64, 2), 64 * (128 + 4 * 2 + 4)),
        (PackedMatrix(64, 256, "w", "s", 8, 128), None),  # bits
        (GptqMatrix(64, 256, "w", "s", "z", 3, 128, 1), None),
        (PackedMatrix(64, 250, "w", "s", 4, 128), None),  # an incomplete group
        (PackedMatrix(64, 252, "w", "s", 4, 12), None),  # a group that is no multiple of eight
        (ScaledMatrix(64, 256, "w", "s", (1, 256)), None),
    ],
)
def test_4_bits_in_whole_groups_of_eights_stay(matrix: StoredMatrix, stays: int | None) -> None:
    assert int4_bytes(matrix) == stays
    if stays is None:
        assert read_int4({}.__getitem__, matrix) is None  # nothing is read


def gptq(index: torch.Tensor, group: int) -> tuple[GptqMatrix, dict[str, torch.Tensor]]:
    """A matrix of random numbers whose columns belong to the groups in `index`."""
    columns, rows = len(index), 24
    generator = torch.Generator().manual_seed(3)

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, generator=generator)

    groups = columns // group
    tensors = {"w": words(columns // 8, rows), "z": words(groups, rows // 8), "g": index.int()}
    tensors["s"] = torch.rand(groups, rows, generator=generator).half()
    return GptqMatrix(rows, columns, "w", "s", "z", 4, group, 1, "g", 2), tensors


def test_act_order_brings_the_columns_of_a_group_together() -> None:
    index = torch.arange(96) // 32
    shuffled = index[torch.randperm(96, generator=torch.Generator().manual_seed(1))]
    for wanted_order, groups_of in ((False, index), (True, shuffled), (False, torch.full((96,), -1))):
        matrix, tensors = gptq(groups_of, 32)
        found = read_int4(tensors.__getitem__, matrix)
        assert found is not None
        assert (found.order is not None) == wanted_order
        whole = Decoder(tensors.__getitem__).decode(matrix, range(24), range(96))
        assert torch.equal(decoded(found), whole)


def test_matrices_are_read_in_pieces_of_any_height(monkeypatch: pytest.MonkeyPatch) -> None:
    index = (torch.arange(96) // 32)[torch.randperm(96, generator=torch.Generator().manual_seed(1))]
    of_gptq = gptq(index, 32)
    tensors = of_gptq[1]
    awq = {"w": tensors["w"].reshape(96, 3), "z": tensors["z"], "s": tensors["s"]}
    for matrix, stored in (of_gptq, (AwqMatrix(24, 96, "w", "s", "z", 32, 2), awq)):
        whole = Decoder(stored.__getitem__).decode(matrix, range(24), range(96))
        for height in (1, 5, 8, 20, 24):
            monkeypatch.setattr(int4, "PIECE_NUMBERS", 96 * height)
            found = read_int4(stored.__getitem__, matrix)
            assert found is not None
            assert torch.equal(decoded(found), whole), height


def test_what_a_gguf_file_stores_in_two_parts_is_decoded() -> None:
    stored = StoredTensor((4, 64, 64), GGUF_Q4_0, 0)
    whole = Piece("blk.0.attn_k_b.weight", (512, 64))
    parts = replace(whole, value_part="blk.0.attn_v_b.weight")
    assert [is_gguf_int4(piece, stored) for piece in (whole, parts)] == [True, False]


def test_groups_of_unlike_sizes_are_decoded() -> None:
    matrix, tensors = gptq(torch.cat((torch.zeros(40), torch.ones(24), torch.full((32,), 2.0))), 32)
    assert read_int4(tensors.__getitem__, matrix) is None


def test_a_matrix_of_parts_that_differ_is_decoded_and_told(
    native: NativeOps, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = PLACE / "awq"
    source, spec = open_source(path), load_spec(path)
    assert isinstance(source, Int4Source)
    take = source.take_int4

    def other_order(name: str) -> object:
        found = take(name)
        if found is None or "k_proj" not in name:
            return found
        return replace(found, order=torch.arange(found.columns).int())

    monkeypatch.setattr(source, "take_int4", other_order)
    with caplog.at_level(logging.WARNING):
        weights = load_weights(source, spec, native)
    assert "unlike groups or orders" in caplog.text
    assert "k_proj" in caplog.text
    attention = weights.layers[0].attention
    assert attention.output.matrix.kind == INT4_KIND  # type: ignore[union-attr]
    assert attention.qkv.matrix.kind != INT4_KIND  # type: ignore[union-attr]


@pytest.mark.parametrize("name", INT4)
def test_in_bfloat16_only_rows_are_rounded(name: str, make_hand: Callable[..., Hand]) -> None:
    ids = list(range(3, 60))
    (exact,) = make_hand(PLACE / name).logits([("a", 0, ids)])
    (ours,) = make_hand(PLACE / name, "bfloat16", kernels="native").logits([("a", 0, ids)])
    assert (ours - exact).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize("name", INT4)
def test_tokens_are_those_of_transformers(name: str, make_hand: Callable[..., Hand]) -> None:
    wanted, hand = expected(name), make_hand(PLACE / name, kernels="native")
    (rows,) = hand.logits([("a", 0, wanted.prompt)])
    found = [int(rows[-1].argmax())]
    while len(found) < len(wanted.tokens):
        (rows,) = hand.logits([("a", len(wanted.prompt) + len(found) - 1, [found[-1]])])
        found.append(int(rows[-1].argmax()))
    assert found == wanted.tokens
