"""Incremental text of a sequence of tokens: returns only text that can no longer change. Knows no request and no clock.

The text of a sequence is a function of its ids only, so all state can be rebuilt by pushing the ids again. Each token
is decoded a bounded number of times, independent of the text's length.

A text may follow a prompt. It is then the decoded text of all ids without the decoded text of the prompt: a first word
keeps the space that decoders strip from the beginning of a text. In two cases the longer text does not begin with the
shorter one. Output that completes a character begun in the prompt contains the whole character. Byte tokens that are
whole characters at the prompt's end stay so: bytes of the output after them form a separate run.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, cached_property
from typing import Protocol

from ..core.errors import CheckpointError
from .tokenizer import Tokenizer

# Decoder steps with which a token's text depends at most on the token before it.
_PIECEWISE = frozenset({"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip", "BPEDecoder", "WordPiece"})


class _Growth(Protocol):
    """Decoding of one sequence for one kind of decoder. All ids are in the vocabulary and not skipped."""

    def start_behind(self, backwards: Iterator[int]) -> None:
        """Take a prompt's last ids, in reverse order, as many as the text depends on."""
        ...

    def push(self, ids: Sequence[int]) -> str: ...

    def flush(self) -> str:
        """Return the text of waiting tokens, even if incomplete. Later tokens do not continue it."""
        ...

    def breaks(self, token_id: int) -> bool: ...


class IncrementalText:
    """Incremental text of one sequence. All pushes and the flush, joined, equal `tokenizer.decode(all ids)`."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = ()) -> None:
        """Start an empty text, after a prompt if there is one.

        Raises:
            CheckpointError: the tokenizer's decoder is of a kind that cannot decode incrementally.
        """
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._growth: _Growth = _growth_of(tokenizer)
        self._growth.start_behind(id_ for id_ in reversed(prompt_ids) if self.gives_text(id_))

    def push(self, ids: Iterable[int]) -> str:
        """Return the text that `ids` add and that no later token can change."""
        kept = [id_ for id_ in ids if self.gives_text(id_)]
        return self._growth.push(kept) if kept else ""

    def flush(self) -> str:
        """Return the withheld text, at the end of the sequence or before other text."""
        return self._growth.flush()

    def breaks(self, token_id: int) -> bool:
        """Return whether pushing this token next makes the waiting bytes a broken character before its own text."""
        return self.gives_text(token_id) and self._growth.breaks(token_id)

    def gives_text(self, token_id: int) -> bool:
        """Return whether the token is in the vocabulary and not skipped."""
        return token_id not in self._skipped and self._tokenizer.token(token_id) is not None


def check_decoder(tokenizer: Tokenizer) -> None:
    """Check at start-up that this tokenizer can decode incrementally.

    Raises:
        CheckpointError: it cannot; names the decoder.
    """
    _growth_of(tokenizer)


def unfinished(data: bytes) -> bytes:
    """Last bytes of `data` that begin a UTF-8 character without completing it: at most three, usually none."""
    for length in range(1, min(3, len(data)) + 1):
        tail = data[-length:]
        if tail[0] >= 0xC0:  # first byte of a character
            return tail if not codecs.getincrementaldecoder("utf-8")("replace").decode(tail) else b""
    return b""


# ---------------------------------------------------------------- byte-level BPE


class _ByteLevelGrowth:
    """Decoding of byte-level tokens, which encode bytes; the text is UTF-8. Incomplete characters wait."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._said = ""  # replacement characters at the end of the prompt's text for an incomplete character

    def start_behind(self, backwards: Iterator[int]) -> None:
        data = b""
        while len(data) < 3 and (id_ := next(backwards, None)) is not None:
            data = self._bytes(id_) + data
        tail = unfinished(data)
        self._decoder.decode(tail)
        self._said = tail.decode("utf-8", "replace")

    def push(self, ids: Sequence[int]) -> str:
        return self._less_said(self._decoder.decode(b"".join(map(self._bytes, ids))))

    def flush(self) -> str:
        return self._less_said(self._decoder.decode(b"", final=True))

    def breaks(self, token_id: int) -> bool:
        waiting, _ = self._decoder.getstate()
        first = self._bytes(token_id)[:1]
        if not waiting or not first or self._said:
            return False
        try:
            codecs.getincrementaldecoder("utf-8")().decode(waiting + first)
        except UnicodeDecodeError:
            return True
        return False

    def _less_said(self, text: str) -> str:
        if text and self._said:
            text, self._said = text.removeprefix(self._said), ""
        return text

    def _bytes(self, token_id: int) -> bytes:
        return byte_level_bytes(self._tokenizer.token(token_id) or "")


@cache
def _byte_by_character() -> dict[str, int]:
    """Byte of each character of a byte-level vocabulary: printable bytes as themselves, others from U+0100 on.

    Source: Radford et al. 2019, the published byte-level vocabulary.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + place): b for place, b in enumerate(hidden)}


def byte_level_bytes(token: str) -> bytes:
    """Bytes of a token of a byte-level vocabulary."""
    table = _byte_by_character()
    try:
        return bytes(table[character] for character in token)
    except KeyError:  # an added token, which is plain text
        return token.encode()


# ---------------------------------------------------------------- everything that grows piece by piece


class _PiecewiseGrowth:
    """Decodes new tokens after the token before them, so that only the very first is at the start of a text.

        ids:  … returned … | lead | settled now … | byte tokens, waiting |
                             └──── decoded ─────┘

    A run of byte tokens becomes text only as a whole: one wrong byte makes every byte of the run a replacement
    character. So the run waits for its end. The lead is never a byte token: it would continue a finished run.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._byte_by_id = tokenizer.byte_by_id
        self._lead: list[int] = []
        self._lead_chars = 0
        self._waiting: list[int] = []
        self._num_said = 0  # replacement characters at the end of the prompt's text for the waiting bytes

    def start_behind(self, backwards: Iterator[int]) -> None:
        run: list[int] = []
        last: int | None = None
        for last in backwards:
            if last not in self._byte_by_id:
                break
            run.append(last)
        if last is not None:
            self._take_lead([last])
        self._waiting = self._open_end(run[::-1])
        self._num_said = len(self._waiting)

    def push(self, ids: Sequence[int]) -> str:
        run = 0
        while run < len(ids) and ids[-1 - run] in self._byte_by_id:
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

    def breaks(self, token_id: int) -> bool:
        return False  # waiting byte tokens have a text of their own, which `flush` returns

    def _open_end(self, run: list[int]) -> list[int]:
        """Byte tokens at the end of a prompt's last run that affect the bytes after it: at most four."""
        data = bytes(self._byte_by_id[id_] for id_ in run)
        tail = unfinished(data)
        try:
            data[: len(data) - len(tail)].decode()
        except UnicodeDecodeError as error:  # the run stays broken: its first wrong bytes are enough
            return run[error.start : error.end + 1]
        return run[len(run) - len(tail) :]

    def _settle(self, ids: list[int]) -> str:
        text = self._decode([*self._lead, *ids])[self._lead_chars :]
        self._take_lead(ids)
        while self._num_said and text.startswith("\ufffd"):
            text = text[1:]
            self._num_said -= 1
        self._num_said = 0
        return text

    def _take_lead(self, ids: list[int]) -> None:
        """Set the lead to the last of `ids`, or to any other token if that is a byte token: the text is the same."""
        last = ids[-1] if ids[-1] not in self._byte_by_id else self._any_other
        self._lead = [] if last is None else [last]
        self._lead_chars = len(self._decode(self._lead))

    @cached_property
    def _any_other(self) -> int | None:
        ids = range(self._tokenizer.vocab_size)
        return next((id_ for id_ in ids if id_ not in self._byte_by_id and self._tokenizer.token(id_)), None)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


# ---------------------------------------------------------------- which is which


def _growth_of(tokenizer: Tokenizer) -> _Growth:
    kinds = tokenizer.decoder_kinds
    if kinds == ("ByteLevel",):
        return _ByteLevelGrowth(tokenizer)
    after_fuse = kinds[kinds.index("Fuse") + 1 :] if "Fuse" in kinds else ()
    if set(kinds) <= _PIECEWISE and set(after_fuse) <= {"Strip"}:
        return _PiecewiseGrowth(tokenizer)
    raise CheckpointError(
        f"tokenizer.json: the decoder {' + '.join(kinds)} is not one whose text can be given out piece by piece "
        f"(ByteLevel, or any of {', '.join(sorted(_PIECEWISE))}, nothing but Strip after Fuse)"
    )
