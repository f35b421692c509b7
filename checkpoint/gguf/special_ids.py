"""Reads special tokens of a GGUF file, including those that begin and end a text. Makes no tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

from ...core.errors import CheckpointError
from .file import GgufFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
_SPECIAL_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "pad_token": "padding_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # GGUF's own spelling
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}
# A file names one end of a text, but chats also end with these, which only generation_config.json would name.
CHAT_ENDS = frozenset(
    {
        *("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>", "<|end|>", "<end_of_turn>"),
        *("<EOT>", "_<EOT>", "[EOT]", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<|return|>", "<|call|>"),
    }
)
# gpt-oss ends an answer with either of these; in its vocabulary <|end|> ends a message within an answer.
HARMONY_ENDS, _MESSAGE_END = ("<|return|>", "<|call|>"), "<|end|>"


def special_tokens_of(file: GgufFile, tokens: Sequence[str] | None = None) -> dict[str, str]:
    """Special tokens, by their names in chat templates."""
    tokens = tokens_of(file) if tokens is None else tokens
    named = {name: token_id(file, key) for name, key in _SPECIAL_KEYS.items()}
    return {name: tokens[id_] for name, id_ in named.items() if id_ is not None}


def special_ids(file: GgufFile) -> frozenset[int]:
    """All ids that the file names as special, except the unknown token."""
    keys = (*_SPECIAL_KEYS.values(), "eot_token_id", "eom_token_id")
    return frozenset(
        id_ for id_ in (token_id(file, key) for key in keys if key != "unknown_token_id") if id_ is not None
    )


def beginning_id(file: GgufFile) -> int | None:
    """Id of the beginning-of-sequence token, or None."""
    return token_id(file, "bos_token_id")


def end_ids(file: GgufFile, tokens: Sequence[str] | None = None) -> tuple[int, ...]:
    """Ids that end a text: those that the file names, and the CHAT_ENDS that are special in its vocabulary."""
    tokens = tokens_of(file) if tokens is None else tokens
    named = [token_id(file, key) for key in ("eos_token_id", "eot_token_id", "eom_token_id")]
    kinds = token_kinds(file, tokens)
    by_text = [i for i, token in enumerate(tokens) if token in CHAT_ENDS and kinds[i] in (CONTROL, USER_DEFINED)]
    if {tokens[i] for i in by_text}.issuperset(HARMONY_ENDS):
        by_text = [i for i in by_text if tokens[i] != _MESSAGE_END]
    return tuple(dict.fromkeys([id_ for id_ in named if id_ is not None] + by_text))


def tokens_of(file: GgufFile) -> list[str]:
    """Read the vocabulary: tokens in order of ids.

    Raises:
        CheckpointError: the file has none.
    """
    tokens = file.strings("tokenizer.ggml.tokens")
    if not tokens:
        raise CheckpointError(f"{file.path} has no tokenizer.ggml.tokens; give a file that holds its vocabulary")
    return tokens


def token_kinds(file: GgufFile, tokens: Sequence[str]) -> list[int]:
    """Read the kind (`NORMAL`, `CONTROL`, …) of each token.

    Raises:
        CheckpointError: the number of kinds differs from the number of tokens.
    """
    kinds = file.numbers("tokenizer.ggml.token_type")
    if kinds and len(kinds) != len(tokens):
        raise CheckpointError(
            f"{file.path}: {len(kinds)} tokenizer.ggml.token_type for {len(tokens)} tokens; fetch or convert it again"
        )
    return kinds or [NORMAL] * len(tokens)


def token_id(file: GgufFile, key: str) -> int | None:
    """Read the id under `tokenizer.ggml.<key>`. None: the file has none.

    Raises:
        CheckpointError: it is not an id of the vocabulary.
    """
    found = file.metadata.get("tokenizer.ggml." + key)
    array = file.metadata.get("tokenizer.ggml.tokens")
    count = getattr(array, "count", 0)
    if found is None or found in (-1, 0xFFFFFFFF):  # "none" of some converters
        return None
    if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found < count:
        raise CheckpointError(f"{file.path}: tokenizer.ggml.{key} is {found!r}; must be below {count}")
    return found
