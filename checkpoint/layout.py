"""Names, shapes and sizes of the tensors of a model. Knows no tensor's numbers.

Names are Hugging Face's. Projections may be fused (`qkv_proj`, `gate_up_proj`), as in some exports, or separate.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from .spec import (
    DTYPE_BYTES,
    DeltaNet,
    DenseFfn,
    DType,
    ExpertsFfn,
    LatentAttention,
    ModelSpec,
    PlainAttention,
    Quantization,
)

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Matrix:
    """Matrix of the decoder: tensors with `columns` columns, joined by rows."""

    parts: tuple[tuple[str, int], ...]  # (name without ".weight", rows)
    columns: int
    bias: bool = False
    exact: bool = False  # never quantised

    @property
    def rows(self) -> int:
        """Sum of the rows of all parts."""
        return sum(rows for _, rows in self.parts)


@dataclass(slots=True)
class LayerLayout:
    """Matrices and vectors of one layer, by the decoder's names. Vectors are (full name, width)."""

    matrices: dict[str, Matrix] = field(default_factory=dict)
    vectors: dict[str, tuple[str, int]] = field(default_factory=dict)
    tables: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)  # (full name, shape)


@dataclass(frozen=True, slots=True)
class _Names:
    """Tensor names of a family's experts."""

    block: str = "mlp"
    router: str = "gate"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_experts"


_QWEN = _Names(shared="shared_expert")
_EXPERT_NAMES = {
    "MixtralForCausalLM": _Names("block_sparse_moe", gate="w1", up="w3", down="w2"),
    "Qwen2MoeForCausalLM": _QWEN,
    "Qwen3NextForCausalLM": _QWEN,
    "Qwen3_5MoeForCausalLM": _QWEN,
    "Qwen3_5MoeForConditionalGeneration": _QWEN,
    "GptOssForCausalLM": _Names(router="router"),
}


def layer_layout(spec: ModelSpec, index: int, present: Container[str]) -> LayerLayout:
    """Tensors of layer `index`. `present`: names in the checkpoint, which show whether projections are fused."""
    at, layout = f"model.layers.{index}.", LayerLayout()
    norms = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    if spec.sandwich_norms:
        norms |= {
            "after_attention": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "after_ffn": "post_feedforward_layernorm",
        }
    for ours, theirs in norms.items():
        layout.vectors[ours] = (f"{at}{theirs}.weight", spec.hidden_size)
    if spec.layers[index].mixer == "delta":
        assert spec.delta is not None
        _delta(layout, spec.delta, spec.hidden_size, at + "linear_attn.", present)
    elif isinstance(spec.attention, LatentAttention):
        _latent(layout, spec.attention, spec.hidden_size, at + "self_attn.")
    else:
        _plain(layout, spec.attention, spec.hidden_size, at + "self_attn.", present)
    ffn = spec.layers[index].ffn
    if isinstance(ffn, ExpertsFfn):
        _experts(layout, ffn, spec, at, present)
    else:
        layout.matrices.update(_dense(ffn, spec.hidden_size, at + "mlp.", present))
    return layout


def _plain(layout: LayerLayout, a: PlainAttention, hidden: int, at: str, present: Container[str]) -> None:
    q_size, kv_size = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    # With a gate, each query head's rows are followed by those of its gate.
    q_rows = 2 * q_size if a.output_gate else q_size
    parts: tuple[tuple[str, int], ...] = ((at + "q_proj", q_rows), (at + "k_proj", kv_size), (at + "v_proj", kv_size))
    if at + "qkv_proj.weight" in present:
        parts = ((at + "qkv_proj", q_size + 2 * kv_size),)
    layout.matrices["qkv"] = Matrix(parts, hidden, a.qkv_bias)
    layout.matrices["output"] = Matrix(((at + "o_proj", hidden),), q_size, a.output_bias)
    if a.head_norms:
        layout.vectors.update(
            {"q_norm": (at + "q_norm.weight", a.head_dim), "k_norm": (at + "k_norm.weight", a.head_dim)}
        )
    if a.sinks:
        layout.vectors["sinks"] = (at + "sinks", a.num_heads)


def _delta(layout: LayerLayout, d: DeltaNet, hidden: int, at: str, present: Container[str]) -> None:
    """Tensors of a gated delta net. Qwen3-Next joins the projections of each key head: weights.py takes them apart."""
    if at + "in_proj_qkvz.weight" in present:
        layout.matrices["input"] = Matrix(((at + "in_proj_qkvz", d.conv_width + d.values_width),), hidden)
        layout.matrices["rates"] = Matrix(((at + "in_proj_ba", 2 * d.num_value_heads),), hidden, exact=True)
    else:
        parts = ((at + "in_proj_qkv", d.conv_width), (at + "in_proj_z", d.values_width))
        layout.matrices["input"] = Matrix(parts, hidden)
        rates = ((at + "in_proj_b", d.num_value_heads), (at + "in_proj_a", d.num_value_heads))
        layout.matrices["rates"] = Matrix(rates, hidden, exact=True)
    layout.matrices["output"] = Matrix(((at + "out_proj", hidden),), d.values_width)
    layout.vectors["decay"] = (at + "A_log", d.num_value_heads)
    layout.vectors["step_bias"] = (at + "dt_bias", d.num_value_heads)
    layout.vectors["delta_norm"] = (at + "norm.weight", d.value_width)
    layout.tables["taps"] = (at + "conv1d.weight", (d.conv_width, 1, d.num_taps))


def _latent(layout: LayerLayout, a: LatentAttention, hidden: int, at: str) -> None:
    q_size = a.num_heads * (a.key_width + a.rope_width)
    if a.query_rank is None:
        layout.matrices["q"] = Matrix(((at + "q_proj", q_size),), hidden)
    else:
        layout.matrices["q_down"] = Matrix(((at + "q_a_proj", a.query_rank),), hidden, a.bias)
        layout.matrices["q"] = Matrix(((at + "q_b_proj", q_size),), a.query_rank)
        layout.vectors["q_norm"] = (at + "q_a_layernorm.weight", a.query_rank)
    layout.matrices["kv_down"] = Matrix(((at + "kv_a_proj_with_mqa", a.latent_width + a.rope_width),), hidden, a.bias)
    layout.vectors["kv_norm"] = (at + "kv_a_layernorm.weight", a.latent_width)
    kv_size = a.num_heads * (a.key_width + a.value_width)
    layout.matrices["kv_up"] = Matrix(((at + "kv_b_proj", kv_size),), a.latent_width)
    layout.matrices["output"] = Matrix(((at + "o_proj", hidden),), a.num_heads * a.value_width, a.bias)


def _dense(
    ffn: DenseFfn, hidden: int, at: str, present: Container[str], *, names: _Names = _Names(), prefix: str = ""
) -> dict[str, Matrix]:
    parts: tuple[tuple[str, int], ...] = ((at + names.gate, ffn.width), (at + names.up, ffn.width))
    if at + "gate_up_proj.weight" in present:
        parts = ((at + "gate_up_proj", 2 * ffn.width),)
    return {
        prefix + "gate_up": Matrix(parts, hidden, ffn.bias),
        prefix + "down": Matrix(((at + names.down, hidden),), ffn.width, ffn.bias),
    }


def _experts(layout: LayerLayout, ffn: ExpertsFfn, spec: ModelSpec, at: str, present: Container[str]) -> None:
    names, hidden, routing = _EXPERT_NAMES.get(spec.architecture, _Names()), spec.hidden_size, ffn.routing
    at += names.block + "."
    scored = [(at + names.router, routing.num_experts)]
    if ffn.shared_gate:
        scored.append((at + "shared_expert_gate", 1))
    layout.matrices["router"] = Matrix(tuple(scored), hidden, routing.bias, exact=True)
    if routing.correction:
        layout.vectors["correction"] = (at + "gate.e_score_correction_bias", routing.num_experts)
    for expert in range(routing.num_experts):
        one = DenseFfn(ffn.width, ffn.bias)
        layout.matrices.update(
            _dense(one, hidden, f"{at}experts.{expert}.", present, names=names, prefix=f"expert {expert} ")
        )
    if ffn.shared_width is not None:
        shared = DenseFfn(ffn.shared_width, ffn.shared_bias)
        layout.matrices.update(_dense(shared, hidden, f"{at}{names.shared}.", present, prefix="shared "))


def expected_shapes(spec: ModelSpec, present: Container[str] = ()) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a checkpoint of this spec; projections are fused if `present` has the fused names."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (spec.vocab_size, spec.hidden_size)}
    for index in range(spec.num_layers):
        layout = layer_layout(spec, index, present)
        shapes |= {name: (width,) for name, width in layout.vectors.values()}
        shapes |= dict(layout.tables.values())
        for matrix in layout.matrices.values():
            for name, rows in matrix.parts:
                shapes[name + ".weight"] = (rows, matrix.columns)
                if matrix.bias:
                    shapes[name + ".bias"] = (rows,)
    shapes[FINAL_NORM] = (spec.hidden_size,)
    if not spec.tied_embeddings:
        shapes[HEAD] = (spec.head_rows or spec.vocab_size, spec.hidden_size)
    return shapes


def is_ignored(spec: ModelSpec, name: str) -> bool:
    """Return whether a checkpoint may contain this tensor although the decoder does not use it.

    Old exports contain rotary frequencies and tied heads, which are redundant; others contain layers for multi-token
    prediction, or a vision part.
    """
    if name.startswith(spec.ignored):
        return True
    if name.endswith("rotary_emb.inv_freq") or (name == HEAD and spec.tied_embeddings):
        return True
    extra = range(spec.num_layers, spec.num_layers + spec.extra_layers)
    return any(name.startswith(f"model.layers.{index}.") for index in extra)


def num_parameters(spec: ModelSpec) -> int:
    """Number of parameters in the checkpoint; tied embeddings count once."""
    return sum(_size(shape) for shape in expected_shapes(spec).values())


def weight_bytes(
    spec: ModelSpec,
    dtype: DType,
    quantization: Quantization = "none",
    *,
    packs_head: bool = False,
    maps_table: bool = False,
    as_stored: Mapping[str, int] = MappingProxyType({}),
) -> int:
    """Bytes of the weights in `dtype`; with int8, quantised matrices take one byte per number and four per row.

    `as_stored`: bytes of matrices that stay as they are stored, by name. A matrix of several does, if all of them do.

    The embedding is a table in `dtype`. A tied head shares its memory, unless it is quantised or `packs_head`. With
    `maps_table`, a table that no product reads is a view of its file, and is not counted.
    """
    head = Matrix((("lm_head", spec.head_rows or spec.vocab_size),), spec.hidden_size)
    table, head_size = _size((spec.vocab_size, spec.hidden_size)), _size((head.rows, head.columns))
    quantised = quantization == "int8"
    layers = num_parameters(spec) - table - (0 if spec.tied_embeddings else head_size)
    held = layers * DTYPE_BYTES[dtype]
    head_bytes = head_size * DTYPE_BYTES[dtype]
    if quantised:
        held -= sum(_saved_by_int8(matrix, dtype) for matrix in _matrices(spec))
        head_bytes -= _saved_by_int8(head, dtype)
    elif as_stored:
        held -= sum(_saved_as_stored(spec, index, dtype, as_stored) for index in range(spec.num_layers))
        head_bytes = as_stored.get(EMBEDDING if spec.tied_embeddings else HEAD, head_bytes)
    if spec.tied_embeddings and not (quantised or packs_head):
        return held + head_bytes
    return held + head_bytes + (0 if maps_table else table * DTYPE_BYTES[dtype])


def _matrices(spec: ModelSpec) -> Iterator[Matrix]:
    for index in range(spec.num_layers):
        yield from (m for m in layer_layout(spec, index, ()).matrices.values() if not m.exact)


def _saved_by_int8(matrix: Matrix, dtype: DType) -> int:
    return matrix.rows * (matrix.columns * (DTYPE_BYTES[dtype] - 1) - 4)


def _saved_as_stored(spec: ModelSpec, index: int, dtype: DType, as_stored: Mapping[str, int]) -> int:
    """Bytes that a layer's matrices save by staying as stored. Not those that loading takes apart."""
    saved, attention = 0, spec.attention
    apart = {"kv_up", "input", "rates"}
    if isinstance(attention, PlainAttention) and attention.output_gate:
        apart.add("qkv")  # its rows are reordered
    for key, matrix in layer_layout(spec, index, as_stored).matrices.items():
        names = [name + ".weight" for name, _ in matrix.parts]
        if key not in apart and not matrix.exact and all(name in as_stored for name in names):
            saved += matrix.rows * matrix.columns * DTYPE_BYTES[dtype] - sum(as_stored[name] for name in names)
    return saved


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size
