"""Text of single tokens, for logprobs. Knows no sequence: incremental.py makes the text of sequences."""

from __future__ import annotations

from typing import NamedTuple

from .incremental import byte_level_bytes
from .tokenizer import Tokenizer


class TokenText(NamedTuple):
    """Text and bytes of one token."""

    text: str  # bytes of incomplete characters become replacement characters
    raw: bytes


class TokenTexts:
    """Cache of the texts of a tokenizer's tokens. Safe to share between threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._is_byte_level = tokenizer.decoder_kinds == ("ByteLevel",)
        self._known: dict[int, TokenText] = {}

    def of(self, token_id: int) -> TokenText:
        """Text that the token adds within a text. Special tokens: their name. Unknown ids: empty."""
        known = self._known.get(token_id)
        if known is None:
            raw = self._raw(token_id)
            known = self._known[token_id] = TokenText(raw.decode("utf-8", "replace"), raw)
        return known

    def _raw(self, token_id: int) -> bytes:
        token = self._tokenizer.token(token_id)
        if token is None:
            return b""
        if token_id in self._tokenizer.special_ids:
            return token.encode()
        if self._is_byte_level:
            return byte_level_bytes(token)
        if token_id in self._tokenizer.byte_by_id:
            return bytes([self._tokenizer.byte_by_id[token_id]])
        # Decode it after itself: decoders treat the beginning of a text differently.
        alone = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return self._tokenizer.decode([token_id, token_id], skip_special_tokens=False)[len(alone) :].encode()
