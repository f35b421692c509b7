"""Cosines and sines of rotary positions, with all served kinds of context scaling. Knows positions, no model.

A cached key is rotated once and must stay valid. So an angle may depend on its absolute position and on the *served*
context length, but never on the current length of a text. Two kinds of scaling depend on a length:

    dynamic    the base is scaled for the served length, if that exceeds the original length
    longrope   the long factors, if the served length exceeds the original length, else the short factors

vLLM does the same. transformers changes the angles while a text grows. Both agree if the text has the served length, or
if neither length exceeds the original length.
Source: RoFormer (Su et al. 2021); NTK-aware scaling (bloc97, emozilla 2023); YaRN (Peng et al. 2023); LongRoPE (Ding et
al. 2024); the Llama 3.1 release.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...checkpoint.spec import RopeScaling, RopeSpec


def rotary_table(rope: RopeSpec, served_len: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [served_len, width / 2] float32 by absolute position.

    Angles are float32 products, as in training. Their cosines are computed in float64 and rounded once, so that an
    entry does not depend on the length of the table.
    """
    frequency = _frequencies(rope, served_len)
    angles = (torch.arange(served_len, dtype=torch.float32).unsqueeze(1) * frequency).double()
    magnitude = rope.scaling.magnitude if rope.scaling else 1.0
    return (torch.cos(angles) * magnitude).float(), (torch.sin(angles) * magnitude).float()


def _frequencies(rope: RopeSpec, served_len: int) -> Tensor:
    """Angle per position of each rotary pair, in radians: [width / 2] float32."""
    scaling, width = rope.scaling, rope.width
    exponent = torch.arange(0, width, 2, dtype=torch.int64).float() / width
    theta = rope.theta
    if scaling is not None and scaling.kind == "dynamic":
        length = max(served_len, scaling.original_max_len)
        stretch = scaling.factor * length / scaling.original_max_len - (scaling.factor - 1)
        theta *= stretch ** (width / (width - 2))
    frequency = 1.0 / (theta**exponent)
    if scaling is None or scaling.kind == "dynamic":
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    if scaling.kind == "longrope":
        is_long = served_len > scaling.original_max_len
        return frequency / torch.tensor(scaling.long_factors if is_long else scaling.short_factors)
    return _llama3(frequency, scaling) if scaling.kind == "llama3" else _yarn(frequency, scaling, rope)


def _llama3(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    """Frequencies of the Llama 3.1 scaling: short wavelengths unchanged, long ones divided, blended between."""
    wavelength = 2 * math.pi / frequency
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = ((scaling.original_max_len / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - blend) * frequency / scaling.factor + blend * frequency


def _yarn(frequency: Tensor, scaling: RopeScaling, rope: RopeSpec) -> Tensor:
    """Frequencies of YaRN: pairs with over beta_fast turns in the original length stay, under beta_slow are divided."""

    def pair_that_turns(times: float) -> float:
        turns = scaling.original_max_len / (times * 2 * math.pi)
        return rope.width * math.log(turns) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.width - 1)
    if low == high:
        high += 0.001
    divided = ((torch.arange(rope.width // 2, dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
    return frequency / scaling.factor * divided + frequency * (1 - divided)
