"""Values that describe one request inside the cluster: prompt, sampling, names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple


class Grammar(NamedTuple):
    """Rule for the text of a choice (structured output). text/grammar.py compiles it."""

    kind: str  # of `GRAMMAR_KINDS`
    source: str


GRAMMAR_KINDS = ("json", "regex", "choice", "grammar", "structural_tag")
"""json: a JSON schema; choice: a JSON list of texts; grammar: Lark or GBNF; structural_tag: a JSON object."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters of a request. Already validated: ranges hold, `seed` and `max_tokens` are set.

    A token is argmax(filtered logits / temperature + Gumbel noise), with noise keyed by (seed, choice, position,
    token id); temperature 0 is greedy. model/sampling/sampler.py defines the order of all operations.
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
    min_p: float = 0.0  # lowest probability, as a fraction of the likeliest token's; 0: off
    repetition_penalty: float = 1.0  # for tokens in prompt or output; 1: off
    frequency_penalty: float = 0.0  # for each occurrence in the output
    presence_penalty: float = 0.0  # once for each token in the output
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, value added to its logit)
    bad_words: tuple[tuple[int, ...], ...] = ()  # token ids of each word that must not be generated
    include_stop: bool = False  # the stop string that ended the choice stays in its text
    skip_special_tokens: bool = True  # special tokens produce no text
    logprobs: int | None = None  # number of likeliest tokens given per generated token; None: no logprobs
    prompt_logprobs: int | None = None  # the same for every prompt token except the first
    grammar: Grammar | None = None  # rule for the text; None: any text

    @property
    def needs_history(self) -> bool:
        """True if sampling needs the earlier token ids (penalties, bad words, a grammar)."""
        penalties = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty)
        return penalties != (1.0, 0.0, 0.0) or bool(self.bad_words) or self.grammar is not None


class TokenLogprobs(NamedTuple):
    """Log probability of one token in the model's distribution, before penalties, temperature and filters."""

    token_id: int
    logprob: float
    rank: int  # 1: the likeliest
    top: tuple[tuple[int, float], ...]  # (token id, logprob), likeliest first, as many as requested


class Epoch(NamedTuple):
    """Number of a dispatch of a request. Ordered: only the highest one counts."""

    incarnation: int
    counter: int


class SequenceKey(NamedTuple):
    """Identifier of one choice of one request, the unit that workers run."""

    request_id: str
    choice: int


class FinishReason(StrEnum):
    """Reason for which a choice ended. Values are OpenAI's words where they exist."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"
    TOOL_CALLS = "tool_calls"  # of the client APIs: for workers it is STOP


class Role(StrEnum):
    """Role of a worker. Data, not a class: a process can change its role while it runs."""

    PREFILL = "prefill"
    DECODE = "decode"
    COMBINED = "combined"  # prefill and decode in one worker, without hand-overs


USUAL_ANSWER_TOKENS = 1024  # estimated length of an answer without a bound of its own


@dataclass(frozen=True, slots=True)
class CacheScope:
    """The fields of a request in the names of its prompt's blocks: requests that differ in one share no KV.

    Router, decode worker and prefill worker name a prompt by it and by the model (kv/keys.py). No field has a default:
    a new one is an error at every place that does not give it.
    """

    isolation_domain: str  # of the authenticated tenant, and the cache salt
    adapter: bytes  # content hash; empty: none


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """How the router reads the answer to a chat: as content, reasoning and tool calls."""

    prompt_end: str  # text at the end of the prompt, which may have begun the reasoning
    tools: tuple[Mapping[str, Any], ...] | None  # in OpenAI's format, checked; None: calls are content
    parallel: bool = True  # more than one call is given out
    hides_special_tokens: bool = False  # the text has special tokens for the parser; the client wants none


@dataclass(frozen=True, slots=True)
class Allowance:
    """What one API key may use. None: no bound."""

    key: str  # name of the key in logs and counters, no secret
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None  # of prompts and answers
    share: float = 1.0  # of the cluster, relative to other tenants', while requests wait


HIGHEST_PRIORITY, LOWEST_PRIORITY = -1000, 1000  # as in vLLM's API, a lower number is served earlier


@dataclass(frozen=True, slots=True)
class Request:
    """One validated request in the router, the same for HTTP and gRPC."""

    request_id: str
    model: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    num_choices: int
    isolation_domain: str  # scope of shared prefixes: the tenant, or the tenant and its salt
    timeout_s: float
    is_chat: bool = False
    is_bounded: bool = True  # false: the client gave no limit; `max_tokens` is all that fits
    ignored_fields: tuple[str, ...] = ()  # names of fields that the client sent and that have no effect
    tenant: str | None = None  # owner of the request; None: the isolation domain
    adapter: bytes = b""  # content hash; empty: none
    base_model: str = ""  # with an adapter: the model that it changes, as workers name it
    answer: AnswerForm | None = None  # None: the answer is its text
    priority: int = 0  # HIGHEST_PRIORITY to LOWEST_PRIORITY
    allowance: Allowance | None = None  # of its API key; None: no bounds

    @property
    def num_tokens(self) -> int:
        """Its cost for admission: prompt and expected new tokens, of all choices."""
        return self.num_choices * (len(self.prompt_ids) + self.expected_tokens)

    @property
    def expected_tokens(self) -> int:
        """New tokens per choice for admission and routing: the client's limit, else at most USUAL_ANSWER_TOKENS."""
        most = self.sampling.max_tokens
        return most if self.is_bounded else min(most, USUAL_ANSWER_TOKENS)

    @property
    def worker_model(self) -> str:
        """The model as its workers name it: without an adapter's name."""
        return self.base_model or self.model

    @property
    def cache_scope(self) -> CacheScope:
        """Fields that name the prompt's blocks, besides its ids and the model."""
        return CacheScope(self.isolation_domain, self.adapter)

    @property
    def owner(self) -> str:
        """Tenant that may explain and abort the request, and whose share of the cluster it uses."""
        return self.tenant or self.isolation_domain
