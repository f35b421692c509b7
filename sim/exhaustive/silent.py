"""Choices without text: the search checks token ids only, and copies no tokenizer. Knows no order and no engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from ...core.request import SamplingParams
from ...decode_worker.choice import ChoiceText
from ...text.stream import TextPiece
from ..workers.store import EOS


class NoText:
    """Incremental text that is always empty."""

    is_stopped = False
    num_shown = 0

    def push(self, ids: Sequence[int]) -> TextPiece:
        """Return an empty piece that covers all ids."""
        return TextPiece("", len(ids), False)

    def may_stop_at(self, token_id: int) -> bool:
        """Return False: there is no stop string without text."""
        return False

    def flush(self) -> str:
        """Return the empty string."""
        return ""


class SilentChoice(ChoiceText):
    """The production rules for which tokens count, without a tokenizer."""

    def __init__(self, params: SamplingParams, emitted_ids: Sequence[int]) -> None:
        self._begin(cast(Any, NoText()), params, frozenset([EOS]), emitted_ids)
