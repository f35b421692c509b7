"""Tokens that the files beside tokenizer.json name: special ones, and ones that it lacks. Knows no text.

tokenizer_config.json, special_tokens_map.json and added_tokens.json are read as transformers 5 reads them: each token
that they name is one token, and gets the next free id where tokenizer.json does not hold it. One difference: whatever
they name as special gives no text, though tokenizer.json does not flag it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken

from ..core.errors import CheckpointError
from .files import read_json

SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_LISTS = ("extra_special_tokens", "additional_special_tokens")  # the same thing, transformers 5's name and the old one
_BY_NAME = "model_specific_special_tokens"
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


class NamedTokens(NamedTuple):
    """What the files beside tokenizer.json say of tokens."""

    by_name: dict[str, AddedToken]  # "bos_token" and the like, and a model's own, e.g. "image_token"
    extra: tuple[AddedToken, ...]  # special, without a name
    added: tuple[tuple[int, AddedToken], ...]  # with the id that each must have; rising
    added_by: str  # the file that says so
    is_split: bool  # special tokens written out in a text are ordinary text


def special_tokens(directory: Path) -> dict[str, str]:
    """The special tokens by their names ("bos_token": "<s>"), as tokenizer and chat template know them.

    Raises:
        CheckpointError: see `read_named_tokens`.
    """
    return {name: token.content for name, token in read_named_tokens(directory).by_name.items()}


def read_named_tokens(directory: Path) -> NamedTokens:
    """Read the files.

    special_tokens_map.json and added_tokens.json count only where tokenizer_config.json has no `added_tokens_decoder`,
    which says the same in a newer way.

    Raises:
        CheckpointError: a file is broken, or names something that is no token; names both.
    """
    path = directory / "tokenizer_config.json"
    fields = {key: (value, path) for key, value in read_json(path, optional=True).items() if value is not None}
    decoder = fields.pop("added_tokens_decoder", None)
    is_split, _ = fields.pop("split_special_tokens", (False, path))
    if not isinstance(is_split, bool):
        raise CheckpointError(f"{path}: split_special_tokens is {is_split!r}; must be true or false")
    if decoder is None:
        _take_older(fields, directory / "special_tokens_map.json")
    by_name, extra = _by_name(fields), _without_name(fields)
    if decoder is not None:
        return NamedTokens(by_name, extra, _decoder(*decoder), path.name, is_split)
    added = directory / "added_tokens.json"
    special = {token.content for token in (*by_name.values(), *extra)}
    return NamedTokens(by_name, extra, _added(added, special), added.name, is_split)


def add_named_tokens(backend: tokenizers.Tokenizer, named: NamedTokens) -> None:
    """Make `backend` know them all, and flag the special ones.

    Raises:
        CheckpointError: a token cannot have the id that its file gives it; names token, ids and file.
    """
    special = {token.content: token for token in (*named.by_name.values(), *named.extra)}
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    added = [token for _, token in named.added]
    backend.add_tokens([token for token in added if token.content])
    known.update(token.content for token in added)
    backend.add_tokens([token for content, token in special.items() if content and content not in known])
    for id_, token in named.added:
        found = backend.token_to_id(token.content)
        if found != id_:
            raise CheckpointError(
                f"{named.added_by} gives the token {token.content!r} the id {id_}, tokenizer.json the id {found}; "
                "save the tokenizer again with the transformers that the model was trained with"
            )
    flagged = [token for token in backend.get_added_tokens_decoder().values() if token.content in special]
    backend.add_tokens([_with(token, special=True) for token in flagged if not token.special])
    backend.encode_special_tokens = named.is_split


# ---------------------------------------------------------------- reading


def _take_older(fields: dict[str, tuple[Any, Path]], path: Path) -> None:
    """Add what special_tokens_map.json says. It wins, but for the tokens without a name, which add up."""
    for key, said in read_json(path, optional=True).items():
        value = {**said, "special": True} if isinstance(said, Mapping) and _is_token(said) else said
        listed, _ = next((fields[name] for name in _LISTS if name in fields and fields[name][0]), (None, path))
        if key not in _LISTS or not listed:
            fields[key] = (value, path)
        elif key == _LISTS[0] and isinstance(value, list) and isinstance(listed, list):
            fields[key] = ([*listed, *(one for one in value if one not in listed)], path)


def _by_name(fields: Mapping[str, tuple[Any, Path]]) -> dict[str, AddedToken]:
    """Tokens that have a name: the usual ones, and whatever else is called a token."""
    found = {}
    for key, (value, path) in fields.items():
        is_own = key == _BY_NAME or (key in _LISTS and isinstance(value, Mapping))
        if is_own and not isinstance(value, Mapping):
            raise CheckpointError(f"{path}: {key} is {value!r}; must be an object with names and tokens")
        if is_own:
            found.update({name: _token(token, f"{path}: {name}") for name, token in value.items()})
        elif (key in SPECIAL_NAMES and value is not None) or (key.endswith("_token") and _is_token(value)):
            found[key] = _token(value, f"{path}: {key}")
    return found


def _without_name(fields: Mapping[str, tuple[Any, Path]]) -> tuple[AddedToken, ...]:
    """`extra_special_tokens`, or else what it was called before."""
    key = next((name for name in _LISTS if name in fields and fields[name][0]), None)
    value, path = fields[key] if key else ([], None)
    if isinstance(value, Mapping):
        return ()  # they have names
    if not isinstance(value, list):
        raise CheckpointError(f"{path}: {key} is {value!r}; must be a list of tokens, or an object with their names")
    return tuple(_token(token, f"{path}: {key}[{place}]") for place, token in enumerate(value))


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, Mapping) and isinstance(value.get("content"), str))


def _token(value: Any, where: str) -> AddedToken:
    """A token from its text, which makes it special, or from an object with its flags."""
    if not _is_token(value):
        raise CheckpointError(f"{where} is {value!r}; must be a string, or an object with content")
    if isinstance(value, str):
        return AddedToken(value, special=True)
    return AddedToken(value["content"], **{name: value[name] for name in _FLAGS if isinstance(value.get(name), bool)})


def _with(token: AddedToken, **flags: bool) -> AddedToken:
    return AddedToken(token.content, **({name: getattr(token, name) for name in _FLAGS} | flags))


def _decoder(value: Any, path: Path) -> tuple[tuple[int, AddedToken], ...]:
    if not isinstance(value, Mapping) or not all(key.isdecimal() and len(key) < 10 for key in value):
        raise CheckpointError(f"{path}: added_tokens_decoder is no object with a token id for each token")
    where = f"{path}: added_tokens_decoder"
    return tuple(sorted(((int(id_), _token(token, f"{where}[{id_}]")) for id_, token in value.items()), key=_id))


def _added(path: Path, special: set[str]) -> tuple[tuple[int, AddedToken], ...]:
    """added_tokens.json: ids by token."""
    found = read_json(path, optional=True)
    for token, id_ in found.items():
        if isinstance(id_, bool) or not isinstance(id_, int) or id_ < 0:
            raise CheckpointError(f"{path}: the id of {token!r} is {id_!r}; must be a whole number")
    flags = {token: {"special": token in special, "normalized": token not in special} for token in found}
    return tuple(sorted(((id_, AddedToken(token, **flags[token])) for token, id_ in found.items()), key=_id))


def _id(entry: tuple[int, AddedToken]) -> int:
    return entry[0]
