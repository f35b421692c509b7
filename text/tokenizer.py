"""Text to token ids and back. Knows no request and no template; incremental.py grows text token by token."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from ..core.errors import CheckpointError, InvalidRequest
from .files import read_json, read_text
from .gguf_file import GgufFile, is_gguf
from .gguf_tokenizer import read_vocabulary
from .special_tokens import NamedTokens, add_named_tokens, read_named_tokens


class Tokenizer:
    """A checkpoint's tokenizer. Never changes after it was loaded, and so is safe to share between threads."""

    def __init__(self, backend: tokenizers.Tokenizer, special: Mapping[str, str], eos_ids: Sequence[int]) -> None:
        """Take over `backend`; `special` maps names like "bos_token" to tokens.

        Raises:
            CheckpointError: a special token or an end-of-sequence id is not in the vocabulary.
        """
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
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
        """Read tokenizer.json and the files beside it that name tokens (special_tokens.py); or a GGUF file.

        generation_config.json's `eos_token_id` also end a text, e.g. a chat's end of turn.

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
            backend = tokenizers.Tokenizer.from_str(read_text(path))
        except CheckpointError:
            raise
        except Exception as error:  # tokenizers raises bare Exception for every broken file
            raise CheckpointError(f"{path}: is no tokenizer: {error}") from None
        named = read_named_tokens(directory)
        try:
            held = backend.get_vocab_size(with_added_tokens=True)
            add_named_tokens(backend, named)
            _check_rows(backend, named, held, directory)
            special = {name: token.content for name, token in named.by_name.items()}
            return cls(backend, special, _generation_eos_ids(directory))
        except CheckpointError as error:
            raise CheckpointError(f"{directory}: {error.message}") from None

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The library's tokenizer; must not be changed."""
        return self._backend

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self._vocab_size

    @property
    def eos_id(self) -> int | None:
        """The end-of-sequence token that the checkpoint names first."""
        return self.eos_ids[0] if self.eos_ids else None

    @cached_property
    def byte_by_id(self) -> Mapping[int, int]:
        """Which byte the tokens `<0x00>` to `<0xFF>` stand for; empty where the decoder takes them for text."""
        if "ByteFallback" not in self.decoder_kinds:
            return {}
        spelt = {f"<0x{byte:{form}}>": byte for byte in range(256) for form in ("02X", "02x")}
        found = {self._backend.token_to_id(token): byte for token, byte in spelt.items()}
        return {id_: byte for id_, byte in found.items() if id_ is not None}

    @cached_property
    def special_words(self) -> re.Pattern[str]:
        """Finds special tokens that are written out in a text; of several at one place the longest."""
        words = sorted({token for id_ in self.special_ids if (token := self.token(id_))}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, words)) or r"(?!)")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`. Special tokens written out in it count as themselves, as chat templates need it.

        Lets other threads run meanwhile.

        Raises:
            InvalidRequest: `text` has unpaired surrogates, and so is no Unicode text.
        """
        ids: list[int] = self._encoding(text, add_special_tokens).ids
        return ids

    def places(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Where in `text` each token of `encode` begins: at the character that holds its first byte.

        What is added around the text is where the next token is, or the end. Raises what `encode` raises.
        """
        encoding = self._encoding(text, add_special_tokens)
        places: list[int] = []
        end, chunk, num_chars = 0, (0, 0), 0
        for id_, place, is_added in zip(encoding.ids, encoding.offsets, encoding.special_tokens_mask, strict=True):
            start, stop = (end, end) if is_added else place
            if place != chunk or id_ not in self.byte_by_id:
                chunk, num_chars = place, 0
            # Some tokenizers give all bytes of several characters the place of the first.
            num_chars += not 0x80 <= self.byte_by_id.get(id_, 0) < 0xC0
            # Some leave the space before a word out of its token, so the gap belongs to the next one.
            places.append(min(max(start, min(start + num_chars, stop) - 1), end))
            end = max(stop, end)
        return places

    def _encoding(self, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"prompt is no valid Unicode: {error.reason} at {error.start}", param="prompt"
            ) from None
        return self._backend.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Ids outside the vocabulary give no text."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token(self, token_id: int) -> str | None:
        """The vocabulary's entry, in the tokenizer's own spelling; None for an id outside of it."""
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


def _check_rows(backend: tokenizers.Tokenizer, named: NamedTokens, num_held: int, directory: Path) -> None:
    """Refuse a beginning or end of texts that neither tokenizer.json (`num_held` tokens) nor the model knows."""
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


def _decoder_kinds(decoder: Any) -> tuple[str, ...]:
    """The steps that make text of tokens, sequences unrolled; none: tokens with a space between them."""
    if decoder is None:
        return ()
    if decoder["type"] == "Sequence":
        return tuple(kind for part in decoder["decoders"] for kind in _decoder_kinds(part))
    if decoder["type"] == "Strip" and (decoder["start"] > 1 or decoder["stop"] > 0):
        return (f"Strip({decoder['start']}, {decoder['stop']})",)  # unlike Strip(1, 0), the common one
    return (str(decoder["type"]),)
