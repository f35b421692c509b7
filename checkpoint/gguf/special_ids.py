"""What a GGUF file says of its tokens: which are special, which begin and end a text. Makes no tokenizer."""

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
    "sep_token": "seperator_token_id",  # GGUF spells it so
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}
# Files name one end of a text, but chats end in these too; Hugging Face's generation_config.json is not in the file.
CHAT_ENDS = frozenset(
    {
        *("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>", "<|end|>", "<end_of_turn>"),
        *("<EOT>", "_<EOT>", "[EOT]", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
    }
)


def special_tokens_of(file: GgufFile, tokens: Sequence[str] | None = None) -> dict[str, str]:
    """The special tokens by the names that chat templates know."""
    tokens = tokens_of(file) if tokens is None else tokens
    named = {name: token_id(file, key) for name, key in _SPECIAL_KEYS.items()}
    return {name: tokens[id_] for name, id_ in named.items() if id_ is not None}


def special_ids(file: GgufFile) -> frozenset[int]:
    """All ids that the file names as special."""
    keys = (*_SPECIAL_KEYS.values(), "eot_token_id", "eom_token_id")
    return frozenset(
        id_ for id_ in (token_id(file, key) for key in keys if key != "unknown_token_id") if id_ is not None
    )


def beginning_id(file: GgufFile) -> int | None:
    """The beginning-of-sequence token, where there is one."""
    return token_id(file, "bos_token_id")


def end_ids(file: GgufFile, tokens: Sequence[str] | None = None) -> tuple[int, ...]:
    """What ends a text: the ids that the file names, and the chat ends that its vocabulary holds as special tokens."""
    tokens = tokens_of(file) if tokens is None else tokens
    named = [token_id(file, key) for key in ("eos_token_id", "eot_token_id", "eom_token_id")]
    kinds = token_kinds(file, tokens)
    by_text = [i for i, token in enumerate(tokens) if token in CHAT_ENDS and kinds[i] in (CONTROL, USER_DEFINED)]
    return tuple(dict.fromkeys([id_ for id_ in named if id_ is not None] + by_text))


def tokens_of(file: GgufFile) -> list[str]:
    """The whole vocabulary, by id.

    Raises:
        CheckpointError: the file holds none.
    """
    tokens = file.strings("tokenizer.ggml.tokens")
    if not tokens:
        raise CheckpointError(f"{file.path} has no tokenizer.ggml.tokens; give a file that holds its vocabulary")
    return tokens


def token_kinds(file: GgufFile, tokens: Sequence[str]) -> list[int]:
    """`NORMAL`, `CONTROL` and so on, for each of the tokens.

    Raises:
        CheckpointError: the file has another number of them.
    """
    kinds = file.numbers("tokenizer.ggml.token_type")
    if kinds and len(kinds) != len(tokens):
        raise CheckpointError(
            f"{file.path}: {len(kinds)} tokenizer.ggml.token_type for {len(tokens)} tokens; fetch or convert it again"
        )
    return kinds or [NORMAL] * len(tokens)


def token_id(file: GgufFile, key: str) -> int | None:
    """The id under `tokenizer.ggml.<key>`; None: the file names none.

    Raises:
        CheckpointError: it is no id of the vocabulary.
    """
    found = file.metadata.get("tokenizer.ggml." + key)
    array = file.metadata.get("tokenizer.ggml.tokens")
    count = getattr(array, "count", 0)
    if found is None or found in (-1, 0xFFFFFFFF):  # some converters write "none" so
        return None
    if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found < count:
        raise CheckpointError(f"{file.path}: tokenizer.ggml.{key} is {found!r}; must be below {count}")
    return found
