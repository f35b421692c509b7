"""The words of one request inside the cluster: what to generate from, how, and under which name."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. Already validated: ranges hold, `seed` and `max_tokens` are set.

    A token is argmax(filtered logits / temperature + Gumbel noise), the noise keyed by (seed, choice, position,
    token id); temperature 0 is greedy. In which order everything applies: model/sampling/sampler.py.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    min_p: float = 0.0  # least probability, as a part of the likeliest token's; 0: off
    repetition_penalty: float = 1.0  # of tokens in prompt or output; 1: off
    frequency_penalty: float = 0.0  # per occurrence in the output
    presence_penalty: float = 0.0  # of tokens in the output
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
    bad_words: tuple[tuple[int, ...], ...] = ()  # token ids of words that must not come about
    include_stop: bool = False  # what ended the choice stays in its text
    skip_special_tokens: bool = True  # they give no text
    logprobs: int | None = None  # of every generated token, with so many of the likeliest; None: none
    prompt_logprobs: int | None = None  # the same of every prompt token but the first

    @property
    def needs_history(self) -> bool:
        """Whether the choice of a token depends on the ids before it."""
        penalties = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty)
        return penalties != (1.0, 0.0, 0.0) or bool(self.bad_words)


class TokenLogprobs(NamedTuple):
    """How likely one token was, under the model's own distribution: before penalties, temperature and filters."""

    token_id: int
    logprob: float
    rank: int  # 1: the likeliest
    top: tuple[tuple[int, float], ...]  # (token id, logprob), likeliest first, as many as were asked for


class Epoch(NamedTuple):
    """Which dispatch of a request is the living one. Ordered: the higher one wins."""

    incarnation: int
    counter: int


class SequenceKey(NamedTuple):
    """One choice of one request: the unit that workers run."""

    request_id: str
    choice: int


class FinishReason(StrEnum):
    """Why a choice ended. Values are OpenAI's words where they have one."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class Role(StrEnum):
    """What a worker does. Data, not a class: one process can take another role while it runs."""

    PREFILL = "prefill"
    DECODE = "decode"
    COMBINED = "combined"  # prefills what it decodes; takes no hand-overs


USUAL_ANSWER_TOKENS = 1024  # counted for an answer whose length nobody bounded


@dataclass(frozen=True, slots=True)
class CacheScope:
    """The fields of a request in the names of its prompt's blocks: requests that differ in one share no KV.

    Router, decode worker and prefill worker name a prompt by it and by the model (kv/keys.py). No field has a default:
    a new one is an error at every place that does not give it.
    """

    isolation_domain: str  # of the authenticated tenant, and the cache salt
    adapter: bytes  # content hash; empty: none


@dataclass(frozen=True, slots=True)
class Request:
    """One admitted request in the router: the same value whether it came over HTTP or gRPC."""

    request_id: str
    model: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    num_choices: int
    isolation_domain: str  # who shares cached prefixes with it: its tenant, or those of its tenant with its salt
    timeout_s: float
    is_chat: bool = False
    is_bounded: bool = True  # false: nobody said how long an answer may be, and `max_tokens` is all that fits

    @property
    def expected_tokens(self) -> int:
        """How many new tokens per choice admission and routing count: what was asked for, else a usual answer's."""
        most = self.sampling.max_tokens
        return most if self.is_bounded else min(most, USUAL_ANSWER_TOKENS)

    ignored_fields: tuple[str, ...] = ()  # what the client sent and nothing reads, by name
    tenant: str | None = None  # whose it is; None: the isolation domain's
    adapter: bytes = b""  # content hash; empty: none, the only one that is served

    @property
    def cache_scope(self) -> CacheScope:
        """What its prompt is named by, besides ids and model."""
        return CacheScope(self.isolation_domain, self.adapter)

    @property
    def owner(self) -> str:
        """The tenant that may explain and abort it, and whose share of the cluster it uses."""
        return self.tenant or self.isolation_domain
