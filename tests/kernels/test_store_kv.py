"""The FP8 store kernel, in the interpreter: byte for byte the reference's, and so the wire's."""

from typing import Any

import pytest
import torch

from twostroke.kernels import reference
from twostroke.kernels.gpu import launch
from twostroke.kernels.gpu.store_kv import store_kv
from twostroke.kernels.reference import Planes
from twostroke.kv import codec as wire


def keys_and_values(tokens: int, heads: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers over the whole range of the codec."""
    generator = torch.Generator().manual_seed(tokens * heads + width)
    shape = (2, tokens, heads, width)
    x = torch.randn(shape, generator=generator) * torch.exp(20 * torch.randn((*shape[:3], 1), generator=generator))
    return tuple(x.clamp(-3.3e38, 3.3e38).to(dtype))  # type: ignore[return-value]


def some_slots(tokens: int, num_slots: int) -> torch.Tensor:
    return torch.randperm(num_slots, generator=torch.Generator().manual_seed(tokens))[:tokens]


def assert_equal_to_reference(
    k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, ours: list[Planes], theirs: list[Planes]
) -> None:
    stored, expected = store_kv(k, v, slots, *ours), reference.store_kv(k, v, slots, *theirs)
    for mine, other in zip(stored, expected, strict=True):
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other)
    for planes, definition in zip(ours, theirs, strict=True):
        assert torch.equal(planes.payload, definition.payload)
        assert planes.scales is not None
        assert definition.scales is not None
        assert torch.equal(planes.scales, definition.scales)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "block_tokens"),
    [((1, 1, 64), 16), ((15, 2, 64), 16), ((17, 2, 128), 32), ((33, 3, 80), 64), ((16, 5, 16), 16), ((0, 2, 64), 16)],
)
def test_bytes_and_scratch_equal_the_reference(
    make_planes: Any, shape: tuple[int, int, int], block_tokens: int, dtype: torch.dtype
) -> None:
    tokens, heads, width = shape
    k, v = keys_and_values(tokens, heads, width, dtype)
    num_blocks = 2 + tokens // block_tokens
    slots = some_slots(tokens, num_blocks * block_tokens)
    ours, theirs = ([make_planes(num_blocks, heads, block_tokens, width) for _ in "kv"] for _ in range(2))
    assert_equal_to_reference(k, v, slots, ours, theirs)


def test_every_bf16_becomes_the_wire_s_bytes(make_planes: Any) -> None:
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    # The interpreter takes 20 ms for each program, a GPU's compiler has no registers for so many numbers in one.
    tokens, heads, width = (3, 17, 1280) if launch.interpreted() else (15, 34, 128)
    x = x[torch.isfinite(x)].view(tokens, heads, width)
    planes = [make_planes(1, heads, 16, width) for _ in "kv"]
    store_kv(x, x.flip(2), torch.arange(tokens), *planes)
    for plane, given in zip(planes, (x, x.flip(2)), strict=True):
        expected = wire.encode(given.float().numpy(), wire.Codec.FP8_E4M3)
        assert (plane.payload[0, :, :tokens].transpose(0, 1).numpy() == expected.payload).all()
        assert (plane.scales[0, :, :tokens].T.numpy() == expected.scales).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_zeros_extremes_non_finite_rows_and_padding_equal_the_reference(make_planes: Any, dtype: torch.dtype) -> None:
    k, v = keys_and_values(12, 3, 16, dtype)
    k[0] = 0
    k[1, 0], k[1, 1], k[1, 2] = torch.finfo(dtype).max, torch.finfo(dtype).tiny, -0.0
    k[2] = 1e-40
    k[3, 1, 4], k[3, 2, 0], v[3, 0, 15] = torch.nan, -torch.inf, torch.inf
    v[5, 2, 7] = torch.nan
    k[6, 0, 0] = torch.nan
    slots = some_slots(12, 48)
    slots[6] = slots[9] = -1
    ours, theirs = ([make_planes(3, 3, 16, 16) for _ in "kv"] for _ in range(2))
    assert_equal_to_reference(k, v, slots, ours, theirs)
    stored = store_kv(k, v, slots, *ours)
    assert stored.non_finite.tolist() == [0, 0, 0, 3, 0, 1, 0, 0, 0, 0, 0, 0]


def test_reads_slices_of_a_fused_projection(make_planes: Any) -> None:
    fused = torch.randn(7, 8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    k, v = fused[:, 4:6], fused[:, 6:8]
    assert not k.is_contiguous()
    ours, theirs = ([make_planes(1, 2, 16, 64) for _ in "kv"] for _ in range(2))
    assert_equal_to_reference(k, v, torch.arange(7), ours, theirs)


def test_what_does_not_fit_is_refused_and_nothing_written(make_planes: Any) -> None:
    k, v = keys_and_values(4, 2, 64, torch.float32)
    slots = torch.arange(4)
    fp8 = [make_planes(1, 2, 16, 64) for _ in "kv"]
    with pytest.raises(ValueError, match="FP8 or bf16"):
        store_kv(k, v, slots, *[make_planes(1, 2, 16, 64, "fp32") for _ in "kv"])
    with pytest.raises(ValueError, match="must agree"):
        store_kv(k, v.bfloat16(), slots, *fp8)
    with pytest.raises(ValueError, match="slots"):
        store_kv(k, v, slots.int(), *fp8)
    with pytest.raises(ValueError, match="heads"):
        store_kv(k[:, :1], v[:, :1], slots, *fp8)
    assert all((planes.payload == 0xFF).all() for planes in fp8)
