"""Prompts of models that fill in the middle of a text, by the special words of their tokenizers. Knows no request.

Sources: the model cards of Qwen2.5-Coder and CodeGemma, StarCoder, DeepSeek-Coder, CodeLlama and Codestral.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class _Words(NamedTuple):
    """Words before the prefix, before the suffix, and before the middle, which the model writes."""

    prefix: str
    suffix: str
    middle: str
    suffix_first: bool = False


_KNOWN = (
    _Words("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    _Words("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    _Words("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    _Words("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    _Words("▁<PRE>", "▁<SUF>", "▁<MID>"),
    _Words("[PREFIX]", "[SUFFIX]", "", suffix_first=True),
)
KNOWN_WORDS = ", ".join(words.prefix for words in _KNOWN)


def fill_in_prompt(before: str, after: str, is_token: Callable[[str], bool]) -> str | None:
    """The prompt for the text between `before` and `after`; None: the tokenizer has no such words.

    `is_token`: whether a word is one token of the tokenizer.
    """
    for words in _KNOWN:
        if all(is_token(word) for word in words[:3] if word):
            if words.suffix_first:
                return f"{words.suffix}{after}{words.prefix}{before}"
            return f"{words.prefix}{before}{words.suffix}{after}{words.middle}"
    return None
