"""Sampling of the next token: argmax of filtered logits / temperature + Gumbel noise. Numpy, row by row.

Order in which a request's parameters apply (the same as vLLM's; each step works on the result of the one before):

    1. logprobs are computed from the model's own logits (sampling/logprobs.py)
    2. the logits mask: tokens that structured output allows. If 3 and 4 would leave none of them, they do not apply
    3. bad_words: the last token of a word is forbidden when its beginning was just generated
    4. min_tokens: end-of-sequence tokens and stop_token_ids are forbidden until min_tokens are generated
    5. logit_bias is added
    6. repetition_penalty (prompt and output), then frequency_penalty and presence_penalty (output)
    7. temperature; below 1e-5 sampling is greedy: the largest logit wins, of equal ones the lowest id
    8. min_p, then top_k, then top_p of the remaining tokens (sampling/filters.py). transformers applies min_p last: the
       threshold is the same, but top_p then also counts the probability of tokens that min_p drops
    9. noise (sampling/noise.py): the largest total wins

The noise is keyed by (seed, choice, position, token id); everything else is a function of the request, its ids and the
row. So a token does not depend on worker, batch, attempt or order of sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ...core.request import SamplingParams, TokenLogprobs
from ...engine.plan import History
from ..ops.extremes import Extremes, extremes
from .adjust import Adjuster, changes_row
from .filters import RoughTopP, before_top_p, exact_top_p
from .logprobs import Scorer
from .noise import F32, winner

GREEDY_BELOW = 1e-5
_INFINITY = float("inf")
_NO_HISTORY = History((), ())


class Draw(NamedTuple):
    """Sampling parameters and position of one row of logits."""

    params: SamplingParams
    choice: int
    position: int  # tokens generated before this one
    logits_mask: bytes | None = None  # packed bits, least significant first; a set bit allows a token
    history: History | None = None  # needed if `params.needs_history`


def is_plain(params: SamplingParams, position: int, logits_mask: bytes | None) -> bool:
    """Return whether only the likeliest token is needed, without logprobs or changed logits."""
    return (
        params.temperature < GREEDY_BELOW and params.logprobs is None and not changes_row(params, position, logits_mask)
    )


class Sampled(NamedTuple):
    """Sampled token of one row."""

    token_id: int
    logprobs: TokenLogprobs | None  # if they were requested


class Failed(NamedTuple):
    """Error of one row that could not be sampled; other rows are not affected."""

    error: Exception


Outcome = Sampled | Failed | None
"""None: the row is not a distribution, because it has a number that is not finite, or because no token is allowed."""

SampleRow = Callable[[int, Draw | None], Outcome]
"""Samples one row of logits by its number."""


class Sampler:
    """Sampler of one model. Its caches only save time."""

    def __init__(self, eos_ids: Sequence[int], extremes: Callable[[F32], Extremes] = extremes) -> None:
        """`extremes`: the device's fastest version of `extremes`."""
        self._extremes = extremes
        self._eos_ids = tuple(eos_ids)
        self._adjuster = Adjuster()
        self._scorer = Scorer()

    def sample(self, logits: F32, draws: Sequence[Draw | None], known: Extremes | None = None) -> list[Outcome]:
        """Sample one token per row of logits [len(draws), vocab]; logits stay the same. `known`: the rows' extremes.

        A row without a draw gets an outcome that means nothing, unless it is None: the row is not a distribution.
        """
        assert len(logits) == len(draws), (logits.shape, len(draws))
        if not draws:
            return []
        sample = self.by_row(logits, known)
        return [sample(row, draw) for row, draw in enumerate(draws)]

    def by_row(self, logits: F32, known: Extremes | None = None) -> SampleRow:
        """The same for one row at a time: the draw of a draft's row depends on what the row before it gave."""
        found = self._extremes(logits) if known is None else known
        least, greatest, best = (part.tolist() for part in found)

        def sample(row: int, draw: Draw | None) -> Outcome:
            # A row with a NaN has NaN as its least number; minus infinity fails this test too.
            if not (-least[row] < _INFINITY and greatest[row] < _INFINITY):
                return None
            if draw is None or is_plain(draw.params, draw.position, draw.logits_mask):
                return Sampled(best[row], None)
            return self._outcome(logits[row], draw, best[row])

        return sample

    def _outcome(self, raw: F32, draw: Draw, best: int) -> Outcome:
        try:
            return self._sample_row(raw, draw, best)
        except Exception as error:
            return Failed(error)

    def _sample_row(self, raw: F32, draw: Draw, best: int) -> Sampled | None:
        params = draw.params
        row = raw
        if changes_row(params, draw.position, draw.logits_mask):
            row = raw.copy()
            is_early = draw.position < params.min_tokens
            ends = (*self._eos_ids, *params.stop_token_ids) if is_early else ()
            assert draw.history is not None or not params.needs_history, "penalties need the ids before"
            self._adjuster.adjust(row, params, draw.history or _NO_HISTORY, ends, draw.logits_mask)
            best = int(row.argmax())
            if not abs(row[best]) < _INFINITY:
                return None
        token_id = best
        if params.temperature >= GREEDY_BELOW:
            token_id = _drawn(row, params, (params.seed, draw.choice, draw.position))
        if params.logprobs is None:
            return Sampled(token_id, None)
        (logprobs,) = self._scorer.score(raw[None], (token_id,), params.logprobs)
        return Sampled(token_id, logprobs)


def _drawn(row: F32, params: SamplingParams, key: tuple[int, int, int]) -> int:
    """Sample from the tokens that the filters keep.

    The winner of a superset of the kept tokens is the winner of the kept tokens, if it is one of them. For most winners
    this is known before the exact end of top_p is computed.
    """
    kept = before_top_p(row, params)
    if params.top_p < 1.0:
        rough = RoughTopP(kept, params)
        likely = winner(*rough.near, params.temperature, key)
        if rough.keeps(likely):
            return likely
        kept = exact_top_p(kept, params)
    return winner(*kept, params.temperature, key)
