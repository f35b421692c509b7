"""Reads PEFT's adapter_config.json. Knows no tensor and no model.

Every key is known here, or refused by name unless its value means "off": an adapter that was trained in another way
than the one computed would answer wrongly, without an error.
Source: LoRA (Hu et al. 2021); rsLoRA (Kalajdzievski 2023); the fields of `LoraConfig` in PEFT 0.21.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import CheckpointError
from ..config_fields import Fields

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20

# They tell of training, of the file's origin, or of what the names of the tensors say again.
_WITHOUT_EFFECT = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_version", "revision"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "eva_config"),
        *("qalora_group_size", "ensure_weight_tying", "runtime_config", "lora_ga_config", "corda_config"),
        *("loftq_config", "velora_config"),
    }
)
_READ = frozenset(
    {
        *("peft_type", "task_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias"),
        *("init_lora_weights", "fan_in_fan_out"),
    }
)
_REFUSED = {
    "use_dora": "DoRA also rescales the weights' columns",
    "modules_to_save": "whole modules would replace the model's",
    "lora_bias": "a bias is added to B",
    "layer_replication": "layers are repeated",
    "trainable_token_indices": "rows of the embedding are replaced",
    "target_parameters": "parameters outside of linear modules are adapted",
    "alora_invocation_tokens": "the adapter acts on a part of the prompt only",
    "use_qalora": "its A acts on pooled inputs",
    "use_bdlora": "its matrices are block-diagonal",
    "kasa_config": "the weights are truncated and rescaled",
    "arrow_config": "several adapters are mixed per token",
    "monteclora_config": "its matrices are sampled",
    "megatron_config": "it was trained on a model split by Megatron",
}
# Other ways to begin change the model's own weights, so that the adapter fits changed weights only.
_KEEPS_THE_BASE = ("gaussian", "eva", "orthogonal")
_LITERAL = re.compile(r"\^?[\w.]+")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What an adapter's config says about its numbers."""

    rank: int
    alpha: float
    root_scaled: bool  # rsLoRA: the scale is alpha / sqrt(rank), not alpha / rank
    ranks: tuple[tuple[str, int], ...]  # by module, where it differs; the first name that matches counts
    alphas: tuple[tuple[str, float], ...]

    def rank_of(self, module: str) -> int:
        """Rank of a module of the model, by its full name."""
        return next((rank for name, rank in self.ranks if _matches(name, module)), self.rank)

    def scale_of(self, module: str) -> float:
        """Factor of B·A in a module's weights."""
        alpha = next((alpha for name, alpha in self.alphas if _matches(name, module)), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.root_scaled else rank)


def _matches(name: str, module: str) -> bool:
    """PEFT takes a name for the end of a module's path; with "^" for all of it."""
    if name.startswith("^"):
        return module == name[1:]
    return module == name or module.endswith("." + name)


def read_config(directory: Path) -> tuple[AdapterConfig, bytes]:
    """The config of an adapter, and its canonical form, which is part of the adapter's digest.

    Raises:
        CheckpointError: the file is missing or damaged, or asks for what is not served; the message names the key.
    """
    path = directory / CONFIG_FILE
    try:
        if path.exists() and not path.is_file():  # a pipe would never be read, a device never end
            raise CheckpointError(f"{path} is no regular file; save the adapter again")
        with path.open("rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
        if len(text) > MAX_CONFIG_BYTES:
            raise CheckpointError(f"{path} has more than {MAX_CONFIG_BYTES} bytes")
        values = json.loads(text.decode())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); give the directory of an adapter that PEFT has saved"
        ) from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is no JSON object; save the adapter again")
    _refuse(values, str(path))
    fields = Fields(values, str(path))
    config = AdapterConfig(
        rank=fields.count("r"),
        alpha=fields.number("lora_alpha"),
        root_scaled=fields.flag("use_rslora"),
        ranks=tuple((name, int(rank)) for name, rank in _pattern(fields, "rank_pattern", whole=True)),
        alphas=_pattern(fields, "alpha_pattern", whole=False),
    )
    return config, json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


def _refuse(values: Mapping[str, Any], where: str) -> None:
    kind = str(values.get("peft_type"))
    if kind != "LORA":
        raise CheckpointError(f"{where}: peft_type is {kind}; served: LORA")
    task = values.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise CheckpointError(f"{where}: task_type is {task}; served: CAUSAL_LM")
    for key, value in values.items():
        if key in _READ or key in _WITHOUT_EFFECT or _is_off(value):
            continue
        why = _REFUSED.get(key, "this release does not know the key")
        raise CheckpointError(
            f"{where}: {key} is {json.dumps(value)[:100]}, and adapters with it are not served: {why}; "
            "merge the adapter into its model (PEFT's merge_and_unload) and serve that"
        )
    if values.get("bias", "none") not in (None, "none"):
        raise CheckpointError(f"{where}: bias is {values['bias']!r}; adapters that train biases are not served")
    if values.get("fan_in_fan_out"):
        raise CheckpointError(
            f"{where}: fan_in_fan_out is true, for weights stored transposed; no served model has any"
        )
    begins = values.get("init_lora_weights", True)
    if not (begins is None or isinstance(begins, bool) or begins in _KEEPS_THE_BASE):
        raise CheckpointError(
            f"{where}: init_lora_weights is {begins!r}, which changes the model's own weights before training; convert "
            "the adapter while saving it (PEFT's path_initial_model_for_weight_conversion)"
        )


def _is_off(value: object) -> bool:
    return value is None or value is False or value in ({}, [], "")


def _pattern(fields: Fields, key: str, *, whole: bool) -> tuple[tuple[str, float], ...]:
    found = []
    for name, value in fields.mapping(key).items():
        if not _LITERAL.fullmatch(name):
            raise CheckpointError(
                f"{fields.where}: {key} has {name!r}, a regular expression; served: names of modules, such as "
                "'q_proj' or 'model.layers.3.mlp.up_proj'"
            )
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value < math.inf or (whole and int(value) != value):
            raise CheckpointError(f"{fields.where}: {key} gives {name!r} the value {value!r}; must be a number above 0")
        found.append((name, value))
    return tuple(found)
