"""Matrices of 4-bit groups, multiplied as stored: the definition's numbers, and bits that depend on a row alone."""

import pytest
import torch
from support.session.older_machines import PLAYED, library_for

from twostroke.kernels.cpu import library as native
from twostroke.kernels.cpu.build import NativeUnavailable
from twostroke.model.ops.extremes import extremes
from twostroke.model.ops.int4 import Int4Matrix, decoded, joined, pairs, with_rows
from twostroke.model.ops.native_ops import NativeOps
from twostroke.model.ops.seam import Norm
from twostroke.model.ops.torch_ops import TorchOps

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
ROWS = (1, 2, 3, 5, 7, 8, 11, 12, 13, 16, 17, 25, 49, 60)
SHAPES = [  # inner, group
    (8, 8),
    (64, 32),
    (120, 24),  # groups that are no multiple of a register
    (256, 128),
    (96, 96),  # one scale per row
]


def native_ops(dtype: torch.dtype, threads: int = 1) -> NativeOps:
    try:
        return NativeOps(dtype, threads)
    except NativeUnavailable as error:
        pytest.skip(str(error))


def random_matrix(
    rows: int, inner: int, group: int, *, zeros: bool = False, order: bool = False, scales: torch.dtype = F16
) -> Int4Matrix:
    generator = torch.Generator().manual_seed(inner + group)
    groups = inner // group
    return Int4Matrix(
        torch.randint(0, 256, (rows, inner // 2), dtype=torch.uint8, generator=generator),
        (torch.randn(rows, groups, generator=generator) * 0.02).to(scales),
        torch.randint(0, 16, (rows, groups), dtype=torch.uint8, generator=generator) if zeros else None,
        torch.randperm(inner, generator=torch.Generator().manual_seed(inner)).int() if order else None,
    )


def random_rows(inner: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(inner)
    return torch.randn(max(ROWS), inner, generator=generator).to(dtype)


def assert_exact(got: torch.Tensor, x: torch.Tensor, matrix: Int4Matrix, bias: torch.Tensor) -> None:
    """Neither weights nor rows are rounded: what differs from float64 is the rounding of float32 sums."""
    wanted = x.double() @ decoded(matrix).double().t() + bias.double()
    most = 15.0 * matrix.scales.double().abs().repeat_interleave(matrix.group, 1)  # a number of 15, or a zero point
    x = x if matrix.order is None else x[:, matrix.order.long()]
    allowed = 2.0**-21 * (x.double().abs() @ most.t() + bias.double().abs())
    assert ((got.double() - wanted).abs() <= allowed).all()


@DTYPES
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("order", [False, True], ids=["in order", "act order"])
@pytest.mark.parametrize(("inner", "group"), SHAPES)
def test_products_are_those_of_the_exact_numbers_for_every_number_of_rows(
    dtype: torch.dtype, zeros: bool, order: bool, inner: int, group: int
) -> None:
    matrix, bias = random_matrix(90, inner, group, zeros=zeros, order=order), torch.randn(90)
    ops, x = native_ops(dtype, 2), random_rows(inner, dtype)
    packed = ops.pack_int4(matrix, bias, wide=True)
    assert packed.matrix.kind == native.INT4
    for rows in ROWS:
        got = ops.linear(x[:rows].contiguous(), packed)
        assert got.dtype == F32
        assert_exact(got, x[:rows], matrix, bias)


@pytest.mark.parametrize("scales", [F32, BF16, F16])
def test_scales_of_every_kind_and_size_are_exact(scales: torch.dtype) -> None:
    matrix = random_matrix(33, 64, 32, scales=scales, zeros=True)
    matrix.scales[:, 1] *= torch.logspace(-7, 4, 33).to(scales)  # float16: subnormals too
    x, bias = random_rows(64, BF16), torch.zeros(33)
    assert_exact(native_ops(BF16).linear(x, native_ops(BF16).pack_int4(matrix, wide=True)), x, matrix, bias)


@DTYPES
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("order", [False, True], ids=["in order", "act order"])
def test_a_row_has_the_same_bits_in_any_company_and_with_any_threads(
    dtype: torch.dtype, zeros: bool, order: bool
) -> None:
    matrix = random_matrix(200, 96, 32, zeros=zeros, order=order)
    one, two = native_ops(dtype, 1), native_ops(dtype, 2)
    alone, shared = one.pack_int4(matrix), two.pack_int4(matrix)
    x = torch.randn(70, 96, generator=torch.Generator().manual_seed(2)).to(dtype)
    whole = two.linear(x, shared)
    for first in (0, 1, 12, 15, 40, 53):
        for count in (1, 2, 4, 5, 8, 12, 16, 17):
            part = one.linear(x[first : first + count].contiguous(), alone)
            assert torch.equal(part, whole[first : first + count]), (first, count)


@DTYPES
@pytest.mark.parametrize("width", [64, 70])
def test_gates_are_those_of_two_products(dtype: torch.dtype, width: int) -> None:
    matrix, bias = random_matrix(2 * width, 64, 32, zeros=True), torch.randn(2 * width)
    ops, x = native_ops(dtype, 2), random_rows(64, dtype)
    gated, plain = ops.pack_int4(matrix, bias, gated=True), ops.pack_int4(matrix, bias)
    for rows in ROWS:
        some = x[:rows].contiguous()
        gate, up = ops.linear(some, plain).float().chunk(2, dim=1)
        wanted = torch.nn.functional.silu(gate) * up
        got = ops.gated_linear(some, gated, "silu").float()
        unit = 2.0**-18 if dtype == F32 else 2.0**-6
        assert (got - wanted).abs().max() <= unit * wanted.abs().max()
        assert torch.equal(ops.gate(ops.halves(some, gated), "silu", width).float(), got)


@DTYPES
def test_a_head_finds_its_extremes(dtype: torch.dtype) -> None:
    matrix, norm = random_matrix(1027, 128, 32), Norm(torch.rand(128) + 0.5, 1e-5)
    ops, x = native_ops(dtype, 2), random_rows(128, dtype)
    packed = ops.pack_int4(matrix, wide=True)
    for rows in (1, 5, 16, 40):
        logits = ops.head(x[:rows].clone(), norm, packed)
        assert torch.equal(logits.rows, ops.linear(ops.rms_norm(x[:rows].clone(), norm), packed))
        assert logits.extremes is not None
        assert (logits.extremes.best == extremes(logits.rows.numpy()).best).all()


@DTYPES
def test_what_is_not_finite_stays_in_its_row(dtype: torch.dtype) -> None:
    ops, x = native_ops(dtype), random_rows(64, dtype)[:20].clone()
    packed = ops.pack_int4(random_matrix(40, 64, 32, zeros=True))
    clean = ops.linear(x, packed)
    for odd in (float("nan"), float("inf")):
        x[5, 50] = odd
        got = ops.linear(x, packed)
        assert not got[5].isfinite().any()
        assert torch.equal(got[:5], clean[:5])
        assert torch.equal(got[6:], clean[6:])


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zero points"])
def test_memory_is_that_of_the_checkpoint(group: int, zeros: bool) -> None:
    matrix = random_matrix(1024, 1024, group, zeros=zeros)
    stored = 1024 * 1024 // 2 + 1024 * 1024 // group * 2 + (1024 * 1024 // group // 2 if zeros else 0)
    assert stored <= native_ops(BF16).pack_int4(matrix).num_bytes <= 1.05 * stored


def test_with_8_bit_weights_asked_for_a_matrix_is_rounded_to_them() -> None:
    try:
        ops = NativeOps(BF16, 1, "int8")
    except NativeUnavailable as error:
        pytest.skip(str(error))
    assert not ops.holds_int4
    assert ops.pack_int4(random_matrix(40, 64, 32)).matrix.kind == native.INT8


@DTYPES
def test_torch_ops_decode(dtype: torch.dtype) -> None:
    matrix, bias = random_matrix(48, 64, 32, zeros=True, order=True), torch.randn(48)
    ops, x = TorchOps(dtype), random_rows(64, dtype)[:48]
    assert not ops.holds_int4
    packed = ops.pack_int4(matrix, bias)
    assert torch.equal(packed.matrix, decoded(matrix).to(dtype))
    assert torch.equal(ops.linear(x, packed), ops.linear(x, ops.pack(decoded(matrix), bias)))


@pytest.mark.parametrize("level", PLAYED)
@DTYPES
def test_older_machines_compute_the_same(level: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Floats of all instruction sets with fused products have one order of sums, so equal bits."""
    older = library_for(level)
    newest = answers(F32)
    monkeypatch.setattr(native, "load", lambda: older)
    for got, (x, matrix, bias) in zip(answers(dtype), jobs(dtype), strict=True):
        assert_exact(got, x, matrix, bias)
    if level != "x86-64":  # which has no fused products
        for got, wanted in zip(answers(F32), newest, strict=True):
            assert torch.equal(got, wanted)


def jobs(dtype: torch.dtype) -> list[tuple[torch.Tensor, Int4Matrix, torch.Tensor]]:
    found = []
    for rows in (1, 2, 6, 16, 60):
        for zeros, order in ((False, False), (True, False), (True, True)):
            matrix = random_matrix(90, 192, 64, zeros=zeros, order=order)
            found.append((random_rows(192, dtype)[:rows].contiguous(), matrix, torch.arange(90.0)))
    return found


def answers(dtype: torch.dtype) -> list[torch.Tensor]:
    ops = native_ops(dtype, 2)
    return [ops.linear(x, ops.pack_int4(matrix, bias, wide=True)) for x, matrix, bias in jobs(dtype)]


def test_parts_are_joined_by_rows() -> None:
    plain, zeros = random_matrix(16, 64, 32), random_matrix(8, 64, 32, zeros=True, scales=BF16)
    whole = joined([plain, zeros])
    assert whole is not None
    assert torch.equal(decoded(whole), torch.cat((decoded(plain), decoded(zeros))))
    assert joined([plain, random_matrix(16, 64, 16)]) is None
    assert joined([plain, None]) is None
    first, second = random_matrix(16, 64, 32, order=True), random_matrix(8, 64, 32, order=True)
    together = joined([first, second])  # of one order
    assert together is not None
    assert torch.equal(decoded(together), torch.cat((decoded(first), decoded(second))))
    second = Int4Matrix(second.numbers, second.scales, None, torch.arange(64).flip(0).int())
    assert joined([first, second]) is None
    assert joined([first, plain]) is None


@pytest.mark.parametrize("zeros", [False, True])
def test_rows_in_another_order_keep_their_numbers(zeros: bool) -> None:
    matrix = random_matrix(16, 64, 32, zeros=zeros, order=True)
    assert torch.equal(decoded(with_rows(matrix, lambda rows: rows.flip(0))), decoded(matrix).flip(0))


def test_the_definition_number_by_number() -> None:
    numbers = torch.tensor([[1, 15, 0, 8, 3, 4, 5, 6]], dtype=torch.uint8)
    scales, zeros = torch.tensor([[2.0, 0.5]]), torch.tensor([[1, 15]], dtype=torch.uint8)
    order = torch.tensor([7, 6, 5, 4, 0, 1, 2, 3], dtype=torch.int32)
    matrix = Int4Matrix(pairs(numbers), scales, zeros, order)
    assert decoded(matrix).tolist() == [[-6.0, -5.5, -5.0, -4.5, 14.0, -2.0, 28.0, 0.0]]
    assert decoded(Int4Matrix(pairs(numbers), scales)).tolist() == [[-14.0, 14.0, -16.0, 0.0, -2.5, -2.0, -1.5, -1.0]]
