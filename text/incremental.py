"""Text that grows with its tokens: only what can no longer change is given out. Knows no request and no clock.

The text of a sequence is a function of its ids alone, so everything here can be rebuilt by pushing the ids again.
Each token is decoded a bounded number of times, however long the text gets.

A text may start behind a prompt. It is then what all ids decode to, less what the prompt's decode to: a first word
keeps the space that decoders strip from the beginning of a text. There are two cases where the longer text does not
begin with the shorter one. Output that completes a character which the prompt began gives that character, whole. Byte
tokens that made whole characters at the prompt's end stay so: bytes of the output behind them are a run of their own.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, cached_property
from typing import Protocol

from ..core.errors import CheckpointError
from .tokenizer import Tokenizer

# Decoders whose text grows only at its end: a token's text depends on the token before it at most.
_PIECEWISE = frozenset({"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip", "BPEDecoder", "WordPiece"})


class _Growth(Protocol):
    """How the text of one sequence grows; ids are in the vocabulary and not to be skipped."""

    def start_behind(self, backwards: Iterator[int]) -> None:
        """Take a prompt's last ids, the very last first, as many as the text depends on."""
        ...

    def push(self, ids: Sequence[int]) -> str: ...

    def flush(self) -> str:
        """What waits, as it is. What is pushed afterwards does not go on from it."""
        ...

    def breaks(self, token_id: int) -> bool: ...


class IncrementalText:
    """The text of one sequence. All pushes and the flush, put together, are `tokenizer.decode(all ids)`."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = ()) -> None:
        """Start an empty text, behind a prompt where there is one.

        Raises:
            CheckpointError: the tokenizer's decoder is of a kind whose text cannot be given out piece by piece.
        """
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._growth: _Growth = _growth_of(tokenizer)
        self._growth.start_behind(id_ for id_ in reversed(prompt_ids) if self.gives_text(id_))

    def push(self, ids: Iterable[int]) -> str:
        """What `ids` add to the text, as far as no later token can change it."""
        kept = [id_ for id_ in ids if self.gives_text(id_)]
        return self._growth.push(kept) if kept else ""

    def flush(self) -> str:
        """What was withheld: the sequence is over, or something else follows here."""
        return self._growth.flush()

    def breaks(self, token_id: int) -> bool:
        """Whether the token, pushed next, leaves what waits a broken character, to stand before its own text."""
        return self.gives_text(token_id) and self._growth.breaks(token_id)

    def gives_text(self, token_id: int) -> bool:
        """Whether it is in the vocabulary and not to be skipped."""
        return token_id not in self._skipped and self._tokenizer.token(token_id) is not None


def check_decoder(tokenizer: Tokenizer) -> None:
    """Find out at start-up whether texts of this tokenizer can grow.

    Raises:
        CheckpointError: they cannot; names the decoder.
    """
    _growth_of(tokenizer)


def unfinished(data: bytes) -> bytes:
    """The end of `data` that is the beginning of a UTF-8 character: up to three bytes, mostly none."""
    for length in range(1, min(3, len(data)) + 1):
        tail = data[-length:]
        if tail[0] >= 0xC0:  # begins a character
            return tail if not codecs.getincrementaldecoder("utf-8")("replace").decode(tail) else b""
    return b""


# ---------------------------------------------------------------- byte-level BPE


class _ByteLevelGrowth:
    """Tokens are bytes in disguise; the text is their UTF-8. An incomplete sequence waits for its rest."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._said = ""  # how the prompt's text ends, where it ends within a character

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
    So it waits for its end. The lead is never one of them: a run that is over must not go on.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._byte_by_id = tokenizer.byte_by_id
        self._lead: list[int] = []
        self._lead_chars = 0
        self._waiting: list[int] = []
        self._num_said = 0  # replacement characters that the prompt's text ended with, for what waits

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
        return False  # what waits has a text of its own, which flushing gives

    def _open_end(self, run: list[int]) -> list[int]:
        """The byte tokens of a prompt's last run on which the bytes behind it depend: at most four."""
        data = bytes(self._byte_by_id[id_] for id_ in run)
        tail = unfinished(data)
        try:
            data[: len(data) - len(tail)].decode()
        except UnicodeDecodeError as error:  # whatever follows, the run is broken: its first wrong bytes tell as much
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
        """The last of `ids`; instead of a byte token any other one: what it is changes nothing behind it."""
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
