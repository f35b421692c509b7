"""The shape of a decoder, in the field's terms: what a config.json comes down to. Knows no file, no tensor.

One `ModelSpec` describes every family that we serve; `config_json.py` reads it from a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..kv.spec import CODEC_NAMES, KvSpec, attention_spec, mla_spec

DType = Literal["bfloat16", "float32"]
Quantization = Literal["none", "int8"]
Activation = Literal["silu", "gelu_tanh"]
DTYPE_BYTES: dict[str, int] = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched for a longer context; `rope.py` says what each kind does."""

    kind: Literal["linear", "dynamic", "llama3", "yarn", "longrope"]
    factor: float
    original_max_len: int = 8192  # what the model was first trained for
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()  # longrope: a divisor per frequency
    long_factors: tuple[float, ...] = ()
    magnitude: float = 1.0  # what cosines and sines are multiplied by (yarn, longrope)

    @property
    def depends_on_length(self) -> bool:
        """Whether angles depend on the served context length."""
        return self.kind in ("dynamic", "longrope")


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary positions of some layers: `width` of a head's numbers are rotated, the rest passes."""

    theta: float
    width: int
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True)
class PlainAttention:
    """Grouped-query attention (Ainslie et al. 2023); one key and one value per KV head in the cache."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    softcap: float | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    head_norms: bool = False  # queries and keys are normalised per head, before they are rotated


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, 2024): the cache holds one latent and one rotary key per token."""

    num_heads: int
    query_rank: int | None  # None: queries come straight from the hidden state
    latent_width: int
    rope_width: int
    key_width: int  # of a head's part without positions
    value_width: int
    scale: float
    interleaved: bool
    bias: bool = False  # of the two projections down, and of the output
    norm_eps: float = 1e-6


@dataclass(frozen=True, slots=True)
class DenseFfn:
    """A gated feed-forward layer."""

    width: int
    bias: bool = False


@dataclass(frozen=True, slots=True)
class Routing:
    """How a token chooses its experts; `experts.py` says what each field does."""

    num_experts: int
    per_token: int
    scores: Literal["softmax", "sigmoid"] = "softmax"
    normalised: bool = False  # the chosen weights sum to one
    scale: float = 1.0
    num_groups: int = 1
    groups_per_token: int = 1
    correction: bool = False  # a bias that counts for the choice alone, and groups by their two best


@dataclass(frozen=True, slots=True)
class ExpertsFfn:
    """Experts of one width, and perhaps one that every token takes."""

    width: int
    routing: Routing
    shared_width: int | None = None
    shared_gate: bool = False  # the shared expert counts by the sigmoid of a score of its own
    shared_bias: bool = False


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What differs from layer to layer."""

    ffn: DenseFfn | ExpertsFfn
    window: int | None = None
    rope: int = 0  # index of ModelSpec.ropes


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The shape of a decoder. `dtype` is the checkpoint's own (float16 counts as bfloat16, its nearest kin here)."""

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
    norm_offset: float = 0.0  # Gemma stores norms less one
    sandwich_norms: bool = False  # each part of a layer is normalised after it, too
    embedding_scale: float | None = None
    final_softcap: float | None = None
    extra_layers: int = 0  # in the checkpoint behind the decoder's (multi-token prediction); not loaded
    remarks: tuple[str, ...] = field(default=(), compare=False)  # for people: where it is not what the config says

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @property
    def length_matters(self) -> bool:
        """Whether rotary angles, and so every bit, depend on the served context length."""
        return any(rope.scaling is not None and rope.scaling.depends_on_length for rope in self.ropes)

    def kv_spec(self, codec: str) -> KvSpec:
        """What one token leaves in the cache. `codec`: a name of `--kv-cache-dtype` other than auto."""
        shape, codec_id = self.attention, CODEC_NAMES[codec]
        if isinstance(shape, LatentAttention):
            return mla_spec(self.num_layers, shape.latent_width, shape.rope_width, codec_id)
        return attention_spec(self.num_layers, shape.num_kv_heads, shape.head_dim, codec_id)
