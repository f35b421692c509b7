"""A client's unchecked request for generation: the common form of HTTP bodies and gRPC messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...core.sampling import SamplingOptions

UNTIL_FULL = 2**31 - 1  # as the usual max_tokens: all that the context leaves


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """Fields by their OpenAI names. None: the client did not give the field."""

    model: str | None = None
    prompt: str | Sequence[int] | None = None  # exactly one of prompt and messages
    suffix: str | None = None  # text behind the answer; with a prompt of text only
    messages: Sequence[Mapping[str, Any]] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None  # these five are allowed with messages only
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    reasoning_effort: str | None = None
    tools: Sequence[Mapping[str, Any]] | None = None  # these three, too
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    sampling: SamplingOptions = field(default_factory=SamplingOptions)  # what the client said; shared, never changed
    usual_max_tokens: int | None = None  # the face's own default for max_tokens; none: the router's
    rule_field: str = "structured_outputs"  # field of the client that gave `structured_outputs` of the sampling
    top_logprobs: int | None = None  # `logprobs` of the sampling under the name that chats have for it; one of the two
    n: int | None = None
    cache_salt: str | None = None  # only requests of the same tenant and salt share cached prefixes
    priority: int | None = None  # lower is earlier; the key bounds it
    request_id: str | None = None
    api_key: str | None = None
    timeout_s: float | None = None  # of the client's own deadline, from the arrival of its headers
