"""AutoRound's checkpoints: GPTQ's, AWQ's or compressed-tensors' form, with settings per layer. Knows keys.

Source: auto-round 0.16, export_to_autoround and its inference backends.
"""

from __future__ import annotations

import re

from .awq import awq_matrix
from .gptq import BITS, gptq_matrix
from .headers import ModuleTensors
from .keys import Keys
from .matrices import StoredMatrix
from .methods import INFORMATIVE, refuse_other_bits

# Zero points are stored as they are in AutoRound's own form, and minus one in AutoGPTQ's.
_ZERO_OFFSETS = {
    "auto_round": 0,
    "auto_round:exllamav2": 0,
    "auto_round:tritonv2": 0,
    "auto_round:gptqmodel": 0,
    "auto_round:auto_gptq": 1,
    "auto_round:gptq": 1,
    "auto_gptq": 1,
}
_AWQ = ("auto_round:auto_awq", "auto_round:awq", "auto_awq")
_LAYER_INFORMATIVE = ("sym", "super_bits", "super_group_size", "scale_dtype", "fixed_by_user")
_LAYER = ("bits", "group_size", "data_type", "act_bits", "act_data_type", "act_group_size", "act_sym", "act_dynamic")
_INFORMATIVE = (
    *INFORMATIVE,
    *_LAYER_INFORMATIVE,
    *("autoround_version", "iters", "nsamples", "seqlen", "lr", "minmax_lr", "batch_size", "enable_minmax_tuning"),
    *("enable_quanted_input", "low_gpu_mem_usage", "amp", "gradient_accumulate_steps", "to_quant_block_names"),
    *(
        "block_name_to_quantize",
        "quant_block_list",
        "enable_norm_bias_tuning",
        "static_attention_dtype",
        "supported_types",
    ),
    *(
        "backend",
        "dataset",
        "enable_alg_ext",
        "momentum",
        "sampler",
        "not_use_best_mse",
        "dynamic_max_gap",
        "modules_to_not_convert",
    ),
)


class AutoRound:
    """Implements `Method`."""

    roles = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, keys: Keys) -> None:
        keys.know((*_LAYER, "packing_format", "extra_config"), _INFORMATIVE)
        self._packing = str(keys.one_of("packing_format", (*_ZERO_OFFSETS, *_AWQ), "auto_round:auto_gptq"))
        self._bits, self._group = self._settings(keys, None)
        layers = keys.section("extra_config")
        self._layers = [
            (name, re.compile(name) if any(c in name for c in "*^$|[") else None, self._layer(layers.section(name)))
            for name in layers.config
        ]
        self.remarks: tuple[str, ...] = ()

    def matrix(self, tensors: ModuleTensors) -> StoredMatrix:
        """Implements `Method.matrix`."""
        bits, group = self._of(tensors.module)
        if self._packing in _AWQ:
            return awq_matrix(tensors, group, has_zeros=True)
        return gptq_matrix(tensors, bits, group, _ZERO_OFFSETS[self._packing])

    def _of(self, module: str) -> tuple[int, int]:
        for name, pattern, settings in self._layers:
            if settings and (name == module or (pattern is not None and pattern.search(module))):
                return settings
        return self._bits, self._group

    def _layer(self, keys: Keys) -> tuple[int, int] | None:
        """Settings of a layer; None: it stays a float matrix."""
        keys.know(_LAYER, _LAYER_INFORMATIVE)
        bits = keys.count("bits", self._bits)
        return None if bits >= 16 else self._settings(keys, (self._bits, self._group))

    def _settings(self, keys: Keys, base: tuple[int, int] | None) -> tuple[int, int]:
        bits = keys.count("bits", base[0] if base else None)
        refuse_other_bits(keys, bits, (4,) if self._packing in _AWQ else BITS)
        keys.one_of("data_type", ("int", "int_sym", "int_asym", "int_asym_dq", None))
        if (keys.config.get("act_bits") or 16) < 16:
            raise keys.wrong(
                "act_bits", keys.config["act_bits"], "16: activations are not rounded; take such an export"
            )
        group = keys.config.get("group_size", base[1] if base else 128)
        if not isinstance(group, int) or isinstance(group, bool) or group == 0 or group < -1:
            raise keys.wrong("group_size", group, "a whole number above 0, or -1")
        return bits, group
