"""Readers of families whose layers are mostly recurrent: Qwen3-Next, Qwen3.5 and later. Knows no tensor.

Three of four layers are gated delta nets, every fourth attends to all tokens and gates its output. Most checkpoints of
Qwen3.5 and later hold a vision part too; their text model is read alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core.errors import CheckpointError
from .config_fields import Fields
from .config_rope import rope_of, shared_parameters
from .family_parts import Family, act, checked, num_experts, plain_attention, sparse_layers
from .spec import DeltaNet, DenseFfn, ExpertsFfn, LayerSpec, Routing

NESTED = ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration")
"""Architectures whose config has the text model's fields in `text_config`."""

_PREDICTION, _VISION = "mtp.", "model.visual."  # beginnings of the names of tensors that the text model does not use
_OUTER = ("tie_word_embeddings", "quantization_config", "compression_config", "dtype", "torch_dtype")


def text_part(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The text model's config out of one with `text_config`; `_OUTER` fields beside it hold for the text model too.

    Raises:
        CheckpointError: there is no `text_config`.
    """
    text = Fields(config, where).mapping("text_config")
    if not text:
        raise CheckpointError(f"{where}: config.json has no text_config; fetch it again")
    outer = {name: config[name] for name in _OUTER if config.get(name) is not None}
    return {**outer, **{k: v for k, v in text.items() if v is not None}, "architectures": config["architectures"]}


def qwen3_next(config: Fields) -> Family:
    """Read Qwen3-Next: experts with a shared one in (mostly) every layer."""
    defaults = {"num_experts": 512, "num_experts_per_tok": 10, "norm_topk_prob": True}
    widths = {"intermediate_size": 5632, "moe_intermediate_size": 512}
    layers = sparse_layers(
        _with_defaults(config, **defaults, **widths),
        [None] * config.count("num_hidden_layers"),
        shared_width=config.count("shared_expert_intermediate_size", 512),
        shared_gate=True,
    )
    return _hybrid(config, tuple(layer.ffn for layer in layers))


def qwen3_5(config: Fields) -> Family:
    """Read the dense models of Qwen3.5 and later."""
    return _hybrid(config, (DenseFfn(config.count("intermediate_size")),) * config.count("num_hidden_layers"))


def qwen3_5_moe(config: Fields) -> Family:
    """Read the models of Qwen3.5 and later with experts: in every layer, weights of the chosen ones sum to one."""
    routing = Routing(num_experts(config, 256), config.count("num_experts_per_tok", 8), normalised=True)
    shared = config.count("shared_expert_intermediate_size", 512)
    width = config.count("moe_intermediate_size", 512)
    ffn = ExpertsFfn(width, checked(config, routing), shared, shared_gate=True)
    return _hybrid(config, (ffn,) * config.count("num_hidden_layers"))


def _hybrid(config: Fields, ffns: tuple[DenseFfn | ExpertsFfn, ...]) -> Family:
    """Family with these feed-forward layers, one per layer."""
    config.refuse("attn_logit_softcapping", "final_logit_softcapping", "mlp_bias", "sliding_window")
    if not config.flag("attn_output_gate", True):
        raise CheckpointError(f"{config.where}: attn_output_gate is false; {config.architecture} is served with it")
    bias = config.flag("attention_bias")
    attention = plain_attention(
        _with_defaults(config, num_key_value_heads=2),
        head_dim=256, qkv_bias=bias, output_bias=bias, head_norms=True, output_gate=True,
    )  # fmt: skip
    layers = tuple(
        LayerSpec(ffn, mixer="attention" if attends else "delta")
        for ffn, attends in zip(ffns, _attends(config), strict=True)
    )
    part = config.config.get("partial_rotary_factor", 0.25)
    parameters = {"partial_rotary_factor": part, **shared_parameters(config)}
    # The three positions of a text's token (time, height, width) are equal: mrope_section changes nothing.
    rope = rope_of(config, parameters, attention.head_dim, theta=config.number("rope_theta", 10000.0), partial=True)
    hybrid = {"norm_offset": 1.0, "delta": _delta(config), "ignored": (_PREDICTION, _VISION)}
    return Family(attention, layers, rope, act(config), hybrid=hybrid)


def _with_defaults(config: Fields, **defaults: object) -> Fields:
    given = {name: value for name, value in config.config.items() if value is not None}
    return Fields({**defaults, **given}, config.where)


def _attends(config: Fields) -> list[bool]:
    """Per layer, True if it attends: from `layer_types`, else every `full_attention_interval`-th layer."""
    count, kinds = config.count("num_hidden_layers"), config.config.get("layer_types")
    if kinds is None:
        interval = config.count("full_attention_interval", 4)
        return [(i + 1) % interval == 0 for i in range(count)]
    served = ("linear_attention", "full_attention")
    if not isinstance(kinds, list) or len(kinds) != count or any(kind not in served for kind in kinds):
        raise config.wrong("layer_types", kinds, f"a list of {count} kinds, one per layer, of {', '.join(served)}")
    attends = [kind == "full_attention" for kind in kinds]
    if not any(attends) or all(attends):
        raise config.wrong("layer_types", kinds, "of both kinds, each at least once")
    return attends


def _delta(config: Fields) -> DeltaNet:
    delta = DeltaNet(
        num_key_heads=config.count("linear_num_key_heads", 16),
        num_value_heads=config.count("linear_num_value_heads", 32),
        key_width=config.count("linear_key_head_dim", 128),
        value_width=config.count("linear_value_head_dim", 128),
        num_taps=config.count("linear_conv_kernel_dim", 4),
    )
    if delta.num_value_heads % delta.num_key_heads or delta.num_taps < 2:
        raise CheckpointError(
            f"{config.where}: {delta.num_value_heads} value heads for {delta.num_key_heads} key heads and "
            f"{delta.num_taps} taps: value heads must be a multiple, taps 2 at least; config.json is damaged"
        )
    return delta
