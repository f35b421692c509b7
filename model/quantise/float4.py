"""Four-bit floats, e2m1: rounding, and the scales of NVFP4 and MXFP4. Knows no method and no file.

    NVFP4: 16 columns share a scale of e4m3, which is divided by a scale of the tensor
    MXFP4: 32 columns share a power of two

Source: OCP Microscaling Formats 1.0, sections 5.3.3 and 6.3; compressed-tensors 0.20 (nvfp4 and mxfp4).
"""

from __future__ import annotations

import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E4M3_MAX, E2M1_MAX = 448.0, 6.0
_LEAST_EXPONENT = -126  # of a float32 that is not subnormal; E8M0 has one more below
EXPONENT_BIAS = 127  # of E8M0


def to_e2m1(x: Tensor) -> Tensor:
    """Round to the nearest value of e2m1, of two as near to the one whose last bit is 0; beyond 6 to 6."""
    return torch.copysign(torch.tensor(E2M1)[(codes_of(x) & 7).long()], x)


def codes_of(x: Tensor) -> Tensor:
    """Codes of x, rounded to e2m1: uint8, the sign in bit 3."""
    values = torch.tensor(E2M1)
    middles = (values[1:] + values[:-1]) / 2
    low = torch.bucketize(x.abs().contiguous(), middles)  # at a middle the lower one
    high = torch.bucketize(x.abs().contiguous(), middles, right=True)  # and here the upper one
    code = torch.where(low % 2 == 0, low, high).to(torch.uint8)
    return code | (torch.signbit(x).to(torch.uint8) << 3)


def float4_scales(groups: Tensor, most: Tensor, is_nvfp4: bool) -> tuple[Tensor, Tensor | None]:
    """Scales [rows, groups] of numbers [rows, groups, columns], and NVFP4's scale of the tensor, scalar.

    `most`: greatest magnitude under the scale of the tensor. A group of zeros gets the least scale.
    """
    tops = groups.abs().amax(-1)
    if not is_nvfp4:
        return _power_of_two(groups, tops), None
    whole = E4M3_MAX * E2M1_MAX / most if float(most) > 0 else torch.tensor(1.0)
    whole = whole.float().clamp(max=torch.finfo(torch.float32).max)
    least = torch.finfo(torch.float8_e4m3fn).tiny / 8  # the smallest subnormal number: no scale is 0
    local = (tops / E2M1_MAX * whole).clamp(min=least).to(torch.float8_e4m3fn).float()
    return local / whole, whole


def _power_of_two(groups: Tensor, tops: Tensor) -> Tensor:
    """Of the power under which the greatest number is in e2m1's last binade and the next one, that with less error.

    The standard takes the first, under which numbers beyond 6 are cut.
    """
    exponent = torch.frexp(tops).exponent - 1  # floor of the logarithm
    least_error, best = torch.full_like(tops, float("inf")), torch.ones_like(tops)
    for more in (0, 1):
        power = (exponent - 2 + more).clamp(min=_LEAST_EXPONENT)
        scale = torch.ldexp(torch.ones_like(tops), power)
        error = (to_e2m1(groups / scale.unsqueeze(-1)) * scale.unsqueeze(-1) - groups).square().sum(-1)
        best, least_error = torch.where(error < least_error, scale, best), torch.minimum(error, least_error)
    return best
