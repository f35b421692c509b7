"""The recurrence of gated delta nets: the kernel against the definition, and its bits against cuts and threads."""

import pytest
import torch

from twostroke.checkpoint.spec import DeltaNet
from twostroke.core.errors import ConfigError
from twostroke.kv.store.states import LayerStates
from twostroke.model.loader import make_ops
from twostroke.model.ops.delta import DeltaJob, DeltaParts, delta, softplus, tree_sum
from twostroke.model.ops.delta_spans import DeltaSpans, StateSpan
from twostroke.model.ops.native_ops import NativeOps

PLACES = 12


def native(num_threads: int = 1) -> NativeOps:
    try:
        ops = make_ops(torch.float32, num_threads=num_threads, kernels="native")
    except ConfigError as error:
        pytest.skip(str(error))
    assert isinstance(ops, NativeOps)
    return ops


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def case(shape: DeltaNet, rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, DeltaParts]:
    parts = DeltaParts(
        random(shape.num_taps, shape.conv_width, seed=1),
        -random(shape.num_value_heads, seed=2).exp(),
        random(shape.num_value_heads, seed=3),
    )
    return random(rows, shape.conv_width, seed=4).to(dtype), random(rows, 2 * shape.num_value_heads, seed=5), parts


def states(shape: DeltaNet) -> LayerStates:
    """Place 0 zeros, places 1 and 2 of some sequences, the others not a number."""
    convs = random(PLACES, shape.num_taps - 1, shape.conv_width, seed=6)
    memories = random(PLACES, shape.num_value_heads, shape.key_width, shape.value_width, seed=7)
    for tensor in (convs, memories):
        tensor[0], tensor[3:] = 0.0, torch.nan
    return LayerStates(convs, memories)


SHAPES = [DeltaNet(1, 1, 1, 1, 2), DeltaNet(2, 6, 12, 8, 4), DeltaNet(3, 3, 15, 17, 3), DeltaNet(2, 4, 64, 33, 4)]
SPANS = [
    StateSpan(row=0, num_rows=17, source=1, target=3, marks=((1, 4), (16, 5))),
    StateSpan(row=17, num_rows=1, source=0, target=6, marks=()),
    StateSpan(row=18, num_rows=5, source=2, target=7, marks=((4, 8),)),
]
ROWS = 25  # two of them are padding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_agrees_with_the_definition(shape: DeltaNet, dtype: torch.dtype) -> None:
    x, rates, parts = case(shape, ROWS, dtype)
    spans = DeltaSpans.of(SPANS, ROWS, torch.device("cpu"))
    ours, theirs = states(shape), states(shape)
    read = native().delta(x, DeltaJob(rates, parts, shape, spans, ours))
    expected = delta(x, DeltaJob(rates, parts, shape, spans, theirs))
    close = 1e-5 if dtype is torch.float32 else 2**-6
    torch.testing.assert_close(read, expected, rtol=close, atol=close)
    assert not read[23:].any()
    written = range(3, 9)
    torch.testing.assert_close(ours.memories[written], theirs.memories[written], rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.convs[written], theirs.convs[written])
    assert ours.memories[9:].isnan().all()


@pytest.mark.parametrize("kernels", ["definition", "kernel"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_sequence_in_pieces_beside_others_has_the_bits_of_one_piece(shape: DeltaNet, kernels: str) -> None:
    x, rates, parts = case(shape, 23, torch.float32)
    run = delta if kernels == "definition" else native().delta
    whole = states(shape)
    spans = DeltaSpans.of([StateSpan(0, 23, 1, 3, ((9, 4),))], 23, torch.device("cpu"))
    expected = run(x, DeltaJob(rates, parts, shape, spans, whole))
    pieces = states(shape)
    start, source = 0, 1
    for place, count in enumerate((1, 8, 2, 12), 5):
        rows = slice(start, start + count)
        beside = torch.cat((random(3, shape.conv_width, seed=9), x[rows]))
        job = DeltaJob(
            torch.cat((random(3, 2 * shape.num_value_heads, seed=9), rates[rows])),
            parts,
            shape,
            DeltaSpans.of(
                [StateSpan(0, 3, 2, 10, ()), StateSpan(3, count, source, place, ())], count + 3, torch.device("cpu")
            ),
            pieces,
        )
        assert torch.equal(run(beside, job)[3:], expected[rows])
        start, source = start + count, place
    for ours, theirs in zip(pieces, whole, strict=True):
        assert torch.equal(ours[8], theirs[3])
        assert torch.equal(ours[6], theirs[4])  # after nine tokens


def test_two_threads_give_the_bits_of_one() -> None:
    shape = SHAPES[3]
    x, rates, parts = case(shape, ROWS, torch.float32)
    results = []
    for num_threads in (1, 2):
        mine = states(shape)
        spans = DeltaSpans.of(SPANS, ROWS, torch.device("cpu"))
        results.append((native(num_threads).delta(x, DeltaJob(rates, parts, shape, spans, mine)), mine.memories[3:9]))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_softplus_is_exact_to_a_unit_and_the_same_at_every_place() -> None:
    x = torch.linspace(-90, 90, 20_001)
    torch.testing.assert_close(softplus(x), torch.nn.functional.softplus(x.double()).float(), rtol=1e-6, atol=0)
    assert all(torch.equal(softplus(x[i:]), softplus(x)[i:]) for i in (1, 3, 7))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 12, 128])
def test_a_sum_has_the_same_bits_in_any_shape(size: int) -> None:
    x = random(size, 37, seed=size)
    assert torch.equal(tree_sum(x, 0)[5:6], tree_sum(x[:, 5:6].contiguous(), 0))
    torch.testing.assert_close(tree_sum(x, 0), x.double().sum(0).float(), rtol=1e-5, atol=1e-5)
