"""bitsandbytes' checkpoints: 4 bits by a table (NF4, FP4), and LLM.int8(). Knows keys and shapes.

Source: bitsandbytes 0.50, QuantState.as_dict and Linear8bitLt; Dettmers et al. 2022 and 2023.
"""

from __future__ import annotations

import json
from math import prod
from typing import Any

from .headers import FLOATS, ITEM_BYTES, ModuleTensors, StoredTensor
from .keys import Keys
from .matrices import ScaledMatrix, StoredMatrix, TableMatrix
from .methods import INFORMATIVE, activation_remark

_STATE = "weight.quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")
_INFORMATIVE = (
    *INFORMATIVE,
    *("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit", "bnb_4bit_compute_dtype"),
    *("bnb_4bit_quant_type", "bnb_4bit_quant_storage", "bnb_4bit_use_double_quant", "llm_int8_threshold"),
    *("llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight", "kv_cache_scheme"),
)


class BitsAndBytes:
    """Implements `Method`. Each 4-bit matrix describes itself: no key of the config changes its numbers."""

    roles = (
        *("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
        *(_STATE + kind for kind in _KINDS),
        *("SCB", "weight_format", "CB"),
    )

    def __init__(self, keys: Keys) -> None:
        keys.know((), _INFORMATIVE)
        is_8bit = keys.flag("load_in_8bit", default=keys.flag("_load_in_8bit", default=False))
        remark = activation_remark("activations to 8 bits except outliers (LLM.int8())")
        self.remarks: tuple[str, ...] = (remark,) if is_8bit else ()

    def matrix(self, tensors: ModuleTensors) -> StoredMatrix:
        """Implements `Method.matrix`."""
        state = next((role for role in tensors.by_role if role.startswith(_STATE)), None)
        return _int8(tensors) if state is None else _table(tensors, state)


def _int8(tensors: ModuleTensors) -> ScaledMatrix:
    tensors.only("weight", "SCB", "weight_format")
    weight = tensors.matrix("weight", ("I8",))
    if "weight_format" in tensors.by_role:
        form = tensors.need("weight_format", ("U8",))
        if any(form.read()):
            raise form.wrong("names a form of another GPU generation; served: row (0)")
    rows, columns = weight.shape
    scale = tensors.need("SCB", ("F32",), (rows,))
    return ScaledMatrix(rows, columns, weight.name, scale.name, (1, columns), divisor=127)


def _table(tensors: ModuleTensors, state_role: str) -> TableMatrix:
    state = tensors.need(state_role, ("U8",))
    said = _read_state(state)
    rows, columns = said["shape"]
    numbers, block = rows * columns, said["blocksize"]
    weight = tensors.need("weight", tuple(ITEM_BYTES))
    if weight.size_bytes != -(-numbers // 2):
        raise weight.wrong(f"has {weight.size_bytes} bytes; {rows} x {columns} numbers take {-(-numbers // 2)}")
    table = tensors.need("weight.quant_map", ("F32",), (16,))
    magnitudes = -(-numbers // block)
    if "nested_blocksize" not in said:
        tensors.only("weight", state_role, "weight.absmax", "weight.quant_map")
        scale = tensors.need("weight.absmax", FLOATS, (magnitudes,))
        return TableMatrix(rows, columns, weight.name, scale.name, table.name, block)
    nested_block = said["nested_blocksize"]
    tensors.only(*BitsAndBytes.roles[:5], state_role)
    scale = tensors.need("weight.absmax", ("U8",), (magnitudes,))
    nested = tensors.need("weight.nested_absmax", ("F32",), (-(-magnitudes // nested_block),))
    codes = tensors.need("weight.nested_quant_map", ("F32",), (256,))
    return TableMatrix(
        rows,
        columns,
        weight.name,
        scale.name,
        table.name,
        block,
        nested=nested.name,
        nested_table=codes.name,
        nested_block=nested_block,
        offset=float(said["nested_offset"]),
    )


def _read_state(state: StoredTensor) -> dict[str, Any]:
    """Read a matrix's description of itself, and check its types."""
    try:
        said = json.loads(state.read())
        counts = [*said["shape"], said["blocksize"], said.get("nested_blocksize", 1)]
        good = len(said["shape"]) == 2 and all(type(count) is int and count > 0 for count in counts)
        good = good and isinstance(said.get("nested_offset", 0.0), int | float) and prod(counts[:2]) < 1 << 48
        good = good and ("nested_blocksize" in said) == ("nested_offset" in said)
    except (ValueError, KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise state.wrong("describes no matrix")
    return dict(said)
