"""Prompt text before a completion's answer, for bodies with `echo`. Knows no answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ...core.request import Request
from ...text.places import TokenPlaces
from ...text.tokenizer import Tokenizer


class Echo(NamedTuple):
    """Text of the prompt, and the character offset of each of its tokens; no offsets without logprobs."""

    text: str
    places: Sequence[int]


def echo_of(prompt: str | Sequence[int], request: Request, tokenizer: Tokenizer) -> Echo:
    """Echo of a prompt: a text unchanged, token ids decoded."""
    has_places = request.sampling.logprobs is not None
    if isinstance(prompt, str):
        return Echo(prompt, tokenizer.places(prompt) if has_places else ())
    skip = request.sampling.skip_special_tokens
    return Echo(tokenizer.decode(prompt, skip), TokenPlaces(tokenizer, skip).of(prompt) if has_places else ())
