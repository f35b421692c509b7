"""MXFP4 checkpoints of gpt-oss (`quant_method: mxfp4`): stacks of all experts' matrices. Knows keys and shapes.

    experts.gate_up_proj_blocks [experts, 2 * width, in / 32, 16] bytes: two numbers each, the first in the low bits
    experts.gate_up_proj_scales [experts, 2 * width, in / 32]            rows are gate, up, gate, up, …
    experts.down_proj_blocks, experts.down_proj_scales

All else is stored as floats. Source: transformers, integrations/mxfp4.py; OCP Microscaling Formats 1.0.
"""

from __future__ import annotations

from ..stacked import named_rows
from .headers import EXPONENTS, ModuleTensors, StoredTensor
from .keys import Keys
from .matrices import StackedFloat4Matrix
from .methods import INFORMATIVE

_MATRICES = ("gate_up_proj", "down_proj")
_GROUP_BYTES = 16


class Mxfp4:
    """As `Method`, but a module holds the matrices of all experts."""

    roles = tuple(f"{matrix}_{part}" for matrix in _MATRICES for part in ("blocks", "scales"))
    remarks: tuple[str, ...] = ()

    def __init__(self, keys: Keys) -> None:
        # Which modules are quantised, their own tensors tell.
        keys.know((), (*INFORMATIVE, "modules_to_not_convert", "dequantize"))

    def matrices(self, tensors: ModuleTensors) -> dict[str, StackedFloat4Matrix]:
        """How each expert's matrices are stored, by the names of the float ones. Raises as `Method.matrix`."""
        tensors.only(*self.roles)
        found: dict[str, StackedFloat4Matrix] = {}
        for matrix in _MATRICES:
            blocks = tensors.need(f"{matrix}_blocks", ("U8",))
            _check_blocks(blocks, len(named_rows(matrix)))
            num_experts, rows, groups, _ = blocks.shape
            scales = tensors.need(f"{matrix}_scales", EXPONENTS, (num_experts, rows, groups))
            for projection, first, step in named_rows(matrix):
                shape = rows // step, groups * _GROUP_BYTES * 2
                for expert in range(num_experts):
                    one = StackedFloat4Matrix(*shape, blocks.name, scales.name, expert, first, step)
                    found[f"{tensors.module}.{expert}.{projection}.weight"] = one
        return found


def _check_blocks(blocks: StoredTensor, row_multiple: int) -> None:
    shape = blocks.shape
    if len(shape) != 4 or shape[3] != _GROUP_BYTES or 0 in shape or shape[1] % row_multiple:
        raise blocks.wrong(f"has shape {list(shape)}; its format asks for [experts, rows, groups, {_GROUP_BYTES}]")
