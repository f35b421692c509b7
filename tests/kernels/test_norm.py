"""The norm kernels, in the interpreter, against their definitions."""

from typing import Any

import pytest
import torch

from twostroke.kernels import reference
from twostroke.kernels.gpu import norm
from twostroke.kernels.gpu.norm import add_rms_norm, rms_norm

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}  # bf16: one unit in the last place


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = torch.empty
    monkeypatch.setattr(norm.torch, "empty", lambda *a, **k: honest(*a, **k).fill_(torch.nan))


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return (5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def assert_close(mine: torch.Tensor, other: torch.Tensor) -> None:
    assert mine.dtype == other.dtype
    assert mine.is_contiguous()
    torch.testing.assert_close(mine, other, rtol=TOLERANCE[mine.dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 15), (2, 64), (5, 65), (2, 500), (0, 8)])
@pytest.mark.parametrize("unit_offset", [False, True])
def test_equals_the_definition(rows: int, width: int, dtype: torch.dtype, unit_offset: bool) -> None:
    x, delta = normal(rows, width, dtype=dtype), normal(rows, width, dtype=dtype, seed=1)
    weight = normal(width, dtype=dtype, seed=2)
    assert_close(
        rms_norm(x, weight, 1e-5, unit_offset=unit_offset),
        reference.rms_norm(x, weight, 1e-5, unit_offset=unit_offset),
    )
    ours = add_rms_norm(x, delta, weight, 1e-5, unit_offset=unit_offset)
    theirs = reference.add_rms_norm(x, delta, weight, 1e-5, unit_offset=unit_offset)
    assert torch.equal(ours.residual, theirs.residual)
    assert_close(ours.normed, theirs.normed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "heads", "width"), [(7, 3, 64), (33, 5, 96), (1, 1, 128)])
def test_normalises_heads_of_a_fused_projection(tokens: int, heads: int, width: int, dtype: torch.dtype) -> None:
    x = normal(tokens, heads + 2, width, dtype=dtype)[:, 1:-1]
    weight = normal(width, dtype=dtype, seed=2)
    assert_close(rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    x, weight = normal(9, 4, 80, dtype=torch.float32), normal(80, dtype=torch.float32)
    whole = rms_norm(x, weight, 1e-5)
    assert all(torch.equal(rms_norm(x[i : i + 1], weight, 1e-5), whole[i : i + 1]) for i in (0, 3, 8))


def test_what_does_not_fit_is_refused() -> None:
    x: Any = normal(3, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match="weight"):
        rms_norm(x, torch.ones(7), 1e-5)
    with pytest.raises(ValueError, match="rows or heads"):
        rms_norm(x.t(), torch.ones(3), 1e-5)
    with pytest.raises(ValueError, match="must agree"):
        add_rms_norm(x, x[:2], torch.ones(8), 1e-5)
