"""Quantised checkpoints: decoded as their formats' libraries decode them, and served as transformers computes them."""

from collections.abc import Callable

import pytest
import torch
from support.models import Hand
from support.quantised_checkpoints import NAMES, PLACE, digest, expected
from support.thread_group import make_ranks

from twostroke.checkpoint.config_json import load_spec
from twostroke.checkpoint.shards import Shard, shard_spec
from twostroke.model.weights.quantised import decode
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
