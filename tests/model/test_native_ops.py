"""Our CPU kernels give the answers of the torch ops, to rounding, and bits that depend on a row alone."""

from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
import torch
from support.engines.native_cache import BLOCK, NUM_BLOCKS, Cache, planes
from support.session.older_machines import PLAYED, library_for

from twostroke.kernels.cpu import library as native
from twostroke.kernels.cpu.build import NativeUnavailable, build
from twostroke.model.ops.extremes import Extremes, extremes
from twostroke.model.ops.int8 import rows_to_int8, to_int8
from twostroke.model.ops.native_ops import NativeOps
from twostroke.model.ops.seam import Activation, AttentionKind, Norm, Quantization, Span
from twostroke.model.ops.torch_ops import TorchOps
from twostroke.model.sampling.noise import F32 as Floats

F32, BF16 = torch.float32, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
TILES = ("-march=native", "-DTWOSTROKE_EMULATE_TILES")


@pytest.fixture(autouse=True)
def _one_seed() -> Iterator[None]:
    torch.manual_seed(11)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def native_ops(dtype: torch.dtype, threads: int = 1, quantization: Quantization = "none") -> NativeOps:
    try:
        return NativeOps(dtype, threads, quantization)
    except NativeUnavailable as error:
        pytest.skip(str(error))


def close(got: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype, roundings: int = 1) -> None:
    """Equal to a few units in the last place of the compute dtype per rounding, at the size of the largest number."""
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    unit = 2.0**-19 if dtype == F32 else 2.0**-7
    worst = (got.double() - wanted.double()).abs().max().item()
    assert worst <= roundings * unit * wanted.double().abs().max().item(), worst


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit by bit, but for which NaN a NaN is."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def padded(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((x, x.new_zeros(-len(x) % 16, *x.shape[1:])))


@DTYPES
@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("inner", [64, 70])
def test_linear_is_the_definition_for_every_number_of_rows(
    dtype: torch.dtype, quantization: Quantization, inner: int
) -> None:
    matrix, bias = torch.randn(90, inner), torch.randn(90)
    ours, torchs = native_ops(dtype, 2, quantization), TorchOps(dtype, 1, quantization)
    packed, theirs = ours.pack(matrix, bias), torchs.pack(matrix, bias)
    for rows in (1, 2, 3, 5, 7, 8, 11, 12, 13, 16, 17, 25, 60):
        x = torch.randn(rows, inner).to(dtype)
        close(ours.linear(x, packed), torchs.linear(padded(x), theirs)[:rows], dtype)


def test_an_exact_linear_is_neither_quantised_nor_rounded() -> None:
    ours = native_ops(BF16, 1, "int8")
    matrix, x = torch.randn(9, 64), torch.randn(5, 64).to(BF16)
    close(ours.linear(x, ours.pack(matrix, exact=True)), x.float() @ matrix.t(), F32)


def weights_with_odd_ones(columns: int, inner: int, num_odd: int) -> torch.Tensor:
    """bfloat16 like a model's, and some of every other size: zeros, subnormals, huge, not finite; of both signs."""
    generator = torch.Generator().manual_seed(inner)
    matrix = (torch.randn(columns, inner, generator=generator) * 0.02).to(BF16)
    bits = matrix.view(torch.int16)
    for column in range(columns):
        places = torch.randperm(inner, generator=generator)[:num_odd]
        exponents = torch.randint(0, 256, (num_odd,), generator=generator) << 7
        odd = exponents | torch.randint(0, 128, (num_odd,), generator=generator)
        bits[column, places] = (odd - 0x8000 * torch.randint(0, 2, (num_odd,), generator=generator)).to(torch.int16)
    matrix[0, :5] = torch.tensor([0.0, -0.0, 1e-40, float("inf"), float("nan")]).to(BF16)
    return matrix


def decodes(ops: NativeOps) -> bool:
    """Whether the machine has the instructions that decode twelve bits."""
    return ops._library.level() != b"plain"


def as_bits(x: torch.Tensor) -> torch.Tensor:
    """Integers that are equal where numbers are, all kinds of NaN being one."""
    return torch.where(x.isnan(), torch.full_like(x, float("nan")), x).view(torch.int32)


@pytest.mark.parametrize(("inner", "num_odd"), [(8, 0), (264, 0), (2048, 1)])
@pytest.mark.parametrize("gated", [False, True])
def test_bfloat16_in_twelve_bits_gives_every_bit_of_sixteen(
    inner: int, num_odd: int, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = native_ops(BF16, 2)
    matrix, bias = weights_with_odd_ones(88, inner, num_odd), torch.randn(88)
    coded = ops.pack(matrix, bias, gated=gated, wide=True)
    monkeypatch.setattr(ops._library, "coded_panel_bytes", lambda *_: 0)
    plain = ops.pack(matrix, bias, gated=gated, wide=True)
    assert coded.matrix.kind == (native.CODED if decodes(ops) else native.BFLOAT16)
    assert plain.matrix.kind == native.BFLOAT16
    for rows in (1, 2, 3, 5, 8, 11, 16, 17, 29, 63, 64, 100):
        x = torch.randn(rows, inner).to(BF16)
        answers = [ops.gated_linear(x, packed, "silu") if gated else ops.linear(x, packed) for packed in (coded, plain)]
        assert torch.equal(*map(as_bits, answers)), rows


def test_weights_that_twelve_bits_would_not_pay_for_keep_sixteen() -> None:
    ops = native_ops(BF16)
    if not decodes(ops):
        pytest.skip("this machine does not decode")
    like_a_model = torch.randn(320, 1024) * 0.02
    assert ops.pack(like_a_model).num_bytes < 0.76 * 2 * like_a_model.numel()
    any_size = torch.randn(320, 1024) * torch.logspace(-20, 20, 1024)  # neighbours in k share no size
    one_wild_panel = like_a_model.clone()
    one_wild_panel[100] = any_size[100]
    for matrix in (any_size, one_wild_panel, torch.randn(320, 1028), weights_with_odd_ones(48, 1024, 30)):
        packed = ops.pack(matrix)
        assert packed.matrix.kind == native.BFLOAT16
        assert packed.num_bytes == 2 * matrix.numel()


ROWS_OF_8_BITS = (1, 2, 5, 8, 12, 13, 16, 17, 24, 25, 60)


def int8_answers(inner: int) -> list[torch.Tensor]:
    """Float32 answers of 8-bit weights to bfloat16 rows of all sizes of number, for every number of rows."""
    generator = torch.Generator().manual_seed(inner)
    ops = native_ops(BF16, 2, "int8")
    packed = ops.pack(torch.randn(90, inner, generator=generator), torch.randn(90, generator=generator), wide=True)
    x = torch.randn(60, inner, generator=generator) * torch.logspace(-20, 6, 60).unsqueeze(1)
    x[3], x[7], x[9, -1] = 0.0, 1e-38, 1e4
    return [ops.linear(x[:rows].to(BF16).contiguous(), packed) for rows in ROWS_OF_8_BITS]


@pytest.mark.parametrize("inner", [4, 63, 64, 200, 1027])
def test_rows_of_8_bits_meet_weights_as_integers(inner: int) -> None:
    generator = torch.Generator().manual_seed(inner)
    weights, step = to_int8(torch.randn(90, inner, generator=generator))
    bias = torch.randn(90, generator=generator)
    x = torch.randn(60, inner, generator=generator) * torch.logspace(-20, 6, 60).unsqueeze(1)
    x[3], x[7], x[9, -1] = 0.0, 1e-38, 1e4
    numbers, scale = rows_to_int8(x.to(BF16))
    wide = torch.nn.functional.pad(weights.double(), (0, -inner % 64)).unflatten(1, (-1, 64))
    sums = torch.einsum("rgk,cgk,rg->rc", numbers.double(), wide, scale.double())
    sizes = torch.einsum("rgk,cgk,rg->rc", numbers.double().abs(), wide.abs(), scale.double())
    for rows, got in zip(ROWS_OF_8_BITS, int8_answers(inner), strict=True):
        wanted = sums[:rows] * step.double() + bias.double()
        allowed = 2.0**-20 * (sizes[:rows] * step.double() + bias.double().abs())
        assert ((got.double() - wanted).abs() <= allowed).all(), rows


def test_what_is_not_finite_in_a_row_of_8_bits_makes_all_of_its_answer_so_and_no_other() -> None:
    ops = native_ops(BF16, 2, "int8")
    packed = ops.pack(torch.randn(40, 200))
    for odd in (float("nan"), float("inf"), float("-inf")):
        x = torch.randn(20, 200).to(BF16)
        clean = ops.linear(x, packed)
        x[5, 150] = odd
        got = ops.linear(x, packed)
        assert got[5].isnan().all()
        assert torch.equal(got[:5], clean[:5])
        assert torch.equal(got[6:], clean[6:])


@pytest.mark.parametrize("quantization", ["none", "int8"])
@DTYPES
def test_a_row_of_a_linear_has_the_same_bits_in_any_company_and_with_any_threads(
    dtype: torch.dtype, quantization: Quantization
) -> None:
    one, two = native_ops(dtype, 1, quantization), native_ops(dtype, 2, quantization)
    matrix = torch.randn(200, 96)
    alone, shared = one.pack(matrix), two.pack(matrix)
    x = torch.randn(70, 96).to(dtype)
    whole = two.linear(x, shared)
    for first in (0, 1, 12, 15, 40, 69):
        for count in (1, 2, 5, 16, 17):
            part = one.linear(x[first : first + count].contiguous(), alone)
            assert torch.equal(part, whole[first : first + count]), (first, count)


@DTYPES
@pytest.mark.parametrize("width", [64, 72, 20])
def test_norms_are_the_definition(dtype: torch.dtype, width: int) -> None:
    ours, torchs = native_ops(dtype), TorchOps(dtype)
    norm = Norm(torch.rand(width) + 0.5, 1e-5)
    x, delta = torch.randn(19, width).to(dtype), torch.randn(19, width).to(dtype)
    close(ours.rms_norm(x, norm), torchs.rms_norm(x, norm), dtype)
    wanted = torchs.add_rms_norm(x.clone(), delta, norm)
    for got, want in zip(ours.add_rms_norm(x.clone(), delta, norm), wanted, strict=True):
        close(got, want, dtype)
    heads = torch.randn(7, 5, width).to(dtype)[:, 1:4]  # a view with wider rows
    close(ours.rms_norm(heads, norm), torchs.rms_norm(heads, norm), dtype)


@DTYPES
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("half", [32, 12])
def test_rotation_is_the_definition(dtype: torch.dtype, interleaved: bool, half: int) -> None:
    angles = torch.randn(6, half)
    x = torch.randn(6, 9, 64).to(dtype)
    wanted = TorchOps(dtype).rotary(x[:, 2:7], angles.cos(), angles.sin(), interleaved=interleaved)
    got = native_ops(dtype).rotary(x.clone()[:, 2:7], angles.cos(), angles.sin(), interleaved=interleaved)
    close(got.contiguous(), wanted, dtype)


@DTYPES
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "clamped_swiglu"])
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_gates_are_the_definition(dtype: torch.dtype, activation: Activation, quantization: Quantization) -> None:
    matrix, bias = torch.randn(2 * 70, 64), torch.randn(2 * 70)
    ours, torchs = native_ops(dtype, 2, quantization), TorchOps(dtype, 1, quantization)
    packed, theirs = ours.pack(matrix, bias, gated=True), torchs.pack(matrix, bias, gated=True)
    assert packed.num_bytes < 1.3 * theirs.num_bytes
    # torch rounds a product before it adds the bias, and a clamped answer does not have the product's size.
    roundings = 8 if activation == "clamped_swiglu" else 3
    for rows in (1, 2, 7, 12, 14, 16, 17, 40):
        x = (torch.randn(rows, 64) * torch.logspace(-4, 1, rows).unsqueeze(1)).to(dtype)
        got = ours.gated_linear(x, packed, activation)
        close(got, torchs.gated_linear(padded(x), theirs, activation)[:rows], dtype, roundings)
        for row in range(0, rows, 5):
            assert torch.equal(got[row], ours.gated_linear(x[row : row + 1].contiguous(), packed, activation)[0])


@DTYPES
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("rows", [1, 40])
def test_gates_of_every_size_are_the_definition(dtype: torch.dtype, activation: Activation, rows: int) -> None:
    gates = torch.logspace(-20, 20, 31 * rows, dtype=torch.float64).view(rows, 31)
    x = torch.cat((torch.ones(rows, 2), gates, -gates), dim=1).to(dtype)
    up = torch.zeros(64, 64)
    up[:, 0] = 1.0
    ops = native_ops(dtype)
    got = ops.gated_linear(x, ops.pack(torch.cat((torch.eye(64), up)), gated=True), activation).double()
    gate = x.double()
    inner = gate if activation == "silu" else 2 * (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    wanted = gate * torch.sigmoid(inner)
    # What a gate lets through of the least that a float32 can be is as good as nothing.
    allowed = wanted.abs() * (2.0**-8 if dtype == BF16 else 2.0**-15) + gate.abs() * 2.0**-120
    assert ((got - wanted).abs() <= allowed).all(), (gate, got, wanted)


@DTYPES
@pytest.mark.parametrize("rows", [1, 40])
def test_clamped_gates_of_every_size_are_the_definition(dtype: torch.dtype, rows: int) -> None:
    gates = torch.logspace(-20, 20, 32 * rows, dtype=torch.float64).view(rows, 32)
    x = torch.cat((gates, -gates), dim=1).to(dtype)
    ops = native_ops(dtype)
    ups = torch.eye(64)[torch.arange(64).roll(7)]
    got = ops.gated_linear(x, ops.pack(torch.cat((torch.eye(64), ups)), gated=True), "clamped_swiglu").double()
    gate, up = x.double().clamp(max=7.0), x.double()[:, torch.arange(64).roll(7)].clamp(-7.0, 7.0)
    wanted = gate * torch.sigmoid(1.702 * gate) * (up + 1)
    allowed = (gate * (up + 1)).abs() * (2.0**-8 if dtype == BF16 else 2.0**-15) + gate.abs() * 2.0**-120
    assert ((got - wanted).abs() <= allowed).all()
    assert got.abs().max() > 50  # both clamps act


@DTYPES
@pytest.mark.parametrize("codec", ["fp8", "e5m2", "int8", "channel", "bf16", "fp32"])
@pytest.mark.parametrize("width", [64, 40])
def test_stored_bytes_are_the_definition(dtype: torch.dtype, codec: str, width: int) -> None:
    x = torch.randn(40, 5, width) * torch.logspace(-6, 4, 40).view(-1, 1, 1)
    x[3, 1, 2], x[5, 0, 0], x[6, 4] = float("nan"), float("inf"), 0.0
    x[7] = torch.rand(5, width) * 2.0**-12 * torch.sign(torch.randn(5, width))  # subnormal codes
    x[7, :, 0] = 1.0
    x = x.to(dtype)
    slots = torch.cat((torch.randperm(NUM_BLOCKS * BLOCK)[:37], torch.full((3,), -1)))
    results = []
    for ops in (native_ops(dtype), TorchOps(dtype)):
        stored = (planes(2, width, codec), planes(3, width, codec))
        refused = ops.write((x[:, :2], x[:, 2:]), stored, slots)
        results.append((refused, *(part for plane in stored for part in plane[:2] if part is not None)))
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("spread", [1, 997])
def test_every_bfloat16_is_stored_as_the_definition_says(spread: int) -> None:
    """Beside neighbours of its own size and of any other."""
    every = torch.arange(1 << 16, dtype=torch.int32)
    x = every.mul(spread).bitwise_and(0xFFFF).to(torch.int16).view(BF16).view(-1, 4, 64)
    results = []
    for ops in (native_ops(BF16), TorchOps(BF16)):
        stored = planes(4, 64, "fp8")
        results.append((ops.write((x,), (stored,), torch.arange(len(x))), *stored[:2]))
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted)


KINDS = {
    "plain": AttentionKind(0.125),
    "window": AttentionKind(0.125, window=37),
    "softcap": AttentionKind(0.3, softcap=5.0),
    "sinks": AttentionKind(0.125, window=37),
}
SINKS = torch.tensor([-40.0, 0.0, 2.5, 60.0, -1.0, 4.0])  # of each head: as good as none, as good as all, and between
LENGTHS = (150, 1, 64, 65, 300)


MIXED = ("e5m2", "int8", "channel/int8", "channel/fp8", "bf16/e5m2", "int8/fp32", "fp32/bf16")


@DTYPES
@pytest.mark.parametrize(
    ("codec", "kind"), [*product(("fp8", "bf16", "fp32"), KINDS), *((codec, "window") for codec in MIXED)]
)
def test_attention_is_the_definition(dtype: torch.dtype, codec: str, kind: str) -> None:
    total, heads, kv_heads, width = sum(LENGTHS), 6, 2, 40 if codec == "bf16" else 64
    kv = [torch.randn(total, kv_heads, width).to(dtype) for _ in range(2)]
    spans_of = [(150, 70), (1, 1), (64, 1), (65, 2), (300, 1)]  # (length, last rows attended)
    q = torch.randn(75, heads + 3, width).to(dtype)[:, :heads]
    answers = []
    for ops in (native_ops(dtype, 2), TorchOps(dtype)):
        cache, spans, row = Cache(ops, LENGTHS, kv, codec), [], 0
        for (length, count), table in zip(spans_of, cache.tables, strict=True):
            spans.append(Span(row, length - count, count, table))
            row += count
        rows = q if ops.row_multiple == 1 else padded(q)
        layout = ops.lay_out(spans, BLOCK)
        sinks = SINKS if kind == "sinks" else None
        answers.append(ops.attend((rows,), cache.planes[:1], cache.planes[1], layout, KINDS[kind], sinks=sinks)[:75])
    close(answers[0], answers[1], dtype)


@DTYPES
@pytest.mark.parametrize("codec", ["fp8", "bf16", "fp32"])
def test_latent_attention_adds_the_scores_of_two_parts(dtype: torch.dtype, codec: str) -> None:
    latent, rope = torch.randn(130, 1, 96).to(dtype), torch.randn(130, 1, 32).to(dtype)
    q = (torch.randn(16, 20, 96).to(dtype), torch.randn(16, 20, 32).to(dtype))
    answers = []
    for ops in (native_ops(dtype), TorchOps(dtype)):
        cache = Cache(ops, (130,), (latent, rope), codec)
        layout = ops.lay_out([Span(0, 114, 16, cache.tables[0])], BLOCK)
        answers.append(ops.attend(q, cache.planes, cache.planes[0], layout, AttentionKind(0.1)))
    close(answers[0], answers[1], dtype)


@DTYPES
def test_a_sink_is_a_key_without_a_value(dtype: torch.dtype) -> None:
    """The same as one more key whose score is the sink and whose value is zero, for queries of ones."""
    heads, width, sink = 2, 64, 1.5
    k, v = torch.randn(20, heads, width).to(dtype), torch.randn(20, heads, width).to(dtype)
    first = torch.full((1, heads, width), sink / width).to(dtype)
    ops, q = native_ops(dtype), torch.ones(1, heads, width).to(dtype)
    k /= 8  # scores of the sink's size

    def attended(keys: torch.Tensor, values: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
        cache = Cache(ops, (len(keys),), (keys, values), "fp32" if dtype == F32 else "bf16")
        layout = ops.lay_out([Span(0, len(keys) - 1, 1, cache.tables[0])], BLOCK)
        return ops.attend((q,), cache.planes[:1], cache.planes[1], layout, AttentionKind(1.0), sinks=sinks)

    with_key = attended(torch.cat((first, k)), torch.cat((torch.zeros_like(first), v)), None)
    close(attended(k, v, torch.full((heads,), sink)), with_key, dtype, roundings=2)
    assert (attended(k, v, None).float() - with_key.float()).abs().max() > 0.01


def check_bits_of_rows(dtype: torch.dtype, kind: str, codec: str) -> None:
    length, heads, kv_heads, width = 260, 6, 2, 64
    kv = [torch.randn(length, kv_heads, width).to(dtype) for _ in range(2)]
    q = torch.randn(length, heads, width).to(dtype)
    one, two = native_ops(dtype, 1), native_ops(dtype, 2)
    cache = Cache(one, (length,), kv, codec)

    def attend(ops: NativeOps, start: int, count: int) -> torch.Tensor:
        layout = ops.lay_out([Span(0, start, count, cache.tables[0])], BLOCK)
        rows = q[start : start + count].contiguous()
        sinks = SINKS if kind == "sinks" else None
        return ops.attend((rows,), cache.planes[:1], cache.planes[1], layout, KINDS[kind], sinks=sinks)

    q[130], q[131, 0, 0], q[132], q[133, 3] = q[130] * 1e38, float("nan"), float("inf"), float("-inf")
    whole = attend(two, 0, length)
    assert torch.cat((whole[131, :1], whole[132], whole[133, 3:4])).isnan().all()
    assert whole[134:].isfinite().all()
    pieces = ((0, 1), (0, 17), (17, 100), (63, 2), (64, 64), (128, 3), (130, 1), (131, 5), (200, 1), (255, 5), (259, 1))
    for start, count in pieces:
        assert same(attend(one, start, count), whole[start : start + count]), (start, count)


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_attention_has_the_same_bits_however_it_is_computed(dtype: torch.dtype, kind: str) -> None:
    check_bits_of_rows(dtype, kind, "fp8")


@DTYPES
@pytest.mark.parametrize("codec", ["e5m2", "channel/int8"])
def test_rows_of_attention_to_other_codecs_have_the_same_bits(dtype: torch.dtype, codec: str) -> None:
    check_bits_of_rows(dtype, "window", codec)


@DTYPES
def test_keys_per_channel_are_stored_alike_in_one_step_or_in_many(dtype: torch.dtype) -> None:
    x = torch.randn(40, 2, 64) * torch.where(torch.arange(64) % 32 == 5, 30.0, 1.0)
    slots, stored = torch.arange(40).flip(0) + 3 * BLOCK, []
    for pieces in ((40,), (7, 1, 20, 12)):
        plane, ops = planes(2, 64, "channel"), native_ops(dtype, 2)
        for rows, to in zip(x.to(dtype).flip(0).split(pieces), slots.flip(0).split(pieces), strict=True):
            ops.write((rows.flip(0),), (plane,), to.flip(0).contiguous())
        stored.append(plane)
    assert torch.equal(stored[0].payload, stored[1].payload)
    assert torch.equal(stored[0].scales, stored[1].scales)


@pytest.mark.parametrize("vocab", [1, 15, 16, 33, 400])
def test_extremes_are_numpys(vocab: int) -> None:
    logits = torch.randn(9, vocab).mul(4).round().numpy()  # many are equal: the first one counts
    infinities = (float("inf"), float("-inf"))
    for row, odd in enumerate((float("nan"), *infinities), start=1):
        logits[row, vocab // 2] = odd
    logits[4] = float("-inf")
    logits[5], logits[5, -1] = 0.0, float("nan")
    logits[6] = -1.0
    for threads in (1, 2):
        assert_same_extremes(native_ops(F32, threads).extremes(logits), logits)


def assert_same_extremes(found: Extremes | None, logits: Floats) -> None:
    assert found is not None
    wanted = extremes(logits)
    np.testing.assert_array_equal(found.least, wanted.least)
    known = ~np.isnan(wanted.least)  # where a NaN is the greatest means nothing
    np.testing.assert_array_equal(found.greatest[known], wanted.greatest[known])
    np.testing.assert_array_equal(found.best[known], wanted.best[known])
    assert ((found.best >= 0) & (found.best < logits.shape[1])).all()


@DTYPES
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_head_is_a_norm_and_a_product_and_finds_the_extremes(dtype: torch.dtype, quantization: Quantization) -> None:
    norm = Norm(torch.rand(128) + 0.5, 1e-5)
    for vocab, threads in ((5, 1), (48, 2), (1000, 1), (1027, 2)):
        ops = native_ops(dtype, threads, quantization)
        matrix = torch.randn(vocab, 128)
        matrix[vocab // 2 :] = matrix[: vocab - vocab // 2].clone()  # equals: the first one counts
        packed = ops.pack(matrix, wide=True)
        for rows in (1, 2, 5, 16, 17, 40):
            x = torch.randn(rows, 128).to(dtype)
            x[rows // 2, 7] = float("nan") if rows == 5 else float("inf") if rows == 17 else 1.0
            logits = ops.head(x.clone(), norm, packed)
            assert torch.equal(
                logits.rows.nan_to_num(), ops.linear(ops.rms_norm(x, norm), packed).float().nan_to_num()
            ), (vocab, rows)
            assert_same_extremes(logits.extremes, logits.rows.numpy())


@pytest.mark.parametrize("level", PLAYED)
def test_older_machines_compute_the_same_to_rounding(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forms for AVX-512 without bf16, for AVX2 and for neither run here too."""
    older = library_for(level)
    newest = int8_answers(1027)
    monkeypatch.setattr(native, "load", lambda: older)
    for got, wanted in zip(int8_answers(1027), newest, strict=True):
        close(got, wanted, F32)
        if level != "x86-64":  # which has no fused products
            assert torch.equal(got, wanted)
    test_rows_of_8_bits_meet_weights_as_integers(200)
    for inner, num_odd, gated in ((264, 0, True), (2048, 1, False)):
        with monkeypatch.context() as within:
            test_bfloat16_in_twelve_bits_gives_every_bit_of_sixteen(inner, num_odd, gated, within)
    for dtype in (F32, BF16):
        test_linear_is_the_definition_for_every_number_of_rows(dtype, "int8", 70)
        test_linear_is_the_definition_for_every_number_of_rows(dtype, "none", 64)
        test_a_row_of_a_linear_has_the_same_bits_in_any_company_and_with_any_threads(dtype, "int8")
        test_a_row_of_a_linear_has_the_same_bits_in_any_company_and_with_any_threads(dtype, "none")
        for codec in ("fp8", "e5m2", "channel"):
            test_stored_bytes_are_the_definition(dtype, codec, 64)
        for codec in ("fp8", "e5m2", "int8", "channel/int8"):
            test_attention_is_the_definition(dtype, codec, "window")
        test_attention_is_the_definition(dtype, "fp8", "sinks")
        test_a_row_of_attention_has_the_same_bits_however_it_is_computed(dtype, "softcap")
        test_gates_are_the_definition(dtype, "gelu_tanh", "none")
        test_gates_are_the_definition(dtype, "clamped_swiglu", "none")
        test_gates_of_every_size_are_the_definition(dtype, "silu", 40)
        test_a_head_is_a_norm_and_a_product_and_finds_the_extremes(dtype, "none")
        test_a_head_is_a_norm_and_a_product_and_finds_the_extremes(dtype, "int8")
    test_extremes_are_numpys(33)


@pytest.mark.campaign
def test_tiles_compute_the_same_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code around AMX's instructions, with these emulated. Those of integers leave no bit open."""
    answers = [int8_answers(inner) for inner in (192, 1027)]
    try:
        emulated = native.Library(build(TILES))
    except NativeUnavailable as error:
        pytest.skip(str(error))
    monkeypatch.setattr(native, "load", lambda: emulated)
    for inner, wanted in zip((192, 1027), answers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(int8_answers(inner), wanted, strict=True)), inner
    for inner, num_odd, gated in ((64, 0, True), (2048, 1, False)):
        with monkeypatch.context() as within:
            test_bfloat16_in_twelve_bits_gives_every_bit_of_sixteen(inner, num_odd, gated, within)
    for quantization in ("none", "int8"):
        test_linear_is_the_definition_for_every_number_of_rows(BF16, quantization, 64)  # type: ignore[arg-type]
        test_linear_is_the_definition_for_every_number_of_rows(BF16, quantization, 70)  # type: ignore[arg-type]
        test_gates_are_the_definition(BF16, "silu", quantization)  # type: ignore[arg-type]
        test_a_head_is_a_norm_and_a_product_and_finds_the_extremes(BF16, quantization)  # type: ignore[arg-type]
    test_a_row_of_a_linear_has_the_same_bits_in_any_company_and_with_any_threads(BF16, "none")
