"""What the router's flow gives its faces: pieces of text while a request runs, and how it ended. Knows no protocol."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.request import FinishReason, TokenLogprobs
from ...protos import common_pb2


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """Tokens as they are billed. `cached_tokens` of the prompt were in a worker's cache already."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class OutputDelta:
    """New tokens of one choice, or its end, or both. `first_index` makes the stream checkably gapless."""

    choice: int
    first_index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None = None
    usage: TokenUsage | None = None  # with the last piece of the last choice: of the whole request
    logprobs: tuple[TokenLogprobs, ...] = ()  # of each of `token_ids`, where asked for
    # Of the prompt from its second token on; once, with choice 0. As they came: there may be hundreds of thousands, and
    # who needs them otherwise makes them so off the event loop.
    prompt_scores: tuple[common_pb2.TokenLogprobs, ...] = ()
    num_shown: int = 0  # with logprobs: how many leading tokens of the choice have their text out by now
