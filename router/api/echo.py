"""A completion's prompt as it stands before the answer where a body asks for `echo`. Knows no answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ...core.request import Request
from ...text.places import TokenPlaces
from ...text.tokenizer import Tokenizer


class Echo(NamedTuple):
    """The text, and where in it the prompt's tokens are; without places where nobody asks for logprobs."""

    text: str
    places: Sequence[int]


def echo_of(prompt: str | Sequence[int], request: Request, tokenizer: Tokenizer) -> Echo:
    """A text comes back as it was sent, ids as their text."""
    has_places = request.sampling.logprobs is not None
    if isinstance(prompt, str):
        return Echo(prompt, tokenizer.places(prompt) if has_places else ())
    skip = request.sampling.skip_special_tokens
    return Echo(tokenizer.decode(prompt, skip), TokenPlaces(tokenizer, skip).of(prompt) if has_places else ())
