"""Architecture of a decoder as values, as read from config.json. Knows no file, no tensor.

`ModelSpec` can describe every served family; `config_json.py` reads it from a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..kv.spec import KvSpec, StateSpec, attention_spec, codec_ids, mla_spec
from ..kv.windows import windowed_layers

DType = Literal["bfloat16", "float32"]
Quantization = Literal["none", "int8"]
Activation = Literal["silu", "gelu_tanh", "clamped_swiglu"]
DTYPE_BYTES: dict[str, int] = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Scaling of rotary frequencies for a longer context; model/decoder/rope.py defines each kind."""

    kind: Literal["linear", "dynamic", "llama3", "yarn", "longrope"]
    factor: float
    original_max_len: int = 8192  # context length of the first training
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()  # longrope: a divisor per frequency
    long_factors: tuple[float, ...] = ()
    magnitude: float = 1.0  # factor on cosines and sines (yarn, longrope)

    @property
    def depends_on_length(self) -> bool:
        """True if angles depend on the served context length."""
        return self.kind in ("dynamic", "longrope")


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary positions of a kind of layer: the first `width` numbers of a head are rotated, the others unchanged."""

    theta: float
    width: int
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True)
class PlainAttention:
    """Grouped-query attention (Ainslie et al. 2023): the cache has one key and one value per token and KV head."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    softcap: float | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    head_norms: bool = False  # queries and keys are normalised per head, before rotation
    sinks: bool = False  # each head has a score that takes part in its softmax, without a value
    output_gate: bool = False  # a gate per query head, of the same width, scales the output by its sigmoid


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, 2024): the cache has one latent and one rotary key per token."""

    num_heads: int
    query_rank: int | None  # None: queries are projected directly from the hidden state
    latent_width: int
    rope_width: int
    key_width: int  # width of a head's part without positions
    value_width: int
    scale: float
    interleaved: bool
    bias: bool = False  # bias of both down-projections and of the output
    norm_eps: float = 1e-6


@dataclass(frozen=True, slots=True)
class DeltaNet:
    """Gated delta net: linear attention with a matrix per head as its memory; model/decoder/delta.py defines it.

    Each key head serves num_value_heads / num_key_heads neighbouring value heads.
    """

    num_key_heads: int
    num_value_heads: int
    key_width: int
    value_width: int
    num_taps: int  # inputs of the causal convolution: the token's own and those just before it

    @property
    def keys_width(self) -> int:
        """Numbers per token of all queries, or of all keys."""
        return self.num_key_heads * self.key_width

    @property
    def values_width(self) -> int:
        """Numbers per token of all values, of the gates, or of the output."""
        return self.num_value_heads * self.value_width

    @property
    def conv_width(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.keys_width + self.values_width


@dataclass(frozen=True, slots=True)
class DenseFfn:
    """Gated feed-forward layer."""

    width: int
    bias: bool = False


@dataclass(frozen=True, slots=True)
class Routing:
    """Choice of a token's experts; model/decoder/experts.py defines each field."""

    num_experts: int
    per_token: int
    scores: Literal["softmax", "sigmoid", "softmax_of_chosen"] = "softmax"
    normalised: bool = False  # weights of the chosen experts sum to one
    scale: float = 1.0
    num_groups: int = 1
    groups_per_token: int = 1
    correction: bool = False  # a bias that affects only the choice; groups score by their two best experts
    bias: bool = False  # added to the scores


@dataclass(frozen=True, slots=True)
class ExpertsFfn:
    """Experts of one width, and perhaps one expert that every token uses."""

    width: int
    routing: Routing
    shared_width: int | None = None
    shared_gate: bool = False  # the shared expert's weight is the sigmoid of its own score
    shared_bias: bool = False
    bias: bool = False  # of every expert


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """Properties of one layer that can differ between layers."""

    ffn: DenseFfn | ExpertsFfn
    window: int | None = None
    rope: int = 0  # index of ModelSpec.ropes
    mixer: Literal["attention", "delta"] = "attention"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Architecture of a decoder. `dtype` is the checkpoint's; float16 counts as bfloat16."""

    architecture: str
    hidden_size: int
    vocab_size: int
    attention: PlainAttention | LatentAttention
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]
    activation: Activation
    rms_eps: float
    tied_embeddings: bool
    max_model_len: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    dtype: DType
    norm_offset: float = 0.0  # Gemma stores norm weights minus one
    sandwich_norms: bool = False  # the output of each part of a layer is normalised too
    embedding_scale: float | None = None
    final_softcap: float | None = None
    head_rows: int | None = None  # rows of the head on one TP rank (shards.py); None: vocab_size
    extra_layers: int = 0  # layers for multi-token prediction after the decoder's; not loaded
    delta: DeltaNet | None = None  # of the layers whose mixer it is
    ignored: tuple[str, ...] = ()  # beginnings of names of tensors that the text model does not use
    remarks: tuple[str, ...] = field(default=(), compare=False)  # notes for users on differences from the config

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def cache_layers(self) -> tuple[int | None, ...]:
        """Per layer: its number among the layers of its mixer that have keys and values. None: it has none."""
        attends = [layer.mixer == "attention" for layer in self.layers]
        return tuple(sum(attends[:i]) if has else None for i, has in enumerate(attends))

    @property
    def state_layers(self) -> tuple[int | None, ...]:
        """Per layer: its number among the layers that have a recurrent state. None: it has none."""
        recurs = [layer.mixer == "delta" for layer in self.layers]
        return tuple(sum(recurs[:i]) if has else None for i, has in enumerate(recurs))

    @property
    def state_spec(self) -> StateSpec | None:
        """Recurrent state of a sequence; None: the model has none."""
        if self.delta is None:
            return None
        return StateSpec(
            num_layers=sum(layer.mixer == "delta" for layer in self.layers),
            num_taps=self.delta.num_taps - 1,
            conv_width=self.delta.conv_width,
            num_heads=self.delta.num_value_heads,
            key_width=self.delta.key_width,
            value_width=self.delta.value_width,
        )

    @property
    def length_matters(self) -> bool:
        """True if rotary angles, and so all results, depend on the served context length."""
        return any(rope.scaling is not None and rope.scaling.depends_on_length for rope in self.ropes)

    def kv_spec(self, codec: str) -> KvSpec:
        """Layout of one token in the KV cache. `codec`: a name in `kv.spec.pair_name`."""
        shape, (codec_id, value_codec) = self.attention, codec_ids(codec)
        windows = [layer.window for layer in self.layers if layer.mixer == "attention"]
        num_layers, windowed = len(windows), windowed_layers(windows)
        if isinstance(shape, LatentAttention):
            return mla_spec(num_layers, shape.latent_width, shape.rope_width, codec_id).with_windowed(windowed)
        spec = attention_spec(num_layers, shape.num_kv_heads, shape.head_dim, codec_id, value_codec)
        return spec.with_windowed(windowed)
