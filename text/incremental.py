"""Text that grows with its tokens: only what can no longer change is given out. Knows no request and no clock.

The text of a sequence is a function of its ids alone, so everything here can be rebuilt by pushing the ids again.
Each token is decoded a bounded number of times, however long the text gets.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Protocol

from ..core.errors import CheckpointError
from .tokenizer import Tokenizer

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")

# Decoders whose text grows only at its end: a token's text depends on the token before it at most.
_PIECEWISE = frozenset({"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip", "BPEDecoder", "WordPiece"})


class _Growth(Protocol):
    """How the text of one sequence grows; ids are in the vocabulary and not to be skipped."""

    def push(self, ids: Sequence[int]) -> str: ...

    def flush(self) -> str: ...


class IncrementalText:
    """The text of one sequence. All pushes and the flush, put together, are `tokenizer.decode(all ids)`."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        """Start an empty text.

        Raises:
            CheckpointError: the tokenizer's decoder is of a kind whose text cannot be given out piece by piece.
        """
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._growth: _Growth = _growth_of(tokenizer)

    def push(self, ids: Iterable[int]) -> str:
        """What `ids` add to the text, as far as no later token can change it."""
        kept = [id_ for id_ in ids if id_ not in self._skipped and self._tokenizer.token(id_) is not None]
        return self._growth.push(kept) if kept else ""

    def flush(self) -> str:
        """The sequence is over: what was withheld. Nothing may be pushed afterwards."""
        return self._growth.flush()


def check_decoder(tokenizer: Tokenizer) -> None:
    """Find out at start-up whether texts of this tokenizer can grow.

    Raises:
        CheckpointError: they cannot; names the decoder.
    """
    _growth_of(tokenizer)


# ---------------------------------------------------------------- byte-level BPE


class _ByteLevelGrowth:
    """Tokens are bytes in disguise; the text is their UTF-8. An incomplete sequence waits for its rest."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        return self._decoder.decode(b"".join(byte_level_bytes(self._tokenizer.token(id_) or "") for id_ in ids))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


@cache
def _byte_by_character() -> dict[str, int]:
    """The disguise: printable bytes stand for themselves, the others for characters from U+0100 on.

    Source: Radford et al. 2019, the published byte-level vocabulary.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + place): b for place, b in enumerate(hidden)}


def byte_level_bytes(token: str) -> bytes:
    """The bytes that a token of a byte-level vocabulary stands for."""
    table = _byte_by_character()
    try:
        return bytes(table[character] for character in token)
    except KeyError:  # an added token that is not in disguise
        return token.encode()


# ---------------------------------------------------------------- everything that grows piece by piece


class _PiecewiseGrowth:
    """Decodes new tokens behind the one before them, so that nothing but the very first is at the text's start.

        ids:  … given out … | lead | settled now … | byte tokens, waiting |
                              └──── decoded ─────┘

    A run of byte tokens is text only as a whole: one wrong byte makes every byte of the run a replacement character.
    So it waits for its end.
    """

    def __init__(self, tokenizer: Tokenizer, has_byte_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._has_byte_tokens = has_byte_tokens
        self._lead: list[int] = []
        self._lead_chars = 0
        self._waiting: list[int] = []

    def push(self, ids: Sequence[int]) -> str:
        run = 0
        if self._has_byte_tokens:
            while run < len(ids) and BYTE_TOKEN.fullmatch(self._tokenizer.token(ids[-1 - run]) or ""):
                run += 1
        settled, waiting = ids[: len(ids) - run], ids[len(ids) - run :]
        if not settled:
            self._waiting += waiting
            return ""
        text = self._settle([*self._waiting, *settled])
        self._waiting = list(waiting)
        return text

    def flush(self) -> str:
        waiting, self._waiting = self._waiting, []
        return self._settle(waiting) if waiting else ""

    def _settle(self, ids: list[int]) -> str:
        text = self._decode([*self._lead, *ids])[self._lead_chars :]
        self._lead = ids[-1:]
        self._lead_chars = len(self._decode(self._lead))
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


# ---------------------------------------------------------------- which is which


def _growth_of(tokenizer: Tokenizer) -> _Growth:
    kinds = tokenizer.decoder_kinds
    if kinds == ("ByteLevel",):
        return _ByteLevelGrowth(tokenizer)
    after_fuse = kinds[kinds.index("Fuse") + 1 :] if "Fuse" in kinds else ()
    if set(kinds) <= _PIECEWISE and set(after_fuse) <= {"Strip"}:
        return _PiecewiseGrowth(tokenizer, "ByteFallback" in kinds)
    raise CheckpointError(
        f"tokenizer.json: the decoder {' + '.join(kinds)} is not one whose text can be given out piece by piece "
        f"(ByteLevel, or any of {', '.join(sorted(_PIECEWISE))}, nothing but Strip after Fuse)"
    )
