"""Lower bound of a text's number of tokens, from its length in bytes. Knows no request.

A tokenizer with steps that can drop text (collapsed blanks, one unknown token for a whole word) has no such bound.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import tokenizers
from tokenizers import pre_tokenizers

BYTE_LEVEL = frozenset(pre_tokenizers.ByteLevel.alphabet())  # characters of the 256 bytes
COMPOSING_FACTOR = 4  # largest ratio of bytes before to after NFC, NFD, NFKC or NFKD (mathematical letters)
_COMPOSING = ("NFC", "NFD", "NFKC", "NFKD")
_CUTTING = ("ByteLevel", "Digits", "Metaspace")  # pre-tokenizers that drop no text
_BLANKS = tuple(char for char in map(chr, range(0x3001)) if char.isspace())


class TokenBounds:
    """Bounds of one tokenizer, from the largest number of bytes in one token."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._longest = _longest_bytes(backend)
        added = backend.get_added_tokens_decoder().values()
        self._takes_blanks = any(token.lstrip or token.rstrip for token in added)

    def least(self, text: str) -> int:
        """Smallest possible number of tokens of a text; 0 if no bound is known."""
        if self._longest is None:
            return 0
        size = len(text.encode(errors="replace"))
        if self._takes_blanks:
            size -= sum(text.count(blank) * len(blank.encode()) for blank in _BLANKS)
        return -(-size // self._longest)


def is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    """Return whether each character of the vocabulary encodes a byte."""
    return any(step["type"] == "ByteLevel" for step in steps_of(backend.pre_tokenizer))


def steps_of(part: Any) -> Iterator[dict[str, Any]]:
    """Yield the steps of a normalizer or pre-tokenizer, with nested sequences flattened."""
    if part is not None:
        yield from _unrolled(json.loads(part.__getstate__()))


def _unrolled(step: dict[str, Any]) -> Iterator[dict[str, Any]]:
    inner = step.get("normalizers", step.get("pretokenizers"))
    if step["type"] != "Sequence" or inner is None:
        yield step
        return
    for one in inner:
        yield from _unrolled(one)


def _longest_bytes(backend: tokenizers.Tokenizer) -> int | None:
    """Largest number of a text's bytes in one token. None: no bound is known."""
    factor = _shrinking(backend.normalizer)
    if factor is None or not all(map(_drops_nothing, steps_of(backend.pre_tokenizer))):
        return None
    vocab, model = backend.get_vocab(with_added_tokens=True), backend.model
    if is_byte_level(backend):
        knows_every_byte = vocab.keys() >= BYTE_LEVEL
    else:
        falls_back = isinstance(model, tokenizers.models.BPE) and model.byte_fallback
        knows_every_byte = falls_back and all(f"<0x{byte:02X}>" in vocab for byte in range(256))
    if not isinstance(model, tokenizers.models.BPE) or not knows_every_byte:
        return None
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    spelt = is_byte_level(backend)
    sizes = (len(token) if spelt and token not in added else len(token.encode()) for token in vocab)
    return max(sizes) * factor


def _shrinking(normalizer: Any) -> int | None:
    """Largest factor by which normalisation can shrink a text's bytes. None: there is no bound."""
    factor = 1
    for step in steps_of(normalizer):
        if step["type"] in _COMPOSING:
            factor = COMPOSING_FACTOR
        elif step["type"] == "Replace":
            pattern = step["pattern"].get("String")
            if pattern is None or len(step["content"].encode()) < len(pattern.encode()):
                return None
        elif step["type"] != "Prepend":
            return None
    return factor


def _drops_nothing(step: dict[str, Any]) -> bool:
    return step["type"] in _CUTTING or (step["type"] == "Split" and step["behavior"] != "Removed")
