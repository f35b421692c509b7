"""Four-bit floats of `twostroke quantize`: rounding, scales, stored forms. What the library reads: test_quantise.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints.quantised_here import quantised, shallow

from twostroke.core.errors import ConfigError
from twostroke.model.quantise.float4 import E2M1, codes_of, float4_scales, to_e2m1
from twostroke.model.quantise.rounding import grid_of, rounded
from twostroke.model.quantise.scheme import Scheme, Settings, scheme_of

NVFP4, MXFP4 = Scheme(4, True, "tensor_group", 16), Scheme(4, True, "group", 32)


def test_numbers_are_rounded_to_the_nearest_and_ties_to_the_even_code() -> None:
    values = torch.tensor(E2M1)
    for low, high, is_lower_even in zip(E2M1, E2M1[1:], (True, False) * 4, strict=False):
        middle = (low + high) / 2
        for x, wanted in (
            (middle, low if is_lower_even else high),
            (middle * (1 + 1e-6), high),
            (middle * (1 - 1e-6), low),
            (high, high),
        ):
            assert to_e2m1(torch.tensor([x, -x])).tolist() == [wanted, -wanted], x
    assert to_e2m1(torch.tensor([1e9, -7.0])).tolist() == [6.0, -6.0]
    assert codes_of(torch.tensor([0.0, 6.0, -0.0, -1.0])).tolist() == [0, 7, 8, 10]
    assert to_e2m1(-values).tolist() == (-values).tolist()


def test_scales_of_nvfp4_are_of_e4m3_under_one_of_the_tensor() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    weight[3, 16:32] = 0.0
    weight[5, :16] *= 1e-9  # below the least scale
    grid = grid_of(weight, NVFP4, torch.bfloat16)
    assert grid.whole is not None
    stored = (grid.scale * grid.whole).to(torch.float8_e4m3fn).float()
    assert torch.equal(stored / grid.whole, grid.scale)
    assert bool((grid.scale > 0).all())
    assert float(stored.max()) == 448.0, "the greatest number of the tensor is the greatest that there is"
    again = rounded(weight, grid, NVFP4).values(NVFP4)
    assert torch.equal(again[3, 16:32], torch.zeros(16))
    assert bool(((again - weight).abs() <= grid.scale.repeat_interleave(16, 1) * 1.0001).all())


def test_each_scale_of_e4m3_is_used_and_the_least_one_also_for_less() -> None:
    scales = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # [126]: 2**-9 to 448
    groups = torch.zeros(1, 128, 16)
    groups[0, :126, 3] = -6 * scales
    groups[0, 126, 0] = scales[0]
    found, whole = float4_scales(groups, groups.abs().max(), is_nvfp4=True)
    assert whole == 1.0
    assert found[0].tolist() == [*scales.tolist(), scales[0], scales[0]]


def test_scales_of_numbers_at_the_ends_of_float32_are_numbers() -> None:
    for size in (1e-38, 3e38):
        groups = torch.full((1, 2, 16), size)
        scale, whole = float4_scales(groups, groups.max(), is_nvfp4=True)
        assert whole is not None
        assert 0 < float(whole) < float("inf")
        torch.testing.assert_close(6 * scale, groups.amax(-1), rtol=2**-4, atol=0.0)
    tiny, _ = float4_scales(torch.full((1, 1, 32), 1e-40), torch.tensor(1e-40), is_nvfp4=False)
    assert float(tiny) == 2.0**-126


def test_scales_of_mxfp4_are_the_better_of_two_powers() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    grid = grid_of(weight, MXFP4, torch.bfloat16)
    assert torch.equal(torch.exp2(torch.log2(grid.scale).round()), grid.scale)
    error = (rounded(weight, grid, MXFP4).values(MXFP4) - weight).reshape(16, 2, 32).square().sum(-1)
    tops = weight.reshape(16, 2, 32).abs().amax(-1)
    for more in (0, 1):
        scale = torch.exp2(torch.floor(torch.log2(tops)) - 2 + more).repeat_interleave(32, 1)
        other = (to_e2m1(weight / scale) * scale - weight).reshape(16, 2, 32).square().sum(-1)
        assert bool((error <= other).all()), "of each group"
        assert bool((error < other).any())
    both_exact, _ = float4_scales(torch.full((1, 1, 32), 4.0), torch.tensor(4.0), is_nvfp4=False)
    assert float(both_exact) == 1.0, "the standard's"
    zeros, _ = float4_scales(torch.zeros(1, 1, 32), torch.tensor(0.0), is_nvfp4=False)
    assert float(zeros) > 0


def test_matrices_that_a_kernel_joins_share_the_scale_of_the_tensor(tmp_path: Path) -> None:
    quantised(shallow(tmp_path / "float"), tmp_path / "out", Settings("nvfp4"))
    tensors = {k: t for file in (tmp_path / "out").glob("*.safetensors") for k, t in load_file(file).items()}
    layer = "model.layers.0."
    names = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    whole = {name: tensors[f"{layer}{name}_proj.weight_global_scale"] for name in names}
    assert len({float(whole[f"self_attn.{name}"]) for name in "qkv"}) == 1
    assert float(whole["mlp.gate"]) == float(whole["mlp.up"])
    assert len({float(value) for value in whole.values()}) == 4
    assert all(value.shape == (1,) and value.dtype == torch.float32 for value in whole.values())
    (group,) = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"][
        "config_groups"
    ].values()
    assert (group["weights"]["strategy"], group["weights"]["scale_dtype"]) == ("tensor_group", "torch.float8_e4m3fn")


def test_finer_groups_lose_less(tmp_path: Path) -> None:
    one = shallow(tmp_path / "float")
    errors = {
        method: {
            matrix.module: matrix.weight for matrix in quantised(one, tmp_path / method, Settings(method)).matrices
        }  # type: ignore[arg-type]
        for method in ("nvfp4", "mxfp4")
    }
    assert len(errors["nvfp4"]) == 7
    for module, error in errors["nvfp4"].items():
        assert 0 < error < errors["mxfp4"][module] < 0.05, module


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Settings("nvfp4", 8), "--bits is 8; nvfp4 has 4"),
        (Settings("mxfp4", group=64), "--group is 64; mxfp4 has groups of 32"),
        (Settings("nvfp4", symmetric=False), "nvfp4 has no zero points"),
    ],
)
def test_settings_of_other_methods_are_refused(settings: Settings, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        scheme_of(settings, [("m", 64)])


def test_a_matrix_that_groups_do_not_divide_is_named() -> None:
    with pytest.raises(ConfigError, match="groups of 32 columns, and narrow has 48"):
        scheme_of(Settings("mxfp4"), [("wide", 64), ("narrow", 48)])
    assert scheme_of(Settings("nvfp4"), [("narrow", 48)]) == NVFP4
