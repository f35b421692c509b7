"""The ops in torch: against their definitions, and bits that do not depend on where a number lies."""

import pytest
import torch

from twostroke.kernels.reference import silu_mul, store_kv
from twostroke.kv.spec import attention_spec, codec_ids, mla_spec
from twostroke.kv.store.store import KvStore
from twostroke.model.ops.elementwise import activated, sigmoid, softcapped
from twostroke.model.ops.seam import Norm
from twostroke.model.ops.torch_ops import TorchOps

CODECS = ["fp8", "fp8_e5m2", "int8", "int8_channel", "bfloat16", "float32"]


def random(*shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("latent", [False, True], ids=["kv", "latent"])
def test_writes_what_the_reference_defines(codec: str, latent: bool) -> None:
    spec = mla_spec(2, 24, 8, codec_ids(codec)[0]) if latent else attention_spec(2, 3, 16, *codec_ids(codec))
    ours, definition = (KvStore(spec, 4, 16) for _ in range(2))
    wide = random(20, 200)  # parts may be views of wider rows
    first, second = spec.main.components
    parts = [wide[:, : c.heads * c.width].view(20, c.heads, c.width) for c in (first, second)]
    parts[1] = wide[:, 100 : 100 + second.heads * second.width].view(20, second.heads, second.width)
    wide[3, 2], wide[7, 100] = torch.nan, torch.inf
    slots = torch.cat((torch.arange(17) * 3, torch.full((3,), -1)))
    for store in (ours, definition):
        for component in store.components:
            component.payload.fill_(0xAA)
    counted = TorchOps(torch.float32).write(parts, ours.planes(1), slots)
    expected = store_kv(*parts, slots, *definition.planes(1))
    assert torch.equal(counted, expected.non_finite)
    assert counted.nonzero().flatten().tolist() == [3, 7]
    for mine, theirs in zip(ours.components, definition.components, strict=True):
        assert torch.equal(mine.payload, theirs.payload)
        if mine.scales is not None and theirs.scales is not None:
            assert torch.equal(mine.scales, theirs.scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_the_definitions_to_a_few_units_in_the_last_place(dtype: torch.dtype) -> None:
    gate_up = random(16, 2 * 96, scale=20.0).to(dtype)
    ops = TorchOps(dtype)
    same = ops.pack(torch.eye(2 * 96), gated=True)
    near = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 1e-6}
    assert torch.allclose(ops.gated_linear(gate_up, same, "silu"), silu_mul(gate_up), **near)
    gate, up = gate_up.double().chunk(2, dim=-1)
    gelu = torch.nn.functional.gelu(gate, approximate="tanh") * up
    assert torch.allclose(ops.gated_linear(gate_up, same, "gelu_tanh").double(), gelu, **near)


@pytest.mark.parametrize("cap", [2.0, 50.0])
def test_softcaps_are_scaled_hyperbolic_tangents(cap: float) -> None:
    x = torch.cat((random(4, 100, scale=3 * cap), torch.tensor([[0.0, -0.0, 1e30, -1e30] * 25]).expand(4, 100)))
    expected = cap * torch.tanh(x.double() / cap)
    assert torch.allclose(softcapped(x, cap).double(), expected, rtol=1e-6, atol=1e-6 * cap)


@pytest.mark.parametrize(
    "function",
    [sigmoid, lambda x: activated(x, "silu"), lambda x: activated(x, "gelu_tanh"), lambda x: softcapped(x, 3.0)],
    ids=["sigmoid", "silu", "gelu_tanh", "softcapped"],
)
def test_a_functions_bits_do_not_depend_on_where_a_number_lies(function) -> None:
    x = random(16, 200, scale=5.0)
    wide = function(x)
    for width in (1, 7, 31, 33, 100, 199):
        assert torch.equal(function(x[:, :width].contiguous()), wide[:, :width])
    assert torch.equal(function(x[3:4, 5:6]), wide[3:4, 5:6])


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotates_the_first_part_of_a_view(interleaved: bool) -> None:
    x, angle = random(16, 5, 12), random(16, 4, seed=1)
    turned = TorchOps(torch.float32).rotary(x[:, 1:3], angle.cos(), angle.sin(), interleaved=interleaved)
    pairs = torch.polar(torch.ones_like(angle), angle).unsqueeze(1)
    part = x[:, 1:3, :8]
    numbers = torch.complex(part[..., 0::2], part[..., 1::2]) if interleaved else torch.complex(*part.chunk(2, -1))
    expected = numbers * pairs
    both = (expected.real, expected.imag)
    flat = torch.stack(both, -1).flatten(-2) if interleaved else torch.cat(both, -1)
    assert torch.allclose(turned[..., :8], flat, atol=1e-6)
    assert torch.equal(turned[..., 8:], x[:, 1:3, 8:])


def test_adds_before_it_normalises() -> None:
    ops = TorchOps(torch.bfloat16)
    x, delta = random(16, 48).bfloat16(), random(16, 48, seed=1).bfloat16()
    norm = Norm(random(48, seed=2), 1e-5)
    total, normed = ops.add_rms_norm(x, delta, norm)
    assert torch.equal(total, x + delta)
    assert torch.equal(normed, ops.rms_norm(x + delta, norm))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linears_add_their_bias_and_exact_ones_are_not_rounded(dtype: torch.dtype) -> None:
    matrix, bias, x = random(24, 32), random(24, seed=1), random(16, 32, seed=2).to(dtype)
    ops = TorchOps(dtype, quantization="int8")
    exact = ops.linear(x, ops.pack(matrix, exact=True))
    assert exact.dtype == torch.float32
    assert torch.allclose(exact.double(), x.double() @ matrix.double().t(), atol=1e-4)
    plain = TorchOps(dtype)
    answer = plain.linear(x, plain.pack(matrix, bias))
    assert answer.dtype == dtype
    expected = x.double() @ matrix.to(dtype).double().t() + bias.double()
    assert torch.allclose(answer.double(), expected, rtol=3 * torch.finfo(dtype).eps, atol=20 * torch.finfo(dtype).eps)


def test_int8_rounds_each_row_in_127_steps_of_its_largest_number() -> None:
    matrix = random(24, 33)
    matrix[5] = 0.0
    ops = TorchOps(torch.float32, quantization="int8")
    held = ops.pack(matrix).matrix
    step = matrix.abs().amax(1, keepdim=True) / 127
    assert ((held - matrix).abs() <= 0.5001 * step).all()
    codes = held / step.clamp(min=1e-30)
    assert torch.allclose(codes, codes.round(), atol=1e-3)
    assert (held[5] == 0).all()
    assert "int8" in ops.description
