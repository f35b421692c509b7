"""Whether two tokenizers have the same tokens, so that the ids of one model mean the same to another."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..core.errors import ConfigError
from .tokenizer import Tokenizer

_SHOWN = 3  # differences that an error names


def check_draft(directory: Path, tokenizer: Tokenizer) -> None:
    """Check that the draft model in `directory` has the tokens of the served model, whose `tokenizer` this is.

    Raises:
        CheckpointError: the draft model has no tokenizer.
        ConfigError: their tokenizers differ; says in what.
    """
    check_same_tokens(tokenizer, Tokenizer.load(directory), f"speculation.model is {directory}")


def check_same_tokens(target: Tokenizer, draft: Tokenizer, setting: str) -> None:
    """Check a draft model's tokenizer: its vocabulary, its special ids, and the tokens that begin and end a text.

    The ends may be more or fewer (a chat model's and its base model's), but not all different.

    Raises:
        ConfigError: names `setting` and what differs.
    """
    differences = [
        *_of_vocabularies(target, draft),
        *_of_ids("special ids", target, target.special_ids, draft, draft.special_ids),
    ]
    if target.bos_id != draft.bos_id:
        differences.append(f"texts begin with id {target.bos_id}, the draft model's with {draft.bos_id}")
    if target.eos_ids and draft.eos_ids and not set(target.eos_ids) & set(draft.eos_ids):
        differences.append(
            f"texts end with ids {_listed(target.eos_ids)}, the draft model's with {_listed(draft.eos_ids)}"
        )
    if differences:
        raise ConfigError(
            f"{setting}: the draft model's tokenizer differs from the model's: {'; '.join(differences)}. Name a draft "
            "model that was trained with the same tokenizer"
        )


def _of_vocabularies(target: Tokenizer, draft: Tokenizer) -> Iterable[str]:
    ours, theirs = (one.backend.get_vocab(with_added_tokens=True) for one in (target, draft))
    if ours == theirs:
        return
    if len(ours) != len(theirs):
        yield f"it has {len(theirs):,} tokens, the model's {len(ours):,}"
    token_by_id, draft_by_id = ({id_: token for token, id_ in one.items()} for one in (ours, theirs))
    unlike = sorted(
        id_ for id_ in token_by_id.keys() | draft_by_id.keys() if token_by_id.get(id_) != draft_by_id.get(id_)
    )
    for id_ in unlike[:_SHOWN]:
        yield f"id {id_} is {_named(draft_by_id.get(id_))}, the model's {_named(token_by_id.get(id_))}"
    if len(unlike) > _SHOWN:
        yield f"and {len(unlike) - _SHOWN:,} other ids"


def _of_ids(
    what: str, target: Tokenizer, ours: Iterable[int], draft: Tokenizer, theirs: Iterable[int]
) -> Iterable[str]:
    only_ours, only_theirs = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
    if only_ours:
        yield f"{what} of the model alone: {_shown(target, only_ours)}"
    if only_theirs:
        yield f"{what} of the draft model alone: {_shown(draft, only_theirs)}"


def _shown(tokenizer: Tokenizer, ids: list[int]) -> str:
    shown = ", ".join(f"{id_} ({tokenizer.token(id_)!r})" for id_ in ids[:_SHOWN])
    return shown if len(ids) <= _SHOWN else f"{shown} and {len(ids) - _SHOWN:,} others"


def _named(token: str | None) -> str:
    return "missing" if token is None else repr(token[:40])


def _listed(ids: Iterable[int]) -> str:
    return ", ".join(map(str, ids))
