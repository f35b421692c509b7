"""Converts text to token ids and back. Knows no request and no template; incremental.py decodes token by token."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from ..checkpoint.gguf.file import GgufFile, is_gguf
from ..checkpoint.gguf.special_ids import HARMONY_ENDS
from ..core.errors import CheckpointError, InvalidRequest
from .cuts import Cuts, Piece, encode_all, is_long
from .files import read_json, read_text
from .gguf_tokenizer import read_vocabulary
from .slow_patterns import check_blanks, without_slow_patterns
from .special_tokens import NamedTokens, add_named_tokens, read_named_tokens
from .token_bounds import TokenBounds


class TooManyTokens(Exception):
    """A text has more tokens than allowed; it was not tokenised to its end."""

    def __init__(self, least: int) -> None:
        super().__init__(f"{least} tokens or more")
        self.least = least  # lower bound of the text's number of tokens


class Tokenizer:
    """Tokenizer of a checkpoint. It does not change after loading, so it is safe to share between threads."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special: Mapping[str, str],
        eos_ids: Sequence[int],
        *,
        bounds_blanks: bool = False,
    ) -> None:
        """Own `backend`. `special`: tokens by names like "bos_token". `bounds_blanks`: limit runs of blanks.

        Raises:
            CheckpointError: a special token or an end-of-sequence id is not in the vocabulary.
        """
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._bounds_blanks = bounds_blanks
        self._vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.special_tokens = dict(special)
        self.bos_id = self._special_id("bos_token")
        eos_id = self._special_id("eos_token")
        self.eos_ids = tuple(dict.fromkeys([*([eos_id] if eos_id is not None else []), *eos_ids]))
        for wrong in (id_ for id_ in self.eos_ids if self.token(id_) is None):
            raise CheckpointError(f"end-of-sequence id {wrong} is not in the tokenizer's vocabulary")
        self.decoder_kinds = _decoder_kinds(json.loads(backend.decoder.__getstate__()) if backend.decoder else None)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(id_ for id_, token in added.items() if token.special)

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Read tokenizer.json and the files beside it that name tokens (special_tokens.py), or a GGUF file.

        The ids in generation_config.json's `eos_token_id` also end a text, e.g. a chat's end of turn; and both ends of
        gpt-oss's answers, which a file may leave out.

        Raises:
            CheckpointError: a file is missing or broken, or they contradict each other; names it.
        """
        if is_gguf(directory):
            return cls(*read_vocabulary(GgufFile(directory)))
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{path}: is missing; only checkpoints with a tokenizer.json can be served")
        try:
            source, bounds_blanks = without_slow_patterns(read_text(path))
            backend = tokenizers.Tokenizer.from_str(source)
        except CheckpointError:
            raise
        except Exception as error:  # tokenizers raises Exception itself for every broken file
            raise CheckpointError(f"{path}: is no tokenizer: {error}") from None
        named = read_named_tokens(directory)
        try:
            held = backend.get_vocab_size(with_added_tokens=True)
            add_named_tokens(backend, named)
            _check_rows(backend, named, held, directory)
            special = {name: token.content for name, token in named.by_name.items()}
            ends = (*_generation_eos_ids(directory), *_harmony_ends(backend))
            return cls(backend, special, ends, bounds_blanks=bounds_blanks)
        except CheckpointError as error:
            raise CheckpointError(f"{directory}: {error.message}") from None

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The library's tokenizer; do not change it."""
        return self._backend

    @property
    def vocab_size(self) -> int:
        """Number of tokens, including added ones."""
        return self._vocab_size

    @property
    def eos_id(self) -> int | None:
        """First end-of-sequence id of the checkpoint, or None."""
        return self.eos_ids[0] if self.eos_ids else None

    @cached_property
    def byte_by_id(self) -> Mapping[int, int]:
        """Byte of each of the tokens `<0x00>` to `<0xFF>`, by id; empty if the decoder treats them as text."""
        if "ByteFallback" not in self.decoder_kinds:
            return {}
        spelt = {f"<0x{byte:{form}}>": byte for byte in range(256) for form in ("02X", "02x")}
        found = {self._backend.token_to_id(token): byte for token, byte in spelt.items()}
        return {id_: byte for id_, byte in found.items() if id_ is not None}

    @cached_property
    def special_words(self) -> re.Pattern[str]:
        """Pattern that finds special tokens in a text; of several at one place the longest."""
        words = sorted({token for id_ in self.special_ids if (token := self.token(id_))}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, words)) or r"(?!)")

    def prepare(self) -> None:
        """Compute the data for long texts now, so that the first long text does not wait for it."""
        _ = self._bounds, self._cuts, self._around

    def least_tokens(self, text: str) -> int:
        """Lower bound of the text's number of tokens, from its bytes; 0 if no bound is known."""
        return self._bounds.least(text)

    def encode(self, text: str, add_special_tokens: bool = True, most: int | None = None) -> list[int]:
        """Encode `text`. Special tokens in it become their ids, as chat templates need it.

        Releases the GIL. A long text is tokenised in pieces (cuts.py), so that memory besides its ids does not grow
        with its length; it stops after `most` ids.

        Raises:
            InvalidRequest: `text` has unpaired surrogates, or a too long stretch without a place to cut.
            TooManyTokens: it has more than `most`.
        """
        _check_unicode(text)
        if most is not None and len(text) > most and (least := self.least_tokens(text)) > most:
            raise TooManyTokens(least)
        if self._bounds_blanks:
            check_blanks(text)
        before, after = self._edges(text, add_special_tokens)
        ids = [*before]
        for piece, adds in self._pieces(text, add_special_tokens):
            ids += encode_all(self._backend, [piece.text], adds)[0].ids
            if most is not None and len(ids) > most:
                raise TooManyTokens(len(ids))
        ids += after
        if most is not None and len(ids) > most:
            raise TooManyTokens(len(ids))
        return ids

    def places(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Place in `text` of each token of `encode`: the character with its first byte.

        A token added around the text has the place of the next token, or the end. Raises the errors of `encode`.
        """
        _check_unicode(text)
        before, after = self._edges(text, add_special_tokens)
        places: list[int] = [0] * len(before)
        end, chunk, num_chars = 0, (0, 0), 0
        for id_, place, is_added in self._placed(text, add_special_tokens):
            start, stop = (end, end) if is_added else place
            if place != chunk or id_ not in self.byte_by_id:
                chunk, num_chars = place, 0
            # Some tokenizers give all bytes of several characters the place of the first character.
            num_chars += not 0x80 <= self.byte_by_id.get(id_, 0) < 0xC0
            # Some leave the space before a word out of its token; the gap then belongs to the next token.
            places.append(min(max(start, min(start + num_chars, stop) - 1), end))
            end = max(stop, end)
        return places + [end] * len(after)

    def _placed(self, text: str, add_special_tokens: bool) -> Iterator[tuple[int, tuple[int, int], int]]:
        """Yield for every token: id, [start, stop) in `text`, and 1 if it was added around the text."""
        for piece, adds in self._pieces(text, add_special_tokens):
            # One text as a batch: `encode` holds the GIL and blocks all other threads, `encode_batch` does not.
            found = self._backend.encode_batch([piece.text], add_special_tokens=adds)[0]
            for id_, (start, stop), is_added in zip(found.ids, found.offsets, found.special_tokens_mask, strict=True):
                yield id_, (start + piece.start, stop + piece.start), is_added

    def _is_cut(self, text: str) -> bool:
        return is_long(text) and self._around is not None

    def _pieces(self, text: str, add_special_tokens: bool) -> Iterator[tuple[Piece, bool]]:
        """Yield the pieces of a text, each with the flag to add special tokens: only for a text in one piece."""
        if not self._is_cut(text):
            yield Piece(0, text), add_special_tokens
            return
        for piece in self._cuts.pieces(text):
            yield piece, False

    @cached_property
    def _bounds(self) -> TokenBounds:
        return TokenBounds(self._backend)

    @cached_property
    def _cuts(self) -> Cuts:
        return Cuts(self._backend)

    @cached_property
    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Ids before and after every text, e.g. the beginning of sequence. None: they cannot be separated."""
        inner, whole = (encode_all(self._backend, ["a b"], adds)[0].ids for adds in (False, True))
        for place in range(len(whole) - len(inner) + 1):
            if inner and whole[place : place + len(inner)] == inner:
                return tuple(whole[:place]), tuple(whole[place + len(inner) :])
        return None

    def _edges(self, text: str, add_special_tokens: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids around a text of several pieces; the encoding of a single piece already includes them."""
        return (self._around if add_special_tokens and self._is_cut(text) else None) or ((), ())

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Decode `ids`. Ids outside the vocabulary give no text."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token(self, token_id: int) -> str | None:
        """Entry of the vocabulary, as stored by the tokenizer; None for an id outside of it."""
        token: str | None = self._backend.id_to_token(token_id)
        return token

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        if token is None:
            return None
        token_id: int | None = self._backend.token_to_id(token)
        if token_id is None:
            raise CheckpointError(f"tokenizer_config.json: {name} {token!r} is not in tokenizer.json's vocabulary")
        return token_id


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"prompt is no valid Unicode: {error.reason} at {error.start}", param="prompt") from None


def _check_rows(backend: tokenizers.Tokenizer, named: NamedTokens, num_held: int, directory: Path) -> None:
    """Refuse bos and eos tokens that neither tokenizer.json (`num_held` tokens) nor the model contains."""
    config = read_json(directory / "config.json", optional=True)
    nested = config.get("text_config")
    num_rows = (nested if isinstance(nested, Mapping) else config).get("vocab_size")
    for name in ("bos_token", "eos_token"):
        token = named.by_name.get(name)
        if token is None or not isinstance(num_rows, int):
            continue
        if (backend.token_to_id(token.content) or 0) >= max(num_held, num_rows):
            raise CheckpointError(
                f"tokenizer_config.json: {name} {token.content!r} is not in tokenizer.json's vocabulary, and the model "
                f"has {num_rows} rows; name a token that it was trained with"
            )


def _generation_eos_ids(directory: Path) -> tuple[int, ...]:
    path = directory / "generation_config.json"
    found: Any = read_json(path, optional=True).get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(id_, int) and not isinstance(id_, bool) and id_ >= 0 for id_ in ids):
        raise CheckpointError(f"{path}: eos_token_id is {found!r}; must be a token id or a list of them")
    return tuple(ids)


def _harmony_ends(backend: tokenizers.Tokenizer) -> tuple[int, ...]:
    """Ends of an answer in the Harmony format; none if the vocabulary has not both as special tokens."""
    special = {token.content: id_ for id_, token in backend.get_added_tokens_decoder().items() if token.special}
    return tuple(special[word] for word in HARMONY_ENDS) if special.keys() >= set(HARMONY_ENDS) else ()


def _decoder_kinds(decoder: Any) -> tuple[str, ...]:
    """Steps of the decoder, with nested sequences flattened. Empty: tokens are joined with spaces."""
    if decoder is None:
        return ()
    if decoder["type"] == "Sequence":
        return tuple(kind for part in decoder["decoders"] for kind in _decoder_kinds(part))
    if decoder["type"] == "Strip" and (decoder["start"] > 1 or decoder["stop"] > 0):
        return (f"Strip({decoder['start']}, {decoder['stop']})",)  # Strip(1, 0) is the common one
    return (str(decoder["type"]),)
