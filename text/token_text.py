"""The text of single tokens, as logprobs show it. Knows no sequence: incremental.py makes texts of many."""

from __future__ import annotations

from typing import NamedTuple

from .incremental import byte_level_bytes
from .tokenizer import Tokenizer


class TokenText(NamedTuple):
    """One token by itself."""

    text: str  # bytes that are no character by themselves show as replacement characters
    raw: bytes


class TokenTexts:
    """Texts of a tokenizer's tokens, each worked out once. Safe to share between threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._is_byte_level = tokenizer.decoder_kinds == ("ByteLevel",)
        self._known: dict[int, TokenText] = {}

    def of(self, token_id: int) -> TokenText:
        """What the token adds in the midst of a text; special tokens as they are written. Unknown ids: nothing."""
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
        # Behind itself, so that nothing that is special about a text's beginning shows.
        alone = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return self._tokenizer.decode([token_id, token_id], skip_special_tokens=False)[len(alone) :].encode()
