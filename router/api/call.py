"""A client's unchecked request for generation: the common form of HTTP bodies and gRPC messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

UNTIL_FULL = 2**31 - 1  # as usual_max_tokens: as many tokens as fit the context


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """Fields by their OpenAI names. None: the client did not give the field."""

    model: str | None = None
    prompt: str | Sequence[int] | None = None  # exactly one of prompt and messages
    messages: Sequence[Mapping[str, Any]] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None  # these five are allowed with messages only
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    reasoning_effort: str | None = None
    max_tokens: int | None = None
    usual_max_tokens: int | None = None  # the API's own default for max_tokens; None: the router's
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    n: int | None = None
    stop: Sequence[str] = field(default_factory=tuple)
    stop_token_ids: Sequence[int] = field(default_factory=tuple)
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: Mapping[str, float] | Mapping[int, float] | None = None  # by token id
    bad_words: Sequence[str] = field(default_factory=tuple)
    logprobs: int | None = None  # number of most likely alternatives per token
    top_logprobs: int | None = None  # the same, by its name in chats; only one of the two is given
    prompt_logprobs: int | None = None
    cache_salt: str | None = None  # only requests of the same tenant and salt share cached prefixes
    request_id: str | None = None
    api_key: str | None = None
    timeout_s: float | None = None  # remaining time of the client's own deadline
