"""The same bits for the same prefix, however a prompt is cut, batched, cached, placed or threaded."""

import functools
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from twostroke.model.ops import products
from twostroke.model.ops.torch_attention import KV_TILE

SHAPE = {"heads": 4, "kv_heads": 2, "head_dim": 32, "layers": 2}
ONE_HEAD = {"heads": 1, "kv_heads": 1, "head_dim": 32, "hidden": 48, "layers": 1}
VOCAB = 160
SHARED = 48  # tokens that all prompts begin with


def prompt(seed: int, length: int) -> list[int]:
    shared = random.Random(0)
    own = random.Random(seed)
    return [(shared if i < SHARED else own).randrange(VOCAB) for i in range(length)]


class References:
    """Logits of a prompt in one piece, alone, on one thread: kept per prompt, longer ones answer for shorter."""

    def __init__(self, make_hand: Callable, directory: Path, one_head: bool) -> None:
        self.one_head = one_head
        self.make_hand = make_hand
        self.directory = directory
        self.known: dict[tuple[str, str, int], torch.Tensor] = {}

    def __call__(self, dtype: str, kv: str, seed: int) -> torch.Tensor:
        if (dtype, kv, seed) not in self.known:
            torch.set_num_threads(1)
            hand = self.make_hand(self.directory, dtype, kv, 16, 1024)
            (self.known[dtype, kv, seed],) = hand.logits([("only", 0, prompt(seed, 600))])
        return self.known[dtype, kv, seed]


@pytest.fixture(scope="module", params=[SHAPE, ONE_HEAD], ids=["gqa", "one-head"])
def references(request: pytest.FixtureRequest, write_tiny: Callable, make_hand: Callable) -> References:
    return References(make_hand, write_tiny(request.param), request.param is ONE_HEAD)


@settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # a failing schedule is small enough as it is; shrinking it takes minutes
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
@pytest.mark.parametrize("kv", ["fp8", "int8_channel", "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_depend_on_a_tokens_own_prefix_alone(
    references: References, dtype: str, kv: str, data: st.DataObject
) -> None:
    if references.one_head and kv != "fp8":
        pytest.skip("one head differs in shapes alone: one codec is enough")
    lengths = data.draw(st.lists(st.integers(1, 600), min_size=1, max_size=5))
    chooser = data.draw(st.randoms(use_true_random=False))
    block_tokens = data.draw(st.sampled_from([16, 32, 64]))
    expected = [references(dtype, kv, seed) for seed in range(len(lengths))]
    hand = references.make_hand(references.directory, dtype, kv, block_tokens, 8192)
    done = [0] * len(lengths)
    while any(done[i] < length for i, length in enumerate(lengths)):
        ready = [i for i, length in enumerate(lengths) if done[i] < length]
        chosen = chooser.sample(ready, chooser.randint(1, len(ready)))
        work = []
        for i in chosen:
            shared = SHARED // block_tokens * block_tokens
            if done[i] == 0 and shared and lengths[i] > shared and done[0] > SHARED and i and chooser.random() < 0.7:
                hand.share(str(i), "0", shared)  # a cached prefix
                done[i] = shared
            count = min(lengths[i] - done[i], chooser.choice([1, 1, 2, 7, 8, 9, 17, 64, 255, 257, 600]))
            work.append((str(i), done[i], prompt(i, lengths[i])[done[i] : done[i] + count]))
        for (_, start, ids), i, logits in zip(work, chosen, hand.logits(work), strict=True):
            assert torch.equal(bits(logits), bits(expected[i][start : start + len(ids)]))
            done[i] += len(ids)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_threads_give_the_bits_of_one(references: References, dtype: str) -> None:
    expected = [references(dtype, "fp8", seed) for seed in range(2)]
    torch.set_num_threads(2)
    hand = references.make_hand(references.directory, dtype, "fp8", 16, 2048)
    long, short = hand.logits([("long", 0, prompt(0, 420)), ("short", 0, prompt(1, 90))])
    assert torch.equal(bits(long), bits(expected[0][:420]))
    assert torch.equal(bits(short), bits(expected[1][:90]))
    (decoded,) = hand.logits([("short", 90, prompt(1, 91)[90:])])
    assert torch.equal(bits(decoded), bits(expected[1][90:91]))


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32)


@pytest.mark.parametrize("boundary", [KV_TILE, 2 * KV_TILE])  # from three tiles on, their order shows
def test_decoding_one_by_one_gives_the_bits_of_one_piece_across_a_tile_boundary(
    references: References, boundary: int
) -> None:
    # float32: rounding to bfloat16 would hide most of what another order changes.
    expected = references("float32", "fp8", 1)
    hand = references.make_hand(references.directory, "float32", "fp8", 16, 1024)
    ids = prompt(1, 600)
    start = boundary - 3
    hand.logits([("a", 0, ids[:start])])
    for position in range(start, boundary + 3):
        (logits,) = hand.logits([("a", position, ids[position : position + 1])])
        assert torch.equal(bits(logits[0]), bits(expected[position]))


@pytest.fixture
def proofs_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proofs are made once per process and shape: these are kept apart from those of other tests."""
    monkeypatch.setattr(products, "prove", functools.cache(products.prove.__wrapped__))


@pytest.mark.usefixtures("proofs_anew")
def test_a_form_whose_bits_differ_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.mm

    def mm(x: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        real(x, right, out=out)
        if x.shape[0] == 256:
            out[3, 0] = torch.nextafter(out[3, 0], torch.tensor(torch.inf))
        return out

    monkeypatch.setattr(products.torch, "mm", mm)
    row_steps, _ = products.prove(24, 40, torch.float32, True, 1)
    assert 256 not in row_steps


@pytest.mark.usefixtures("proofs_anew")
def test_a_machine_without_reproducible_tiles_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.mm

    def mm(x: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        real(x, right, out=out)
        out[5] = torch.nextafter(out[5], torch.tensor(torch.inf))  # a kernel that treats one row of a tile differently
        return out

    monkeypatch.setattr(products.torch, "mm", mm)
    with pytest.raises(products.ConfigError, match="not reproducible"):
        products.prove(24, 40, torch.float32, True, 1)


@pytest.mark.parametrize("rows", [16, 32, 48, 80, 336, 1376])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_any_size_are_put_together_from_tiles(rows: int, dtype: torch.dtype) -> None:
    product = products.Product(24, 40, dtype, transposed=True)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 24, generator=generator).to(dtype)
    right = torch.randn(40, 24, generator=generator).to(dtype).t()
    result = product.rows(x, right, torch.full((rows, 40), torch.nan, dtype=dtype))
    tiles = torch.cat([torch.mm(tile, right) for tile in x.split(16)])
    assert torch.equal(result, tiles)
    batch = product.batch(x.view(-1, 16, 24), right.t().expand(rows // 16, 40, 24).contiguous().transpose(1, 2))
    assert torch.equal(batch.flatten(0, 1), tiles)


def test_attention_ignores_whatever_lies_past_the_last_token(references: References) -> None:
    # The store of a hand is poisoned with NaN codes, so every finite logit shows it; here the poison changes between.
    first = references.make_hand(references.directory, "float32", "float32", 16, 1024)
    second = references.make_hand(references.directory, "float32", "float32", 16, 1024)
    for component in second.store.components:
        component.payload.random_(0, 255)
    ids = prompt(5, 300)
    for hand in (first, second):
        hand.logits([("a", 0, ids[:290])])
    a, b = (hand.logits([("a", 290, ids[290:])])[0] for hand in (first, second))
    assert torch.isfinite(a).all()
    assert torch.equal(bits(a), bits(b))
