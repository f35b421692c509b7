"""Quantised checkpoints: decoded as their formats' libraries decode them, and served as transformers computes them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoints.logits_oracle import assert_same_logits, oracle
from support.checkpoints.models import Hand
from support.checkpoints.quantised_checkpoints import NAMES, PLACE, as_fp8, as_mxfp4, digest, expected
from support.engines.thread_group import make_ranks

from twostroke.checkpoint.config_json import load_spec
from twostroke.checkpoint.quantised.matrices import AwqMatrix, GptqMatrix, PackedMatrix, ScaledMatrix, TableMatrix
from twostroke.checkpoint.quantised.plan import quantised_plan
from twostroke.checkpoint.shards import Shard, shard_spec
from twostroke.model.weights.quantised import decode
from twostroke.model.weights.quantised.numbers import floats, unpacked
from twostroke.model.weights.rank_source import cut_source
from twostroke.model.weights.tensors import open_source

DOWN = "model.layers.0.mlp.down_proj.weight"


def greedy(compute: Callable[[list[tuple[str, int, list[int]]]], list[torch.Tensor]], prompt: list[int]) -> list[int]:
    """Greedy tokens after a prompt, computed token by token over the cache."""
    (rows,) = compute([("a", 0, prompt)])
    found = [int(rows[-1].argmax())]
    while len(found) < 16:
        (rows,) = compute([("a", len(prompt) + len(found) - 1, [found[-1]])])
        found.append(int(rows[-1].argmax()))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_matrices_are_the_librarys_to_the_bit(name: str) -> None:
    source, wanted = open_source(PLACE / name), expected(name)
    assert len(wanted.digests) == 7
    for matrix, digest_ in wanted.digests.items():
        assert digest(source.take(matrix)) == digest_, (matrix, wanted.library)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_and_logits_are_those_of_transformers_over_the_librarys_matrices(
    name: str, make_hand: Callable[..., Hand]
) -> None:
    wanted, hand = expected(name), make_hand(PLACE / name)
    (rows,) = hand.logits([("b", 0, wanted.prompt)])
    theirs = torch.tensor(wanted.logits)
    assert (rows[-1] - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    assert greedy(hand.logits, wanted.prompt) == wanted.tokens


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_a_rank_decodes_its_part_of_each_matrix_to_the_same_numbers(name: str, size: int) -> None:
    """Parts begin and end inside blocks of scales and inside words: 96 columns over 4 ranks, groups of 32."""
    source, spec = open_source(PLACE / name), load_spec(PLACE / name)
    for at in range(size):
        rank = shard_spec(spec, Shard(at, size))
        part = cut_source(source, rank)
        down = source.take(DOWN)
        width = rank.shard.padded(96)
        assert torch.equal(part.take(DOWN)[:, : width.stop - width.start], down[:, width.start : width.stop])
    for axis, part_ in ((0, range(5, 31)), (1, range(7, 9)), (1, range(33, 33)), (0, range(63, 64))):
        whole = down.narrow(axis, part_.start, len(part_))
        assert torch.equal(source.take_part(DOWN, axis, part_), whole)


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_give_the_tokens_of_one(name: str) -> None:
    wanted = expected(name)
    assert greedy(make_ranks(PLACE / name, 2).logits, wanted.prompt) == wanted.tokens


def test_pieces_do_not_change_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        source = open_source(PLACE / name)
        whole = source.take(DOWN)
        monkeypatch.setattr(decode, "PIECE_NUMBERS", 200)
        assert torch.equal(source.take(DOWN), whole), name
        monkeypatch.undo()


@pytest.mark.parametrize("name", ["phi3", "mixtral", "qwen2-moe", "deepseek-v2", "gemma3"])
def test_a_family_in_fp8_is_the_family_of_its_dequantised_numbers(
    name: str, family_directory: Callable[[str], Path], make_hand: Callable[..., Hand], tmp_path: Path
) -> None:
    """Fused projections, experts, latents: scales per block of 16 x 32, and the router left as it is."""
    as_fp8(family_directory(name), tmp_path / "fp8", tmp_path / "float")
    ids = list(range(3, 40))
    (ours,) = make_hand(tmp_path / "fp8").logits([("a", 0, ids)])
    (floats_,) = make_hand(tmp_path / "float").logits([("a", 0, ids)])
    assert torch.equal(ours, floats_)
    plan = quantised_plan(tmp_path / "fp8")
    assert plan is not None
    assert len(plan.matrices) >= 8


def test_stacks_of_experts_in_mxfp4_are_what_transformers_decodes(
    family_directory: Callable[[str], Path], make_hand: Callable[..., Hand], tmp_path: Path
) -> None:
    as_mxfp4(family_directory("gpt-oss"), tmp_path / "mxfp4", tmp_path / "float")
    stacked, floats_ = open_source(tmp_path / "mxfp4"), open_source(tmp_path / "float")
    assert stacked.shapes() == floats_.shapes()
    for name in stacked.shapes():
        assert torch.equal(stacked.take(name), floats_.take(name)), name
    ids = list(range(3, 40))
    (ours,) = make_hand(tmp_path / "mxfp4").logits([("a", 0, ids)])
    (same,) = make_hand(tmp_path / "float").logits([("a", 0, ids)])
    assert torch.equal(ours, same)
    assert_same_logits(ours, oracle(tmp_path / "float")(ids))
    (split,) = make_ranks(tmp_path / "mxfp4", 2).logits([("a", 0, ids)])
    assert_same_logits(split, ours)
    assert any("54 matrices are stored quantised (mxfp4)" in remark for remark in load_spec(tmp_path / "mxfp4").remarks)
    gate = "model.layers.1.mlp.experts.4.up_proj.weight"
    for axis, part in ((0, range(5, 31)), (1, range(7, 9)), (1, range(33, 33)), (0, range(31, 32))):
        assert torch.equal(stacked.take_part(gate, axis, part), floats_.take_part(gate, axis, part))


def test_a_rank_decodes_its_part_of_a_stack_alone(
    family_directory: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_mxfp4(family_directory("gpt-oss"), tmp_path / "mxfp4", tmp_path / "float")
    source, spec, sizes = open_source(tmp_path / "mxfp4"), load_spec(tmp_path / "mxfp4"), []
    real = decode.looked_up

    def looked_up(table: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        sizes.append(indices.numel())
        return real(table, indices)

    monkeypatch.setattr(decode, "looked_up", looked_up)
    cut_source(source, shard_spec(spec, Shard(1, 2))).take("model.layers.0.mlp.experts.3.gate_proj.weight")
    assert sizes == [16 * 64]


def test_blocks_that_do_not_divide_a_matrix_end_with_it() -> None:
    """300 x 200 in blocks of 128 x 128, by the definition, number by number."""
    torch.manual_seed(3)
    numbers = torch.randn(300, 200).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 2)
    matrix = ScaledMatrix(300, 200, "w", "s", (128, 128))
    tensors = {"w": numbers, "s": scales}
    got = decode.Decoder(tensors.__getitem__).decode(matrix, range(100, 300), range(120, 200))
    for row, column in ((100, 120), (127, 127), (128, 127), (128, 128), (256, 199), (299, 120)):
        assert got[row - 100, column - 120] == numbers[row, column].float() * scales[row // 128, column // 128]


def test_every_byte_of_eight_bits_is_its_float() -> None:
    byte = torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu):
        assert torch.equal(floats(byte.view(dtype)).nan_to_num(), byte.view(dtype).float().nan_to_num())
    assert torch.equal(floats(byte, exponents=True).nan_to_num(), byte.view(torch.float8_e8m0fnu).float().nan_to_num())


@pytest.mark.parametrize("bits", range(1, 9))
def test_numbers_of_any_width_come_out_of_words(bits: int) -> None:
    """Packed one by one into one long integer per row, as the format is defined."""
    numbers = torch.randint(0, 1 << bits, (3, 64), generator=torch.Generator().manual_seed(bits))
    streams = [sum(int(n) << bits * at for at, n in enumerate(row)) for row in numbers]
    words = [[(stream >> 32 * at) & 0xFFFFFFFF for at in range(2 * bits)] for stream in streams]
    stored = torch.tensor(words, dtype=torch.int64).to(torch.int32)  # the same bits
    for part in (range(64), range(11, 53), range(31, 33), range(63, 64), range(5, 5)):
        assert torch.equal(unpacked(stored, bits, part).long(), numbers[:, part.start : part.stop])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptqs_first_version_stores_a_zero_point_of_zero_as_all_ones(bits: int) -> None:
    rows, columns = 32, 32
    ones = torch.full((1, rows * bits // 32), -1, dtype=torch.int32)
    words = torch.full((columns * bits // 32, rows), 1, dtype=torch.int32)  # the first number of each word is 1
    tensors = {"w": words, "z": ones, "s": torch.ones(1, rows)}
    matrix = GptqMatrix(rows, columns, "w", "s", "z", bits, columns, zero_offset=1)
    got = decode.Decoder(tensors.__getitem__).decode(matrix, range(rows), range(columns))
    assert torch.equal(got, ((torch.arange(columns) * bits % 32 == 0).float()).expand(rows, -1))


def test_a_stored_order_of_columns_says_each_columns_group() -> None:
    """compressed-tensors' act order; -1 everywhere stands for columns in order."""
    torch.manual_seed(5)
    tensors = {"w": torch.randint(-(2**31), 2**31 - 1, (3, 8), dtype=torch.int32), "s": torch.rand(3, 2)}
    tensors["g"] = torch.randint(0, 2, (64,), dtype=torch.int32)
    numbers = unpacked(tensors["w"], 4, range(64)).float() - 8
    matrix = PackedMatrix(3, 64, "w", "s", 4, 32, group_index="g")
    got = decode.Decoder(tensors.__getitem__).decode(matrix, range(1, 3), range(7, 50))
    assert torch.equal(got, (numbers * tensors["s"][:, tensors["g"].long()])[1:, 7:50])
    tensors["g"] = torch.full((64,), -1, dtype=torch.int32)
    got = decode.Decoder(tensors.__getitem__).decode(matrix, range(3), range(64))
    assert torch.equal(got, numbers * tensors["s"].repeat_interleave(32, 1))


def test_awq_without_zero_points_is_symmetric() -> None:
    words = torch.tensor([[0x76543210]], dtype=torch.int32)
    tensors = {"w": words, "s": torch.ones(1, 8)}
    got = decode.Decoder(tensors.__getitem__).decode(AwqMatrix(8, 1, "w", "s", None, 1), range(8), range(1))
    assert (got[:, 0] + 8).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]  # rows 0 2 4 6 1 3 5 7, from the lowest bits on


def test_a_table_of_odd_rows_is_read_from_the_middle_of_a_byte() -> None:
    rows, columns = 5, 7  # 35 numbers, the last byte half used
    indices = torch.arange(rows * columns) % 16
    pairs = torch.nn.functional.pad(indices, (0, 1)).reshape(-1, 2)
    tensors = {
        "w": (pairs[:, 0] * 16 + pairs[:, 1]).to(torch.uint8).reshape(-1, 1),
        "s": torch.ones(9),
        "t": torch.arange(16.0),
    }
    matrix = TableMatrix(rows, columns, "w", "s", "t", 4)
    got = decode.Decoder(tensors.__getitem__).decode(matrix, range(1, 4), range(2, 7))
    assert torch.equal(got, indices.float().reshape(rows, columns)[1:4, 2:7])
