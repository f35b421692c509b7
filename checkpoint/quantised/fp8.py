"""FP8 checkpoints (`quant_method: fp8`, `fbgemm_fp8`): a scale per block, per tensor or per row. Knows keys and shapes.

Source: transformers, FineGrainedFP8Config and FbgemmFp8Config; DeepSeek-V3's model card for blocks of 128 x 128.
"""

from __future__ import annotations

from .headers import ModuleTensors
from .keys import Keys
from .matrices import StoredMatrix
from .methods import INFORMATIVE, scaled, static_remark

_CHANGING = ("activation_scheme", "fmt", "weight_block_size", "scale_fmt", "expert_dtype", "activation_scale_ub")
# Lists of modules are not read: which matrices are quantised, their own tensors tell.
_INFORMATIVE = (
    *INFORMATIVE,
    "modules_to_not_convert",
    "ignored_layers",
    "modules_to_convert",
    "dequantize",
    "kv_cache_scheme",
)


class Fp8:
    """Implements `Method`."""

    roles = ("weight", "weight_scale_inv", "weight_scale")

    def __init__(self, keys: Keys) -> None:
        keys.know(_CHANGING, _INFORMATIVE)
        keys.one_of("activation_scheme", ("dynamic", "static", None))
        keys.one_of("fmt", ("e4m3", "float8_e4m3fn", "e5m2", None))
        keys.one_of("scale_fmt", ("float", "ue8m0", None))
        keys.one_of("expert_dtype", ("fp8", None))
        self._block = _block(keys)
        self.remarks = static_remark(keys.config)
        if not self.remarks and keys.config.get("quant_method") == "fbgemm_fp8":
            self.remarks = static_remark({"activation_scheme": "dynamic"})

    def matrix(self, tensors: ModuleTensors) -> StoredMatrix:
        """Implements `Method.matrix`."""
        role = "weight_scale" if "weight_scale" in tensors.by_role else "weight_scale_inv"
        tensors.only("weight", role)
        return scaled(tensors, role, self._block)


def _block(keys: Keys) -> tuple[int, int] | None:
    value = keys.config.get("weight_block_size")
    if value is None:
        return None
    good = isinstance(value, list) and len(value) == 2
    if not good or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in value):
        raise keys.wrong("weight_block_size", value, "two whole numbers above 0, e.g. [128, 128]")
    return (value[0], value[1])
