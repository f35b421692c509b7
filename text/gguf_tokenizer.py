"""Tokenizer and chat templates from a GGUF file's metadata. Knows no tensor, no model.

Two kinds: byte-level BPE with merges (`tokenizer.ggml.model` "gpt2"), and SentencePiece's BPE by scores ("llama").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from ..checkpoint.gguf.file import GgufFile
from ..checkpoint.gguf.special_ids import (
    CHAT_ENDS,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    end_ids,
    special_ids,
    special_tokens_of,
    token_id,
    token_kinds,
    tokens_of,
)
from ..core.errors import CheckpointError
from .gguf_words import RULES


class Vocabulary(NamedTuple):
    """Arguments of `text/tokenizer.py`'s Tokenizer."""

    backend: tokenizers.Tokenizer
    special: dict[str, str]  # special tokens by their names in chat templates
    eos_ids: tuple[int, ...]


def read_vocabulary(file: GgufFile) -> Vocabulary:
    """Read the tokenizer of a file.

    Raises:
        CheckpointError: it has no tokenizer, or one of an unsupported kind; names the key.
    """
    tokens, kind = tokens_of(file), file.text("tokenizer.ggml.model")
    if kind == "gpt2":
        backend, begins = _byte_level(file, tokens)
    elif kind == "llama":
        backend, begins = _by_scores(file, tokens)
    else:
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.model is {kind!r}; served: gpt2, llama. Give the model in safetensors "
            "with its tokenizer.json"
        )
    named = special_ids(file)
    if kind == "llama" and (unknown := token_id(file, "unknown_token_id")) is not None:
        named |= {unknown}  # gives no text. Byte-level vocabularies need none; some files name an arbitrary one
    _add_tokens(backend, tokens, token_kinds(file, tokens), named)
    _add_ends(file, backend, tokens, begins)
    return Vocabulary(backend, special_tokens_of(file, tokens), end_ids(file, tokens))


def read_templates(file: GgufFile) -> dict[str, str]:
    """Read the chat templates, by name; the one without a name becomes "default"."""
    found = {}
    for key, value in file.metadata.items():
        if isinstance(value, str) and key.startswith("tokenizer.chat_template"):
            found[key.removeprefix("tokenizer.chat_template").removeprefix(".") or "default"] = value
    return found


# ---------------------------------------------------------------- the two kinds


def _byte_level(file: GgufFile, tokens: list[str]) -> tuple[tokenizers.Tokenizer, bool]:
    name = file.metadata.get("tokenizer.ggml.pre", "default")
    rule = RULES.get(str(name))
    if rule is None:
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.pre is {name!r}; served: {', '.join(RULES)}. Give the model in safetensors "
            "with its tokenizer.json"
        )
    merges = [_split_merge(merge) for merge in file.strings("tokenizer.ggml.merges")]
    if not merges:
        raise CheckpointError(f"{file.path} has no tokenizer.ggml.merges; fetch or convert it again")
    try:
        backend = tokenizers.Tokenizer(models.BPE(_ids(tokens), merges, ignore_merges=rule.whole_words))
    except Exception as error:  # tokenizers raises Exception itself
        raise CheckpointError(f"{file.path}: tokenizer.ggml.merges do not fit the tokens: {error}") from None
    if rule.composed:
        backend.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rule.patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, rule.begins


def _split_merge(merge: str) -> tuple[str, str]:
    left, _, right = merge[1:].partition(" ")  # a part may begin with a space, but is never just a space
    return merge[:1] + left, right


def _by_scores(file: GgufFile, tokens: list[str]) -> tuple[tokenizers.Tokenizer, bool]:
    scores = file.numbers("tokenizer.ggml.scores")
    if len(scores) != len(tokens):
        raise CheckpointError(
            f"{file.path}: {len(scores)} tokenizer.ggml.scores for {len(tokens)} tokens; fetch or convert it again"
        )
    unknown = token_id(file, "unknown_token_id")
    kinds = token_kinds(file, tokens)
    if unknown is None:
        unknown = next((i for i, kind in enumerate(kinds) if kind == UNKNOWN), 0)
    merges = _merges(tokens, scores, kinds)
    backend = tokenizers.Tokenizer(
        models.BPE(_ids(tokens), merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
    )
    prefixed = file.flag("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "\u2581")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces]) if prefixed else spaces
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
    return backend, True


def _merges(tokens: list[str], scores: list[float], kinds: list[int]) -> list[tuple[str, str]]:
    """All pairs of tokens that form a third, best score first: SentencePiece's rule as a list of merges."""
    by_text = _ids(tokens)
    found: list[tuple[float, int, int, int]] = []
    for id_, token in enumerate(tokens):
        if kinds[id_] != NORMAL or len(token) < 2:
            continue
        for place in range(1, len(token)):
            left, right = by_text.get(token[:place]), by_text.get(token[place:])
            if left is not None and right is not None:
                found.append((-scores[id_], id_, left, right))
    found.sort()
    return [(tokens[left], tokens[right]) for _, _, left, right in found]


# ---------------------------------------------------------------- what both have


def _ids(tokens: Sequence[str]) -> dict[str, int]:
    """Ids by token. Of equal tokens only the first is included."""
    ids: dict[str, int] = {}
    for id_, token in enumerate(tokens):
        if token:
            ids.setdefault(token, id_)
    return ids


def _add_tokens(
    backend: tokenizers.Tokenizer, tokens: Sequence[str], kinds: Sequence[int], named: frozenset[int]
) -> None:
    """Add tokens that are matched as a whole in a text. Special and unknown ones produce no text."""
    first = _ids(tokens)
    added = []
    for id_, token in enumerate(tokens):
        is_end = token in CHAT_ENDS and kinds[id_] == USER_DEFINED
        special = kinds[id_] in (CONTROL, UNKNOWN) or id_ in named or is_end
        if (special or kinds[id_] == USER_DEFINED) and first.get(token) == id_:
            added.append(AddedToken(token, special=special, normalized=False))
    backend.add_tokens(added)


def _add_ends(file: GgufFile, backend: tokenizers.Tokenizer, tokens: Sequence[str], begins: bool) -> None:
    """Add the beginning-of-sequence and end-of-sequence tokens around a text if the file demands it."""
    around: list[tuple[str, int]] = []
    template = ["$A"]
    if file.flag("tokenizer.ggml.add_bos_token", begins) and (bos := token_id(file, "bos_token_id")) is not None:
        template.insert(0, "BOS")
        around.append(("BOS", bos))
    if file.flag("tokenizer.ggml.add_eos_token", False) and (eos := token_id(file, "eos_token_id")) is not None:
        template.append("EOS")
        around.append(("EOS", eos))
    if around:
        backend.post_processor = processors.TemplateProcessing(single=" ".join(template), special_tokens=around)
