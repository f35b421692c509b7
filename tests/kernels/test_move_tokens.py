"""Copies between blocks and contiguous buffers, in the interpreter: byte for byte the definition's."""

import pytest
import torch

from twostroke.kernels import reference_kv
from twostroke.kernels.gpu import move_tokens
from twostroke.kernels.reference import Planes


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = torch.empty
    monkeypatch.setattr(move_tokens.torch, "empty", lambda *a, **k: honest(*a, **k).fill_(0xEE))


def random_store(block_tokens: int, row_bytes: int, scaled: bool, seed: int = 0) -> Planes:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 5, 3, block_tokens, row_bytes)
    payload = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return Planes(payload, torch.randint(0, 256, shape[:4], generator=generator, dtype=torch.uint8) if scaled else None)


def assert_equal(ours: Planes, theirs: Planes) -> None:
    assert torch.equal(ours.payload, theirs.payload)
    assert (ours.scales is None) == (theirs.scales is None)
    if ours.scales is not None and theirs.scales is not None:
        assert torch.equal(ours.scales, theirs.scales)


@pytest.mark.parametrize(("block_tokens", "row_bytes", "scaled"), [(16, 64, True), (32, 30, True), (16, 128, False)])
@pytest.mark.parametrize(
    ("tokens", "heads"),
    [(range(32), range(3)), (range(15, 48), range(1, 3)), (range(7, 8), range(1)), (range(0), range(3))],
)
def test_moves_exactly_the_ranges(tokens: range, heads: range, block_tokens: int, row_bytes: int, scaled: bool) -> None:
    table = torch.tensor([4, 0, 3])
    store = random_store(block_tokens, row_bytes, scaled)
    part = move_tokens.gather_tokens(store, table, tokens, heads)
    assert_equal(part, reference_kv.gather_tokens(store, table, tokens, heads))
    ours, theirs = (random_store(block_tokens, row_bytes, scaled, seed=1) for _ in range(2))
    move_tokens.scatter_tokens(ours, table, tokens, heads, part)
    reference_kv.scatter_tokens(theirs, table, tokens, heads, part)
    assert_equal(ours, theirs)


def test_what_does_not_fit_is_refused_and_nothing_written() -> None:
    store, table = random_store(16, 64, True), torch.tensor([4, 0])
    before = store.payload.clone()
    part = move_tokens.gather_tokens(store, table, range(16), range(3))
    with pytest.raises(ValueError, match="does not lie in 2 blocks"):
        move_tokens.gather_tokens(store, table, range(20, 33), range(3))
    with pytest.raises(ValueError, match="does not lie in 3 heads"):
        move_tokens.gather_tokens(store, table, range(16), range(2, 4))
    with pytest.raises(ValueError, match="the ranges ask for"):
        move_tokens.scatter_tokens(store, table, range(15), range(3), part)
    with pytest.raises(ValueError, match="the ranges ask for"):
        move_tokens.scatter_tokens(store, table, range(16), range(3), Planes(part.payload, None))
    with pytest.raises(ValueError, match="int64"):
        move_tokens.gather_tokens(store, table.int(), range(16), range(3))
    assert torch.equal(store.payload, before)
