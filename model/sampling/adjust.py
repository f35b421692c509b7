"""What requests do to logits before a token is drawn: masks, bans, biases, penalties. Knows rows and ids, no noise.

Everything is a function of the parameters, the prompt's ids and the generated ids, so a row is the same after a
preemption, on another worker, or when the request was sent again: tokens of an earlier dispatch stand in a worker's
prompt, but count as output here.

Sources: frequency and presence penalty: OpenAI's API reference (logit - count * frequency - (count > 0) * presence,
over the output). Repetition penalty: CTRL (Keskar et al. 2019), section 4.1, in the form that everybody uses: of tokens
in prompt or output, positive logits are divided by it and others multiplied.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from ...core.request import SamplingParams
from ..plan import History
from .noise import F32, I64

_REMEMBERED_PROMPTS = 256

_MINUS_INFINITY = np.float32(-np.inf)


def changes_row(params: SamplingParams, position: int, logits_mask: bytes | None) -> bool:
    """Whether `adjust` has anything to do."""
    return position < params.min_tokens or logits_mask is not None or bool(params.logit_bias) or params.needs_history


class Adjuster:
    """Changes rows of logits in place. Remembers nothing but which ids a prompt has, which it could find out again."""

    def __init__(self) -> None:
        self._ids_by_prompt: OrderedDict[int, tuple[tuple[int, ...], I64]] = OrderedDict()

    def adjust(
        self,
        row: F32,
        params: SamplingParams,
        history: History,
        ends: Sequence[int],
        logits_mask: bytes | None,
    ) -> None:
        """In this order: mask, bad words, `ends` (tokens that would end the text too early), bias, penalties."""
        if logits_mask is not None:
            packed = np.frombuffer(logits_mask, np.uint8)
            row[np.unpackbits(packed, count=len(row), bitorder="little") == 0] = _MINUS_INFINITY
        banned = [word[-1] for word in params.bad_words if _has_begun(word, history.output_ids)]
        row[[*banned, *ends]] = _MINUS_INFINITY
        if params.logit_bias:
            ids, biases = zip(*params.logit_bias, strict=True)
            row[list(ids)] += np.array(biases, np.float32)
        self._penalise(row, params, history)

    def _penalise(self, row: F32, params: SamplingParams, history: History) -> None:
        output_ids = np.fromiter(history.output_ids, np.int64, len(history.output_ids))
        if params.repetition_penalty != 1.0:
            is_seen = np.zeros(len(row), bool)
            is_seen[self._prompt_ids(history.prompt_ids)] = True
            is_seen[output_ids] = True
            seen = np.flatnonzero(is_seen)
            values, penalty = row[seen], np.float32(params.repetition_penalty)
            row[seen] = np.where(values > 0, values / penalty, values * penalty)
        if (params.frequency_penalty, params.presence_penalty) == (0.0, 0.0) or not len(output_ids):
            return
        counts = np.bincount(output_ids)
        output = np.flatnonzero(counts)
        row[output] -= np.float32(params.frequency_penalty) * counts[output].astype(np.float32)
        row[output] -= np.float32(params.presence_penalty)

    def _prompt_ids(self, prompt_ids: tuple[int, ...]) -> I64:
        """The prompt's ids, once each. A sequence's prompt is the same object in every step."""
        known = self._ids_by_prompt.get(id(prompt_ids))
        if known is None or known[0] is not prompt_ids:
            known = (prompt_ids, np.unique(np.fromiter(prompt_ids, np.int64, len(prompt_ids))))
            self._ids_by_prompt[id(prompt_ids)] = known
            while len(self._ids_by_prompt) > _REMEMBERED_PROMPTS:
                self._ids_by_prompt.popitem(last=False)
        return known[1]


def _has_begun(word: tuple[int, ...], output_ids: tuple[int, ...]) -> bool:
    """Whether all of a word but its last token was just generated."""
    beginning = word[:-1]
    return not beginning or output_ids[-len(beginning) :] == beginning
