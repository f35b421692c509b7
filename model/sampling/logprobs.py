"""How likely tokens were: log_softmax of the logits as the model gave them. Knows rows and ids, no request.

"As the model gave them": before masks, bans, biases, penalties, temperature and filters, so that a logprob says what
the model thinks and not what the request made of it. Equal logits rank by id.
"""

from __future__ import annotations

import math

import numpy as np

from ...core.request import TokenLogprobs
from .filters import Candidates, first
from .noise import F32


def token_logprobs(row: F32, token_id: int, num_top: int) -> TokenLogprobs:
    """Of one token under a row of finite logits, with the `num_top` likeliest. Summed in float64, given in float32."""
    best = row.max()
    log_total = float(best) + math.log(float(np.exp(row - best).sum(dtype=np.float64)))
    own = row[token_id]
    rank = 1 + int(np.count_nonzero(row > own)) + int(np.count_nonzero(row[:token_id] == own))
    top: list[tuple[int, float]] = []
    if num_top > 0:
        likely = first(Candidates(row, None), num_top) if num_top < len(row) else Candidates(row, np.arange(len(row)))
        assert likely.ids is not None
        order = np.lexsort((likely.ids, -likely.values))
        top = [(int(likely.ids[i]), _logprob(likely.values[i], log_total)) for i in order]
    return TokenLogprobs(token_id, _logprob(own, log_total), rank, tuple(top))


def _logprob(value: np.float32, log_total: float) -> float:
    return float(np.float32(min(float(value) - log_total, 0.0)))
