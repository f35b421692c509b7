"""Output of the router's flow for the APIs: pieces of text while a request runs, and its end. Knows no protocol."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.request import FinishReason, TokenLogprobs
from ...protos import common_pb2


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """Billed tokens. `cached_tokens` of the prompt were in a worker's cache already."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    draft_tokens: int = 0  # guessed by speculative decoding; they are not billed
    accepted_tokens: int = 0  # those of them that were right: part of `completion_tokens`


@dataclass(frozen=True, slots=True)
class OutputDelta:
    """New tokens of one choice, or its end, or both. `first_index` allows a check that no token is missing."""

    choice: int
    first_index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None = None
    usage: TokenUsage | None = None  # with the last piece of the last choice: of the whole request
    logprobs: tuple[TokenLogprobs, ...] = ()  # of each of `token_ids`, if asked for
    # Of the prompt from its second token on; once, with choice 0. Kept as messages: there may be hundreds of thousands,
    # and they must be converted outside the event loop.
    prompt_scores: tuple[common_pb2.TokenLogprobs, ...] = ()
    num_shown: int = 0  # with logprobs: number of leading tokens of the choice whose text was sent so far
