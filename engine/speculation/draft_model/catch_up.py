"""How many tokens a draft model computes per step of what it has not seen, beside streams. Pure.

A sequence whose prompt was computed elsewhere, or which comes back, is new to the draft model. It gets no guess until
the draft model has caught up, in chunks of about `share` milliseconds by the measured times of earlier chunks.
"""

from __future__ import annotations

LEAST_TOKENS, MOST_TOKENS, FIRST_TOKENS = 16, 1024, 64
_FADE = 0.8  # weight of the past at each new chunk
_GROWTH = 2.0  # per chunk, because the time of a small one says little about a large one


class CatchUp:
    """Bound of one step's chunk."""

    def __init__(self, share_ms: float, most: int = MOST_TOKENS) -> None:
        """`most`: tokens of the largest chunk, e.g. of the largest step."""
        self.tokens = min(FIRST_TOKENS, most)  # most of the next step, of all sequences
        self._share_ms, self._most = share_ms, min(most, MOST_TOKENS)
        self._ms_per_token: float | None = None

    def observe(self, num_tokens: int, took_ms: float) -> None:
        """Add the duration of a chunk."""
        new = took_ms / num_tokens
        known = self._ms_per_token
        self._ms_per_token = new if known is None else _FADE * known + (1 - _FADE) * new
        fits = self._share_ms / self._ms_per_token if self._ms_per_token > 0 else float(self._most)
        self.tokens = int(max(LEAST_TOKENS, min(fits, _GROWTH * self.tokens, self._most)))
