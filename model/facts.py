"""What the faces of a worker know about its model, cache and engine. Plain data; made once, when the engine is built."""

from __future__ import annotations

from dataclasses import dataclass

from ..kv.keys import Namer
from ..kv.spec import KvSpec


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The model as peers and routers must know it."""

    name: str
    directory: str
    vocab_size: int
    max_model_len: int
    eos_ids: frozenset[int]
    weights_fingerprint: bytes
    numerics_class: bytes
    numerics_description: str
    deterministic: bool
    kv_spec: KvSpec


@dataclass(frozen=True, slots=True)
class FaceFacts:
    """Everything a face needs besides the link."""

    worker_id: str
    model: ModelFacts
    namer: Namer
    digest_key: int
    num_blocks: int
    block_tokens: int
    frame_bytes: int  # planes per hand-over frame, at most
    frame_slots: int  # frames under way per hand-over
    max_num_seqs: int
    max_batch_tokens: int

    @property
    def frame_tokens(self) -> int:
        """Tokens per frame: what fits `frame_bytes`, in whole physical blocks, at least one."""
        per_block = self.model.kv_spec.bytes_per_token * self.block_tokens
        return max(1, self.frame_bytes // per_block) * self.block_tokens
