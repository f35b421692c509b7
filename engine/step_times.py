"""Model of step times on this machine, fitted while steps run. Pure: durations are passed in, no clock.

A step of u prompt tokens after h computed ones costs  a·u + b·u·(h + u/2)  beside its decodes: a is the cost of the
linears per token, b that of attention per (query, key) pair. Both are fitted by least squares over recent steps with
fading weights. b is drawn towards zero until steps are long enough to measure it: a few milliseconds of noise over
short prompts, taken as a cost per pair, would predict an hour for a long prompt.

Recent steps are often alike (the last chunks of one long prompt), and the fit then says little about others. So the
tokens of a step beside decodes grow by a factor of two at most over the largest recent step of its kind.
"""

from __future__ import annotations

from typing import NamedTuple

from .plan import StepPlan

_GROWTH = 2.0
_FADE = 0.95  # weight of the past at each new step: a memory of about 20 steps
_TILE_TOKENS = 16  # fewer rows take the same time (model/ops/products.py)
_MIN_PAIRS = 1e4  # noise of 10 ms over a believable 1e-3 ms per pair: b counts from about so many pairs on


class StepTimes(NamedTuple):
    """Costs of steps, in milliseconds; 0.0 before the first step of their kind."""

    decode_step_ms: float = 0.0
    prefill_ms_per_token: float = 0.0
    prefill_ms_per_token_pair: float = 0.0
    scored_ms_per_token: float = 0.0  # of prompts whose logprobs are wanted
    scored_ms_per_token_pair: float = 0.0
    largest_tokens: float = float("inf")  # prompt tokens of the largest recent step of its kind
    largest_scored_tokens: float = float("inf")

    def tokens_within(self, budget_ms: float, num_computed: int, *, is_scored: bool = False) -> float:
        """Prompt tokens after `num_computed` ones that a step computes in `budget_ms`, within the growth of steps."""
        largest = self.largest_scored_tokens if is_scored else self.largest_tokens
        per_token_ms = self.prefill_ms_per_token + self.prefill_ms_per_token_pair * num_computed
        if is_scored and (self.scored_ms_per_token or self.scored_ms_per_token_pair):
            per_token_ms = self.scored_ms_per_token + self.scored_ms_per_token_pair * num_computed
        fits = budget_ms / per_token_ms if per_token_ms > 0 else float("inf")
        return min(fits, _GROWTH * largest)


class StepTimeModel:
    """Fitted coefficients; 0.0 before the first step of their kind. Steps that score prompt rows have their own."""

    def __init__(self) -> None:
        self.decode_step_ms = 0.0
        self._prefill, self._scored = _Fit(), _Fit()

    @property
    def prefill_ms_per_token(self) -> float:
        """Cost of the linears per token, for steps without scored rows."""
        return self._prefill.per_token_ms

    @property
    def prefill_ms_per_token_pair(self) -> float:
        """Cost of attention per (query, key) pair, for steps without scored rows."""
        return self._prefill.per_pair_ms

    @property
    def times(self) -> StepTimes:
        """The coefficients as one value."""
        plain, scored = self._prefill, self._scored
        return StepTimes(
            self.decode_step_ms,
            plain.per_token_ms,
            plain.per_pair_ms,
            scored.per_token_ms,
            scored.per_pair_ms,
            plain.largest_tokens,
            scored.largest_tokens,
        )

    def observe(self, plan: StepPlan, took_ms: float) -> None:
        """Add the duration of one step."""
        tokens, pairs, decodes = 0.0, 0.0, 0
        for step in plan.sequences:
            count = len(step.token_ids)
            if count == 1 and step.samples and step.num_generated:
                decodes += 1
            else:
                tokens += count
                pairs += count * (step.start + count / 2)
        if tokens == 0:
            known = self.decode_step_ms or took_ms
            self.decode_step_ms = _FADE * known + (1 - _FADE) * took_ms
            return
        fit = self._scored if any(step.targets for step in plan.sequences) else self._prefill
        rest_ms = max(took_ms - (self.decode_step_ms if decodes else 0.0), 0.0)
        fit.observe(max(tokens, _TILE_TOKENS), pairs, rest_ms)


class _Fit:
    """Least squares of milliseconds over (tokens, pairs), with fading weights."""

    def __init__(self) -> None:
        self.per_token_ms = self.per_pair_ms = 0.0
        self.largest_tokens = 0.0  # fades
        self._moments = (0.0, 0.0, 0.0, 0.0, 0.0)  # faded sums: uu, up, pp, ut, pt

    def observe(self, tokens: float, pairs: float, ms: float) -> None:
        self.largest_tokens = max(_FADE * self.largest_tokens, tokens)
        new = (tokens * tokens, tokens * pairs, pairs * pairs, tokens * ms, pairs * ms)
        self._moments = tuple(_FADE * old + fresh for old, fresh in zip(self._moments, new, strict=True))  # type: ignore[assignment]
        self._solve()

    def _solve(self) -> None:
        """Solve the normal equations of two unknowns, neither below zero."""
        uu, up, pp, ut, pt = self._moments
        pp += _MIN_PAIRS**2
        determinant = uu * pp - up * up
        if determinant > 1e-6 * uu * pp:
            a, b = (ut * pp - pt * up) / determinant, (pt * uu - ut * up) / determinant
            if a >= 0 and b >= 0:
                self.per_token_ms, self.per_pair_ms = a, b
                return
            if a < 0:
                self.per_token_ms, self.per_pair_ms = 0.0, pt / pp
                return
        self.per_token_ms, self.per_pair_ms = ut / uu, 0.0
