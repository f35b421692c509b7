"""Facts about a worker's model, cache and engine for its face: plain data, made once with the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.errors import ContextLengthExceeded, InvalidRequest
from ..core.request import SamplingParams
from ..kv.handover.plane_channel import TransportPolicy
from ..kv.keys import PromptHasher
from ..kv.spec import KvSpec


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Facts about the model for peers and routers."""

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
    has_states: bool = False  # recurrent layers: a sequence is more than its KV
    cache_codec: str = ""  # of the KV cache, as --kv-cache-dtype names it
    fell_back_from: str = ""  # codec that the guard found too coarse; empty: none

    def check_prompt(self, prompt_ids: tuple[int, ...], num_emitted: int = 0) -> None:
        """Check that the model can take these ids. The last `num_emitted` of them were generated.

        Raises:
            InvalidRequest: there is no id, or one outside the vocabulary.
            ContextLengthExceeded: the ids that were not generated are `max_model_len` or more.
        """
        if not prompt_ids:
            raise InvalidRequest("the prompt has no tokens", param="prompt")
        largest = max(prompt_ids)
        if largest >= self.vocab_size:
            raise InvalidRequest(f"token id {largest} is outside the vocabulary of {self.vocab_size}", param="prompt")
        num_prompt = len(prompt_ids) - num_emitted
        if num_prompt >= self.max_model_len:
            raise ContextLengthExceeded(
                f"the prompt has {num_prompt} tokens; the model takes {self.max_model_len} with what it generates",
                param="prompt",
            )

    def check_sampling(self, params: SamplingParams) -> None:
        """Check that the parameters name tokens of this model only; others would break a step for all its sequences.

        Raises:
            InvalidRequest: they name a token outside the vocabulary.
        """
        words = (token_id for word in params.bad_words for token_id in word)
        named = (*params.stop_token_ids, *words, *(token_id for token_id, _ in params.logit_bias))
        largest = max(named, default=0)
        if largest >= self.vocab_size:
            raise InvalidRequest(f"token id {largest} is outside the vocabulary of {self.vocab_size}", param="sampling")


@dataclass(frozen=True, slots=True)
class FaceFacts:
    """All facts that a face needs besides the link."""

    worker_id: str
    model: ModelFacts
    namer: PromptHasher
    digest_key: int
    num_blocks: int
    block_tokens: int
    frame_bytes: int  # planes per hand-over frame, at most
    frame_slots: int  # frames under way per hand-over
    max_num_seqs: int
    max_batch_tokens: int
    transport: TransportPolicy = field(default_factory=TransportPolicy)  # of planes
    num_ranks: int = 1  # tensor-parallel ranks
