"""Log probabilities of tokens: log_softmax of the model's own logits. Knows rows and ids, no request.

The model's own logits are those before masks, bans, biases, penalties, temperature and filters. So logprobs describe
the model, not the request's parameters. Equal logits rank by id.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ...core.request import TokenLogprobs
from .filters import Candidates, first
from .noise import F32

_SLICE_NUMBERS = 1 << 18  # logits per pass: 1 MiB, which fits a core's L2 cache
_GROUP = 64  # size of the groups whose maxima give a lower bound of the likeliest logits


class Scorer:
    """Logprobs of one token per row. Keeps its working memory: allocating it would cost as much as the computation."""

    def __init__(self) -> None:
        self._scratch = np.empty((0, 0), np.float32)

    def score(self, rows: F32, token_ids: Sequence[int], num_top: int, best: F32 | None = None) -> list[TokenLogprobs]:
        """Logprobs of one token per row of finite logits [n, vocab], and of the `num_top` likeliest tokens.

        Sums are float64, results float32; a row's result does not depend on other rows. `best`: [n], the rows'
        largest logits, if known.
        """
        step = max(1, _SLICE_NUMBERS // rows.shape[1])
        if self._scratch.shape != (step, rows.shape[1]):
            self._scratch = np.empty((step, rows.shape[1]), np.float32)
        best = rows.max(1) if best is None else best
        scores: list[TokenLogprobs] = []
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            scores += self._slice(rows[part], best[part], token_ids[part], num_top)
        return scores

    def _slice(self, rows: F32, best: F32, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
        weights = self._scratch[: len(rows)]
        np.subtract(rows, best[:, None], out=weights)
        np.exp(weights, out=weights)
        # Sum row by row: over a matrix numpy may use another order.
        totals = [float(row.sum(dtype=np.float64)) for row in weights]
        log_totals = [top + math.log(total) for top, total in zip(best.tolist(), totals, strict=True)]
        return [_told(*told, num_top) for told in zip(rows, token_ids, log_totals, strict=True)]


def _told(row: F32, token_id: int, log_total: float, num_top: int) -> TokenLogprobs:
    own = row[token_id]
    rank = 1 + int(np.count_nonzero(row > own)) + int(np.count_nonzero(row[:token_id] == own))
    ids, values = [token_id], [own]
    if num_top > 0:
        top = likeliest(row, num_top)
        assert top.ids is not None
        ids += top.ids.tolist()
        values += list(top.values)
    logprobs = np.minimum(np.array(values, np.float64) - log_total, 0.0).astype(np.float32).tolist()
    return TokenLogprobs(token_id, logprobs[0], rank, tuple(zip(ids[1:], logprobs[1:], strict=True)))


def likeliest(row: F32, count: int) -> Candidates:
    """The `count` largest logits of a row (all, if it has fewer) with their ids: largest first, equal ones by id."""
    near = _near(row, count)
    if count < len(near.values):
        near = first(near, count)
    assert near.ids is not None
    order = np.lexsort((near.ids, -near.values))
    return Candidates(near.values[order], near.ids[order])


def _near(row: F32, count: int) -> Candidates:
    """Few candidates that include the `count` largest logits and all that equal them.

    The bound is the `count`-th largest of the groups' maxima: at least `count` logits of the row reach it.
    """
    num_groups = len(row) // _GROUP
    if num_groups < 2 * count:
        return Candidates(row, np.arange(len(row)))
    peaks = row[: num_groups * _GROUP].reshape(_GROUP, num_groups).max(0)  # this axis reads memory fastest
    peaks.partition(num_groups - count)
    places = np.flatnonzero(row >= peaks[num_groups - count])
    return Candidates(row[places], places)
