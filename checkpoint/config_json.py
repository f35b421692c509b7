"""Reads a checkpoint's config.json into a `ModelSpec`. Knows files and fields, no tensor.

Accepts the keys of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and of transformers 5
(`rope_parameters`, `dtype`). Unsupported fields that would change the results are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ..core.errors import CheckpointError
from .config_fields import Fields, read_json
from .families import FAMILIES
from .gguf.config import read_config
from .gguf.file import is_gguf
from .hybrid_families import NESTED, text_part
from .layout import EMBEDDING, HEAD
from .quantised.plan import config_keys, find_plan, method_of
from .safetensors_files import differ
from .spec import DType, ModelSpec

# Fields of families that are not served; they would change the results.
_NEVER_SERVED = (
    "alibi",
    "use_alibi",
    "attention_sinks",
    "attention_multiplier",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "logit_scale",
    "is_encoder_decoder",
    "add_cross_attention",
)


def load_spec(path: Path) -> ModelSpec:
    """Read the spec of a checkpoint: from config.json and generation_config.json (if it exists), or from a GGUF file.

    If config.json ties the head to the embedding but the checkpoint contains a different head, this head is used.
    The headers of a quantised checkpoint are read too, and its tensors checked against its format.

    Raises:
        CheckpointError: a file is missing or no JSON, or the model or its quantisation is not supported; names the
            field or the tensor.
    """
    if is_gguf(path):
        return spec_from_config(*read_config(path), str(path))
    config = read_json(path / "config.json")
    generation_file = path / "generation_config.json"
    generation = read_json(generation_file) if generation_file.exists() else {}
    spec = spec_from_config(config, generation, str(path))
    plan = find_plan(path, config)
    if plan is not None:
        spec = replace(spec, remarks=(*spec.remarks, *plan.remarks))
    if spec.tied_embeddings and ((plan is not None and HEAD in plan.matrices) or differ(path, EMBEDDING, HEAD)):
        remark = f"config.json ties {HEAD} to the embedding; the checkpoint holds another one, which is used"
        return replace(spec, tied_embeddings=False, remarks=(*spec.remarks, remark))
    return spec


def spec_from_config(config: Mapping[str, Any], generation: Mapping[str, Any], where: str) -> ModelSpec:
    """Make the spec from values already read. `where` names the checkpoint in errors."""
    names = config.get("architectures") or [f"(none; model_type {config.get('model_type')!r})"]
    if names[0] in NESTED:
        config = text_part(config, where)
    fields, more = Fields(config, where), Fields(generation, where)
    if names[0] not in FAMILIES:
        raise CheckpointError(f"{where}: architecture {names[0]} is not served; {_remedy(config)}")
    keys = config_keys(config, where)
    if keys is not None:
        method_of(keys)  # refuses what is not served
    if config.get("vision_config"):
        raise CheckpointError(f"{where}: config.json sets vision_config; {_remedy(config)}")
    if config.get("text_config"):
        raise CheckpointError(
            f"{where}: config.json nests text_config beside its own fields; give the config of the text model alone"
        )
    fields.refuse(*_NEVER_SERVED)
    family = FAMILIES[names[0]](fields)
    vocab_size, dtype = fields.count("vocab_size"), _dtype(config, where)
    eos_ids, remarks = _ends(fields.ids("eos_token_id") + more.ids("eos_token_id"), vocab_size, where)
    if dtype == "float16":
        remarks += ("float16 weights count as bfloat16, which rounds them; model.dtype: float32 keeps them",)
    if names[0] in NESTED:
        remarks += ("its vision part is not loaded: it answers texts, and refuses images",)
    ropes = (family.rope.spec,) + ((family.local_rope.spec,) if family.local_rope else ())
    return ModelSpec(
        architecture=names[0],
        hidden_size=fields.count("hidden_size"),
        vocab_size=vocab_size,
        attention=family.attention,
        layers=family.layers,
        ropes=ropes,
        activation=family.activation,
        rms_eps=fields.number("rms_norm_eps", family.rms_eps),
        tied_embeddings=fields.flag("tie_word_embeddings", family.gemma is not None),
        max_model_len=family.rope.max_len,
        bos_id=next(iter(fields.ids("bos_token_id") or more.ids("bos_token_id")), None),
        eos_ids=eos_ids,
        dtype="float32" if dtype == "float32" else "bfloat16",
        remarks=remarks,
        extra_layers=family.extra_layers,
        **(family.gemma or family.hybrid or {}),
    )


def _remedy(config: Mapping[str, Any]) -> str:
    if config.get("vision_config") or config.get("audio_config"):
        return "models with vision or audio are not served, their text part alone neither; give a text-only checkpoint"
    return f"served: {', '.join(FAMILIES)}"


def _ends(ids: tuple[int, ...], vocab_size: int, where: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Distinct end-of-text ids inside the vocabulary, and a remark on those outside of it.

    Raises:
        CheckpointError: all of them are outside.
    """
    inside = tuple(dict.fromkeys(i for i in ids if i < vocab_size))
    outside = sorted({i for i in ids if i >= vocab_size})
    if outside and not inside:
        raise CheckpointError(
            f"{where}: eos_token_id is {outside[0]}, and the vocabulary has {vocab_size} tokens; set it to the one "
            "that ends a text"
        )
    told = ", ".join(map(str, outside))
    return inside, (f"eos_token_id {told} is outside the vocabulary of {vocab_size}, and ignored",) if outside else ()


def _dtype(config: Mapping[str, Any], where: str) -> DType | Literal["float16"]:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name == "float32":
        return "float32"
    if name == "bfloat16":
        return "bfloat16"
    if name == "float16":
        return "float16"
    raise CheckpointError(f"{where}: dtype is {name!r}; served: float32, bfloat16, float16 (as bfloat16)")
