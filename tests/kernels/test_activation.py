"""The gated activation, in the interpreter, against its definition."""

import pytest
import torch

from twostroke.kernels import reference
from twostroke.kernels.gpu import activation
from twostroke.kernels.gpu.activation import act_mul
from twostroke.kernels.reference import Activation


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = torch.empty
    monkeypatch.setattr(activation.torch, "empty", lambda *a, **k: honest(*a, **k).fill_(torch.nan))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # an infinite exponential is a gate of zero
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "clamped_swiglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "ffn"), [(1, 1), (3, 63), (2, 1024), (5, 1025), (0, 8)])
def test_equals_the_definition(rows: int, ffn: int, dtype: torch.dtype, kind: Activation) -> None:
    wide = 30 * torch.randn(rows, 2 * ffn + 3, generator=torch.Generator().manual_seed(ffn))
    gate_up = wide.to(dtype)[:, : 2 * ffn]  # rows wider than what is used
    ours, theirs = act_mul(gate_up, kind), reference.act_mul(gate_up, kind)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol={torch.float32: 3e-6, torch.bfloat16: 2**-7}[dtype], atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="gate_up"):
        act_mul(torch.ones(2, 7), "silu")
    with pytest.raises(ValueError, match="relu"):
        act_mul(torch.ones(2, 8), "relu")  # type: ignore[arg-type]
