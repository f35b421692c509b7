"""What a checkpoint's config.json says, in the field's terms. Knows shapes and names, no tensor.

Accepts the keys of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and of transformers 5
(`rope_parameters`, `dtype`). Whatever would change the numbers and is not served is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..core.errors import CheckpointError
from ..kv.spec import CODEC_NAMES, KvSpec, attention_spec

DType = Literal["bfloat16", "float32"]
DTYPE_BYTES: dict[str, int] = {"bfloat16": 2, "float32": 4}

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
_REFUSED_FLAGS = ("attention_bias", "mlp_bias", "quantization_config", "sliding_window", "num_local_experts")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched for a longer context. Source: the Llama 3.1 release ("llama3")."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 8192


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The shape of a decoder. `dtype` is the checkpoint's own (float16 counts as bfloat16, its nearest kin here)."""

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied_embeddings: bool
    max_model_len: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    dtype: DType

    @property
    def qkv_size(self) -> int:
        """Columns of the fused query, key and value projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Numbers in the checkpoint; tied embeddings count once."""
        attention = self.hidden_size * self.qkv_size + self.num_heads * self.head_dim * self.hidden_size
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return embeddings + self.num_layers * layer + self.hidden_size

    def weight_bytes(self, dtype: DType) -> int:
        """Bytes of the weights held in `dtype`."""
        return self.num_parameters * DTYPE_BYTES[dtype]

    def kv_spec(self, codec: str) -> KvSpec:
        """What one token leaves in the cache. `codec`: a name of `--kv-cache-dtype` other than auto."""
        return attention_spec(self.num_layers, self.num_kv_heads, self.head_dim, CODEC_NAMES[codec])


def load_spec(directory: Path) -> ModelSpec:
    """Read config.json, and the ids of generation_config.json where there is one.

    Raises:
        CheckpointError: a file is missing or no JSON, or the model is one that we do not serve; names the field.
    """
    config = _read_json(directory / "config.json")
    generation_file = directory / "generation_config.json"
    generation = _read_json(generation_file) if generation_file.exists() else {}
    return spec_from_config(config, generation, str(directory))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; give a directory in Hugging Face's format") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object; fetch it again")
    return value


def spec_from_config(config: Mapping[str, Any], generation: Mapping[str, Any], where: str) -> ModelSpec:
    """`load_spec` on values already read; `where` names the checkpoint in errors."""
    fields = _Fields(config, where)
    names = config.get("architectures") or [f"(none; model_type {config.get('model_type')!r})"]
    if names[0] not in ARCHITECTURES:
        raise CheckpointError(f"{where}: architecture {names[0]} is not served; served: {', '.join(ARCHITECTURES)}")
    for flag in _REFUSED_FLAGS:
        if config.get(flag):
            raise CheckpointError(f"{where}: config.json sets {flag} = {config[flag]!r}, which is not served yet")
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{where}: hidden_act is {config['hidden_act']!r}; only 'silu' is served")
    hidden_size, num_heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    num_kv_heads = fields.count("num_key_value_heads", num_heads)
    head_dim = fields.count("head_dim", hidden_size // num_heads)
    if num_heads % num_kv_heads or head_dim % 2:
        raise CheckpointError(
            f"{where}: {num_heads} heads, {num_kv_heads} KV heads, head_dim {head_dim}: "
            "heads must be a multiple of KV heads, head_dim even; config.json is damaged"
        )
    theta, scaling = _rope(config, fields)
    return ModelSpec(
        architecture=names[0],
        hidden_size=hidden_size,
        num_layers=fields.count("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.count("intermediate_size"),
        vocab_size=fields.count("vocab_size"),
        rms_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        max_model_len=fields.count("max_position_embeddings", 2048),
        bos_id=_first(_ids(config, "bos_token_id", where) or _ids(generation, "bos_token_id", where)),
        eos_ids=tuple(
            dict.fromkeys(_ids(config, "eos_token_id", where) + _ids(generation, "eos_token_id", where)),
        ),
        dtype=_dtype(config, where),
    )


class _Fields:
    """Typed look-ups in a config that name the field they fail on."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config = config
        self.where = where

    def count(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{self.where}: {name} is {value!r}; must be a whole number above 0")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise CheckpointError(f"{self.where}: {name} is {value!r}; must be a number above 0")
        return float(value)

    def _get(self, name: str, default: float | None) -> Any:
        value = self.config.get(name)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self.where}: config.json has no {name}; fetch it again")
        return value


def _rope(config: Mapping[str, Any], outer: _Fields) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    where = outer.where
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise CheckpointError(f"{where}: rope parameters are {parameters!r}; must be an object")
    inner = _Fields(parameters, f"{where} (rope)")
    theta = inner.number("rope_theta") if "rope_theta" in parameters else outer.number("rope_theta", 10000.0)
    partial = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise CheckpointError(f"{where}: partial_rotary_factor is {partial!r}; only whole heads are rotated yet")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", inner.number("factor"))
    if kind == "llama3":
        scaling = RopeScaling(
            "llama3",
            inner.number("factor"),
            inner.number("low_freq_factor"),
            inner.number("high_freq_factor"),
            inner.count("original_max_position_embeddings"),
        )
        if scaling.high_freq_factor <= scaling.low_freq_factor:
            raise CheckpointError(f"{where}: rope high_freq_factor must be above low_freq_factor; got {parameters!r}")
        return theta, scaling
    raise CheckpointError(f"{where}: rope type {kind!r} is not served yet; served: default, linear, llama3")


def _ids(config: Mapping[str, Any], name: str, where: str) -> tuple[int, ...]:
    value = config.get(name)
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise CheckpointError(f"{where}: {name} is {value!r}; must be token ids")
    return ids


def _first(ids: tuple[int, ...]) -> int | None:
    return ids[0] if ids else None


def _dtype(config: Mapping[str, Any], where: str) -> DType:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name == "float32":
        return "float32"
    if name in ("bfloat16", "float16"):
        return "bfloat16"
    raise CheckpointError(f"{where}: dtype is {name!r}; served: float32, bfloat16, float16 (as bfloat16)")
