"""Experts that a checkpoint stacks: the part of a stack that is one expert's tensor. Knows no numbers.

gpt-oss, known by its biases:

    experts.gate_up_proj [experts, in, 2 * width]    its columns are gate, up, gate, up, …
    experts.gate_up_proj_bias [experts, 2 * width]
    experts.down_proj [experts, width, out]          experts.down_proj_bias [experts, out]

Others, as Qwen3.5 and later, have matrices as they are used, and no bias:

    experts.gate_up_proj [experts, 2 * width, in]    gate, then up        experts.down_proj [experts, out, width]

Our names are those of families that stack nothing: matrices [out, in] of each expert. MXFP4 stacks are in
`quantised/mxfp4.py`.
Source: transformers, models/gpt_oss/modular_gpt_oss.py and models/qwen3_5_moe/modular_qwen3_5_moe.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

_STACK = re.compile(r"(.+\.mlp\.experts\.)(gate_up_proj|down_proj)(_bias)?")
_GATE_BIAS = "gate_up_proj_bias"


@dataclass(frozen=True, slots=True)
class StackedPart:
    """Place of one expert's tensor in a stack: entries `first`, `first + step`, … of the stack's last axis, turned.

    `is_whole`: the expert's entry of the stack as it is.
    """

    stored: str
    expert: int
    first: int
    step: int
    shape: tuple[int, ...]  # [out, in], or [out] of a bias
    is_whole: bool = False


def named_rows(matrix: str) -> tuple[tuple[str, int, int], ...]:
    """Name, first output and distance of outputs of each projection that a stack of `matrix` holds."""
    return (("gate_proj", 0, 2), ("up_proj", 1, 2)) if matrix == "gate_up_proj" else (("down_proj", 0, 1),)


def stacked_parts(shapes: Mapping[str, Sequence[int]]) -> dict[str, StackedPart]:
    """Place of every expert's tensor that stands in a stack, by our name. A stack of another form is left as it is."""
    found: dict[str, StackedPart] = {}
    for name, shape in shapes.items():
        match = _STACK.fullmatch(name)
        if match is None:
            continue
        if match[1] + _GATE_BIAS in shapes:
            found.update(_parts(name, match, tuple(shape)))
        elif len(shape) == 3:
            for expert in range(shape[0]):
                part = StackedPart(name, expert, 0, 1, tuple(shape[1:]), is_whole=True)
                found[f"{match[1]}{expert}.{match[2]}.weight"] = part
    return found


def _parts(name: str, match: re.Match[str], shape: tuple[int, ...]) -> Iterator[tuple[str, StackedPart]]:
    at, matrix, bias = match.groups()
    rows = named_rows(matrix)
    if len(shape) != (2 if bias else 3) or shape[-1] % len(rows):
        return
    for expert in range(shape[0]):
        for projection, first, step in rows:
            part = StackedPart(name, expert, first, step, (shape[-1] // step, *shape[1:-1]))
            yield f"{at}{expert}.{projection}.{'bias' if bias else 'weight'}", part
