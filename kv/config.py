"""Settings of the KV cache."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ..core.config import Section
from .spec import codec_ids, is_rounded, pair_name

CodecName = Literal[
    "auto",
    "fp8",
    "fp8_e4m3",
    "fp8_e5m2",
    "int8",
    "int8_per_token_head",
    "int8_channel",
    "bfloat16",
    "float32",
]
ValueCodecName = Literal["auto", "fp8", "fp8_e4m3", "fp8_e5m2", "int8", "int8_per_token_head", "bfloat16", "float32"]


class CacheConfig(Section):
    """Format, block size and capacity of the KV cache, and the frames of its hand-overs."""

    dtype: CodecName = Field(
        "auto",
        description="auto = fp8 = fp8_e4m3 (unlike vLLM, whose auto is the model's dtype); int8: a scale per token and "
        "head; int8_channel: keys with a scale per channel and block besides, values int8",
    )
    key_dtype: CodecName | None = Field(None, description="of the keys, if it is not that of dtype")
    value_dtype: ValueCodecName | None = Field(None, description="of the values, if it is not that of dtype")
    block_size: Literal[16, 32, 64] = Field(16, description="tokens per physical block")
    tokens: int | None = Field(
        None,
        ge=64,
        description="most tokens the pool holds; default: what memory allows, on a CPU no more than all sequences of a "
        "step with the whole context each",
    )
    memory_fraction: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of the memory left after the weights that the pool may take; default: 0.9 on a GPU, 0.5 on "
        "a CPU, whose memory others use too",
    )
    swap_space: float = Field(
        0.0,
        ge=0,
        le=1 << 20,
        description="GiB of host memory per worker for the blocks of preempted sequences; 0: they are computed again",
    )
    state_snapshots: int | None = Field(
        None,
        ge=0,
        le=1 << 20,
        description="of models with recurrent layers: states that are kept for prompts with a prefix in common; "
        "default: four per sequence that runs, in at most a quarter of the memory left after the weights",
    )
    prefix_caching: bool = Field(True, description="keep finished blocks findable by the prompts that come later")
    frame_bytes: int = Field(2 << 20, ge=4096, le=16 << 20, description="planes per hand-over frame, at most")
    frame_slots: int = Field(8, ge=1, le=256, description="frames under way per hand-over")
    transport: Literal["auto", "grpc", "shm", "gloo"] = Field(
        "auto",
        description="of hand-overs: shm is shared memory between workers of one host; gloo a channel of two ranks, not "
        "encrypted; auto: shm where it can be, else grpc",
    )
    require_transport: bool = Field(False, description="refuse a hand-over that would use less than transport")
    ring_bytes: int = Field(
        128 << 20,
        ge=0,
        le=64 << 30,
        description="shared memory or slots of channels per worker for hand-overs; those beyond it go through grpc",
    )

    guard_bound: float | None = Field(
        None,
        gt=0,
        le=100,
        description="watch the codec in idle time: sampled prompts are computed over a bfloat16 cache too; if the mean "
        "divergence per token (nats) exceeds this, log, status and metrics say so, and guard_action follows; default: "
        "no watching",
    )
    guard_action: Literal["report", "fallback"] = Field(
        "fallback",
        description="past guard_bound. fallback: new requests are served with a bfloat16 cache in the same memory, "
        "half the tokens; running ones end first, for at most the drain's timeout. report: nothing changes",
    )
    guard_share: float = Field(0.05, gt=0, le=1, description="of prompts that guard_bound samples")
    guard_tokens: int = Field(1024, ge=64, le=1 << 16, description="of a sampled prompt, its first ones")

    journal_bytes_per_s: float = Field(
        64 << 20,
        gt=0,
        description="KV that a worker offers to the buddies of its streams, at most (router.kv_journal)",
    )

    @model_validator(mode="after")
    def _requires_something(self) -> CacheConfig:
        if self.require_transport and self.transport == "auto":
            raise ValueError("require_transport needs a transport that is not auto: --kv-transport shm")
        return self

    @property
    def codec(self) -> str:
        """Name of the codecs of keys and values, as `kv.spec.pair_name` makes it."""
        return pair_name(self.key_dtype or self.dtype, self.value_dtype or self.dtype)

    @property
    def guarded_tokens(self) -> int:
        """Tokens of the two caches that `guard_bound` needs; 0: the codec is not watched, or it rounds nothing."""
        if self.guard_bound is None or not any(is_rounded(codec) for codec in codec_ids(self.codec)):
            return 0
        return self.guard_tokens

    @property
    def shared_bytes(self) -> int:
        """Most shared memory of a worker's hand-overs."""
        return self.ring_bytes if self.transport in ("auto", "shm") else 0

    @property
    def paired_bytes(self) -> int:
        """Most memory of a worker's ends of paired channels. A decode worker offers either these or shared memory."""
        return self.ring_bytes if self.transport in ("auto", "gloo") else 0

    @property
    def handover_bytes(self) -> int:
        """Most memory of a worker's hand-overs, for the plan."""
        return max(self.shared_bytes, self.paired_bytes)

    @property
    def swap_bytes(self) -> int:
        """`swap_space` in bytes."""
        return int(self.swap_space * 2**30)
