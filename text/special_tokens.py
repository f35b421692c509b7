"""Tokens named by the files beside tokenizer.json: special tokens, and tokens that it lacks. Knows no text.

tokenizer_config.json, special_tokens_map.json and added_tokens.json are read as in transformers 5: each token that they
name is one token, and gets the next free id if tokenizer.json lacks it. One difference: a token that they name as
special is special even if tokenizer.json does not flag it: it gives no text, and `split_special_tokens` splits it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken

from ..core.errors import CheckpointError
from .files import read_json

# In the order in which they get ids if they have none.
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA, _EXTRA_BEFORE = "extra_special_tokens", "additional_special_tokens"  # the latter before transformers 5
_OWN = "model_specific_special_tokens"
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


class NamedTokens(NamedTuple):
    """Tokens named by the files beside tokenizer.json."""

    by_name: dict[str, AddedToken]  # names like "bos_token", and a model's own, e.g. "image_token"
    extra: tuple[AddedToken, ...]  # special tokens without a name
    added: tuple[tuple[int, AddedToken], ...]  # tokens with required ids, ascending
    added_by: str  # name of the file with these ids
    is_split: bool  # special tokens in a text are treated as ordinary text


def special_tokens(directory: Path) -> dict[str, str]:
    """Read the special tokens, by the names that tokenizer and chat template use ("bos_token": "<s>").

    Raises:
        CheckpointError: as for `read_named_tokens`.
    """
    return {name: token.content for name, token in read_named_tokens(directory).by_name.items()}


def read_named_tokens(directory: Path) -> NamedTokens:
    """Read the tokens that a checkpoint's files name.

    special_tokens_map.json and added_tokens.json are read only if tokenizer_config.json has no `added_tokens_decoder`,
    the newer form of the same data.

    Raises:
        CheckpointError: a file is broken, or has a value that is no token; names file and value.
    """
    path = directory / "tokenizer_config.json"
    fields = {key: _Field(value, path, key) for key, value in read_json(path, optional=True).items()}
    decoder = fields.pop("added_tokens_decoder", None)
    is_split = fields.pop("split_special_tokens", _Field(False, path, "")).value
    if not isinstance(is_split, bool):
        raise CheckpointError(f"{path}: split_special_tokens is {is_split!r}; must be true or false")
    own = {key: fields.pop(key) for key in list(fields) if _is_own(key) and isinstance(fields[key].value, str)}
    if _EXTRA_BEFORE in fields and not (_EXTRA in fields and fields[_EXTRA].value):
        fields[_EXTRA] = fields.pop(_EXTRA_BEFORE)
    own |= _pop_names(fields, _EXTRA)
    own = own or _pop_names(fields, _OWN)
    if decoder is None:
        _take_older(fields, directory / "special_tokens_map.json")
        own |= _pop_names(fields, _EXTRA)
    usual = {name: fields[name] for name in SPECIAL_NAMES if name in fields and fields[name].value is not None}
    typed = {key: field for key, field in fields.items() if _is_own(key) and _is_token(field.value)}
    by_name = {name: _token(field) for name, field in (usual | typed | own).items()}
    extra = _listed(fields.get(_EXTRA) or fields.get(_EXTRA_BEFORE))
    if decoder is not None:
        return NamedTokens(by_name, extra, _decoder(decoder), path.name, is_split)
    added = directory / "added_tokens.json"
    special = {token.content for token in (*by_name.values(), *extra)}
    return NamedTokens(by_name, extra, _added(added, special), added.name, is_split)


def add_named_tokens(backend: tokenizers.Tokenizer, named: NamedTokens) -> None:
    """Add all named tokens to `backend`, and flag the special ones.

    Raises:
        CheckpointError: a token cannot have the id that its file requires; names token, ids and file.
    """
    special = [*named.by_name.values(), *named.extra]
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    added = [token for _, token in named.added]
    backend.add_tokens([token for token in added if token.content])
    known.update(token.content for token in added)
    fresh: list[AddedToken] = []  # if a token is named twice with different flags, the later flags count
    for token in special:
        if token.content and token.content not in known and token not in fresh:
            fresh.append(token)
    backend.add_tokens(fresh)
    for id_, token in named.added:
        found = backend.token_to_id(token.content)
        if found != id_:
            raise CheckpointError(
                f"{named.added_by} gives the token {token.content!r} the id {id_}, tokenizer.json the id {found}; "
                "save the tokenizer again with the transformers that the model was trained with"
            )
    contents = {token.content for token in special}
    now = [token for token in backend.get_added_tokens_decoder().values() if token.content in contents]
    backend.add_tokens([_special(token) for token in now if not token.special])
    backend.encode_special_tokens = named.is_split


# ---------------------------------------------------------------- reading


class _Field(NamedTuple):
    """Value of a field, with its file and key."""

    value: Any
    path: Path
    key: str

    def refused(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {self.key} is {self.value!r}; must be {what}")


def _take_older(fields: dict[str, _Field], path: Path) -> None:
    """Add the fields of special_tokens_map.json. They replace existing ones, but tokens without a name add up."""
    for key, said in read_json(path, optional=True).items():
        value = {**said, "special": True} if _is_token(said) and isinstance(said, Mapping) else said
        listed = (fields[key].value if key in fields else None) or []
        if key == _EXTRA and isinstance(value, list) and isinstance(listed, list):
            value = [*listed, *(one for one in value if one not in listed)]
        fields[key] = _Field(value, path, key)


def _pop_names(fields: dict[str, _Field], key: str) -> dict[str, _Field]:
    """Remove and return the tokens of a field that is an object; `extra_special_tokens` may also be a list."""
    field = fields.get(key)
    if field is None or (key == _EXTRA and not isinstance(field.value, Mapping)):
        return {}
    del fields[key]
    if not isinstance(field.value, Mapping):
        raise field.refused("an object with names and tokens")
    return {name: _Field(token, field.path, name) for name, token in field.value.items()}


def _listed(field: _Field | None) -> tuple[AddedToken, ...]:
    if field is None or not field.value:
        return ()
    if not isinstance(field.value, list):
        raise field.refused("a list of tokens, or an object with their names")
    places = enumerate(field.value)
    return tuple(_token(_Field(token, field.path, f"{field.key}[{place}]")) for place, token in places)


def _is_own(key: str) -> bool:
    """Return whether a key can be a model's own name for a special token."""
    return key.endswith("_token") and key not in SPECIAL_NAMES


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, Mapping) and isinstance(value.get("content"), str))


def _token(field: _Field) -> AddedToken:
    """Make a token from a string, which makes it special, or from an object with its flags."""
    value = field.value
    if not _is_token(value):
        raise field.refused("a string, or an object with content")
    if isinstance(value, str):
        return AddedToken(value, special=True)
    return AddedToken(value["content"], **{name: value[name] for name in _FLAGS if isinstance(value.get(name), bool)})


def _special(token: AddedToken) -> AddedToken:
    return AddedToken(token.content, **({name: getattr(token, name) for name in _FLAGS} | {"special": True}))


def _decoder(field: _Field) -> tuple[tuple[int, AddedToken], ...]:
    value, path, key = field
    if not isinstance(value, Mapping) or not all(id_.isdecimal() and len(id_) < 10 for id_ in value):
        raise CheckpointError(f"{path}: {key} is no object with a token for each token id")
    found = ((int(id_), _token(_Field(token, path, f"{key}[{id_}]"))) for id_, token in value.items())
    return tuple(sorted(found, key=_id))


def _added(path: Path, special: set[str]) -> tuple[tuple[int, AddedToken], ...]:
    """Read added_tokens.json, which maps tokens to ids."""
    found = read_json(path, optional=True)
    for token, id_ in found.items():
        if isinstance(id_, bool) or not isinstance(id_, int) or id_ < 0:
            raise CheckpointError(f"{path}: the id of {token!r} is {id_!r}; must be a whole number")
    flags = {token: {"special": token in special, "normalized": token not in special} for token in found}
    return tuple(sorted(((id_, AddedToken(token, **flags[token])) for token, id_ in found.items()), key=_id))


def _id(entry: tuple[int, AddedToken]) -> int:
    return entry[0]
