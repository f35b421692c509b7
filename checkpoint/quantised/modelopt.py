"""NVIDIA ModelOpt's checkpoints: FP8 and NVFP4, one for all matrices or a choice per layer. Knows keys and shapes.

The config stands in config.json, or in hf_quant_config.json beside it.
Source: nvidia-modelopt 0.47, export of Hugging Face checkpoints.
"""

from __future__ import annotations

from ...core.errors import CheckpointError
from .headers import ModuleTensors
from .keys import Keys
from .matrices import Float4Matrix, StoredMatrix
from .methods import INFORMATIVE, activation_remark, scaled

ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4")
MIXED = "MIXED_PRECISION"
_PB_BLOCK = (128, 128)
_ROUNDS = {"FP8": "8", "FP8_PER_CHANNEL_PER_TOKEN": "8", "NVFP4": "4"}


class Modelopt:
    """Implements `Method`."""

    roles = ("weight", "weight_scale", "weight_scale_2")

    def __init__(self, keys: Keys) -> None:
        keys.know(
            ("quant_algo", "group_size", "quantized_layers"),
            (*INFORMATIVE, "ignore", "exclude_modules", "kv_cache_quant_algo", "kv_cache_scheme", "config_groups"),
        )
        self._where = keys.where
        algorithm = keys.one_of("quant_algo", (*ALGORITHMS, MIXED))
        self._group = keys.count("group_size", 16)
        layers = keys.section("quantized_layers")
        self._by_layer = {name: self._of_layer(layers.section(name)) for name in layers.config}
        self._algorithm = None if algorithm == MIXED else str(algorithm)
        used = {algorithm, *(each for each, _ in self._by_layer.values())}
        self.remarks = tuple(
            activation_remark(f"activations to {bits} bits ({each})") for each, bits in _ROUNDS.items() if each in used
        )

    def _of_layer(self, keys: Keys) -> tuple[str, int]:
        keys.know(("quant_algo", "group_size"), ())
        return str(keys.one_of("quant_algo", ALGORITHMS)), keys.count("group_size", self._group)

    def matrix(self, tensors: ModuleTensors) -> StoredMatrix:
        """Implements `Method.matrix`."""
        algorithm, group = self._by_layer.get(tensors.module, (self._algorithm, self._group))
        if algorithm is None:
            beside = next(iter(tensors.by_role.values()))
            raise CheckpointError(
                f"{beside.file} holds {beside.name}, and {self._where}.quantized_layers lacks {tensors.module}; "
                "take another export of the model"
            )
        if algorithm.endswith("NVFP4"):
            return nvfp4_matrix(tensors, group)
        tensors.only("weight", "weight_scale")
        return scaled(tensors, "weight_scale", _PB_BLOCK if algorithm == "FP8_PB_WO" else None)


def nvfp4_matrix(tensors: ModuleTensors, group: int) -> Float4Matrix:
    """A matrix of e2m1 numbers with e4m3 scales and a scale of the tensor. Raises as `Method.matrix`."""
    tensors.only("weight", "weight_scale", "weight_scale_2")
    weight = tensors.matrix("weight", ("U8",))
    rows, columns = weight.shape[0], weight.shape[1] * 2
    if columns % group:
        raise weight.wrong(f"has {columns} columns, which are no groups of {group}")
    scale = tensors.need("weight_scale", ("F8_E4M3",), (rows, columns // group))
    whole = tensors.need("weight_scale_2", ("F32",), (), (1,))
    return Float4Matrix(rows, columns, weight.name, scale.name, group, whole.name)
