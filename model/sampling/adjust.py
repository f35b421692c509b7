"""Changes of logits by request parameters before sampling: masks, bans, biases, penalties. Knows no noise.

Everything is a function of the parameters, the prompt's ids and the generated ids. So a row is the same after a
preemption, on another worker, or after the request was sent again: tokens of an earlier dispatch are in the worker's
prompt, but count as output here.

Sources: frequency and presence penalty: OpenAI's API reference (logit - count * frequency - (count > 0) * presence,
over the output). Repetition penalty: CTRL (Keskar et al. 2019), section 4.1, in the usual form: for tokens in prompt or
output, positive logits are divided by it and other logits are multiplied by it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

from ...core.request import SamplingParams
from ...engine.plan import History
from .memo import Memo
from .noise import F32, I64
from .words import WordIndex

_MINUS_INFINITY = np.float32(-np.inf)


def changes_row(params: SamplingParams, position: int, logits_mask: bytes | None) -> bool:
    """Return whether `adjust` would change a row."""
    return position < params.min_tokens or logits_mask is not None or bool(params.logit_bias) or params.needs_history


class Adjuster:
    """Changes rows of logits in place. Its caches of prompts and parameters only save time."""

    def __init__(self) -> None:
        self._prompt_ids = Memo(_unique)
        self._words = Memo(WordIndex)
        self._biases = Memo(_biases)

    def adjust(
        self,
        row: F32,
        params: SamplingParams,
        history: History,
        ends: Sequence[int],
        logits_mask: bytes | None,
    ) -> None:
        """Apply, in this order: mask, bad words, `ends` (tokens that would end the text too early), bias, penalties."""
        banned = self._words.of(params.bad_words).forbidden(history.output_ids) if params.bad_words else []
        forbidden = [*banned, *ends]
        if logits_mask is not None:
            packed = np.frombuffer(logits_mask, np.uint8)
            allowed = np.unpackbits(packed, count=len(row), bitorder="little")
            np.copyto(row, _MINUS_INFINITY, where=allowed == 0)  # several times as fast as by indices
            if forbidden:
                allowed[forbidden] = 0
                forbidden = forbidden if allowed.any() else []  # the grammar goes first
        if forbidden:
            row[forbidden] = _MINUS_INFINITY
        if params.logit_bias:
            ids, biases = self._biases.of(params.logit_bias)
            row[ids] += biases
        if params.repetition_penalty != 1.0:
            self._penalise_repetition(row, params.repetition_penalty, history)
        if (params.frequency_penalty, params.presence_penalty) != (0.0, 0.0) and history.output_ids:
            output, counts = np.unique(_ids(history.output_ids), return_counts=True)
            row[output] -= np.float32(params.frequency_penalty) * counts.astype(np.float32)
            row[output] -= np.float32(params.presence_penalty)

    def _penalise_repetition(self, row: F32, repetition_penalty: float, history: History) -> None:
        is_seen = np.zeros(len(row), bool)
        is_seen[self._prompt_ids.of(history.prompt_ids)] = True
        is_seen[_ids(history.output_ids)] = True
        seen = np.flatnonzero(is_seen)
        values, penalty = row[seen], np.float32(repetition_penalty)
        row[seen] = np.where(values > 0, values / penalty, values * penalty)


def _ids(token_ids: Sequence[int]) -> I64:
    return np.frombuffer(array("q", token_ids), np.int64)  # `np.fromiter` takes twice as long


def _unique(token_ids: tuple[int, ...]) -> I64:
    """Distinct ids, ascending."""
    return np.unique(_ids(token_ids))


def _biases(pairs: tuple[tuple[int, float], ...]) -> tuple[I64, F32]:
    ids, biases = zip(*pairs, strict=True)
    return _ids(ids), np.array(biases, np.float32)
