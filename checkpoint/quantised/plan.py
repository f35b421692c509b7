"""From a quantisation config and the headers of tensors to how each matrix is stored. Reads no numbers.

Which matrices are quantised, their own tensors tell: a `weight` of floats without scales is a float matrix, whatever
the config's lists of ignored modules say. How the others are stored, the config tells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import CheckpointError
from ..config_fields import read_json
from ..safetensors_files import QUANTISATION_FILE
from .auto_round import AutoRound
from .awq import Awq
from .bitsandbytes import BitsAndBytes
from .compressed_tensors import CompressedTensors
from .fp8 import Fp8
from .gptq import Gptq
from .headers import FLOATS, ModuleTensors, StoredTensor, read_headers
from .keys import Keys
from .matrices import StoredMatrix
from .methods import ACTIVATION_ROLES, Method
from .modelopt import Modelopt
from .mxfp4 import Mxfp4

METHODS: Mapping[str, Callable[[Keys], Method | Mxfp4]] = {
    "fp8": Fp8,
    "fbgemm_fp8": Fp8,
    "compressed-tensors": CompressedTensors,
    "gptq": Gptq,
    "awq": Awq,
    "modelopt": Modelopt,
    "modelopt_fp4": Modelopt,
    "bitsandbytes": BitsAndBytes,
    "mxfp4": Mxfp4,
    "auto-round": AutoRound,
    "intel/auto-round": AutoRound,
}
_CACHE_ROLES = ("k_scale", "v_scale", "q_scale", "prob_scale", "k_zero_point", "v_zero_point", "kv_scale")
_CACHE_KEYS = ("kv_cache_scheme", "kv_cache_quant_algo")


@dataclass(frozen=True, slots=True)
class QuantisedPlan:
    """How the tensors of a quantised checkpoint become the model's."""

    matrices: Mapping[str, StoredMatrix]  # by the name of the float matrix
    floats: Mapping[str, tuple[int, ...]]  # shapes of the tensors that are as in a float checkpoint
    remarks: tuple[str, ...]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the model that the checkpoint holds."""
        return {**self.floats, **{name: (matrix.rows, matrix.columns) for name, matrix in self.matrices.items()}}


def config_keys(config: Mapping[str, Any], where: str) -> Keys | None:
    """Quantisation config in config.json. None: it has none. Raises CheckpointError: it is no JSON object."""
    for key in ("quantization_config", "compression_config"):
        value = config.get(key)
        if value is not None and not isinstance(value, dict):
            raise CheckpointError(f"{where}: config.json's {key} is {value!r}; must be an object")
        if value:
            return Keys(_flattened(value), f"{where}: config.json's {key}")
    return None


def _keys_beside(file: Path) -> Keys | None:
    """Quantisation config in ModelOpt's own file; None: there is no such file."""
    if not file.is_file():
        return None
    value = _flattened(read_json(file))
    producer = value.get("producer")
    if "quant_algo" not in value:
        raise CheckpointError(f"{file} (of {producer}) has no quant_algo; fetch it again")
    return None if value["quant_algo"] is None else Keys({**value, "quant_method": "modelopt"}, str(file))


def _flattened(value: dict[str, Any]) -> dict[str, Any]:
    """ModelOpt nests its keys in `quantization`."""
    nested = value.get("quantization")
    return {**{k: v for k, v in value.items() if k != "quantization"}, **nested} if isinstance(nested, dict) else value


def find_plan(directory: Path, config: Mapping[str, Any]) -> QuantisedPlan | None:
    """Plan of a checkpoint, from its config and headers. None: its weights are floats.

    Raises:
        CheckpointError: the format, one of its keys, or a tensor is not served; names it and a remedy.
    """
    keys = config_keys(config, str(directory)) or _keys_beside(directory / QUANTISATION_FILE)
    return None if keys is None else make_plan(method_of(keys), read_headers(directory), keys)


def quantised_plan(directory: Path) -> QuantisedPlan | None:
    """Plan of a checkpoint by its files alone; None also without config.json. Raises as `find_plan`."""
    file = directory / "config.json"
    return find_plan(directory, read_json(file)) if file.is_file() else None


def method_of(keys: Keys) -> Method | Mxfp4:
    """The config's format. Raises CheckpointError: it is not served."""
    name = keys.config.get("quant_method")
    if name is None and "config_groups" in keys.config:
        name = "compressed-tensors"
    if not isinstance(name, str) or name not in METHODS:
        raise CheckpointError(
            f"{keys.where}: quant_method is {name!r}; served: {', '.join(METHODS)}. Take one of these, or "
            "the float checkpoint with model.quantization: int8 for 8-bit weights"
        )
    return METHODS[name](keys)


def make_plan(method: Method | Mxfp4, stored: Mapping[str, StoredTensor], keys: Keys) -> QuantisedPlan:
    """Plan of these tensors in a format. `keys`: the config, for remarks on the KV cache.

    Raises:
        CheckpointError: a tensor is missing, or has another dtype or shape than the format says; names it and its file.
    """
    modules = _by_module(stored, method.roles)
    quantised = [
        ModuleTensors(module, by_role)
        for module, by_role in modules.items()
        if set(by_role) != {"weight"} or by_role["weight"].dtype not in FLOATS
    ]
    matrices = {name: matrix for tensors in quantised for name, matrix in _matrices(method, tensors).items()}
    used = {tensor.name for tensors in quantised for tensor in tensors.by_role.values()}
    unread = {name for name in stored if name.rpartition(".")[2] in (*ACTIVATION_ROLES, *_CACHE_ROLES)}
    floats = {name: tensor for name, tensor in stored.items() if name not in used | unread}
    for tensor in floats.values():
        if tensor.dtype not in FLOATS:
            raise tensor.wrong(f"is {tensor.dtype} and belongs to no matrix of the config's format")
    shapes = {name: tensor.shape for name, tensor in floats.items()}
    return QuantisedPlan(
        matrices, shapes, (*_told(len(matrices), keys), *method.remarks, *_cache_remarks(stored, keys))
    )


def _matrices(method: Method | Mxfp4, tensors: ModuleTensors) -> Mapping[str, StoredMatrix]:
    if isinstance(method, Mxfp4):
        return method.matrices(tensors)
    return {f"{tensors.module}.weight": method.matrix(tensors)}


def _by_module(stored: Mapping[str, StoredTensor], roles: tuple[str, ...]) -> dict[str, dict[str, StoredTensor]]:
    """Tensors of matrices by module and role. A norm's weight is a module's only tensor, as a float matrix's is."""
    found: dict[str, dict[str, StoredTensor]] = {}
    longest_first = sorted(roles, key=len, reverse=True)
    for name, tensor in stored.items():
        for role in longest_first:
            if name.endswith("." + role):
                found.setdefault(name[: -len(role) - 1], {})[role] = tensor
                break
    return found


def _told(count: int, keys: Keys) -> tuple[str, ...]:
    name = keys.config.get("quant_method") or "compressed-tensors"
    if not count:
        return (f"no matrix is stored quantised, although the config names {name}",)
    return (
        f"{count} matrices are stored quantised ({name}); CPU kernels multiply those of 4-bit groups as stored, others "
        "are decoded while loading and held in the compute dtype; with model.quantization: int8, all in 8 bits",
    )


def _cache_remarks(stored: Mapping[str, StoredTensor], keys: Keys) -> tuple[str, ...]:
    found = [name for name in stored if name.rpartition(".")[2] in _CACHE_ROLES]
    wanted = [key for key in _CACHE_KEYS if keys.config.get(key)]
    if not found and not wanted:
        return ()
    named = " and ".join([*wanted, *found[:1]])
    return (f"{named}: not used, the FP8 cache measures a scale per token and head; cache.dtype chooses its codec",)
