"""Sums over the prompts that a router dispatched, from which the planner takes rates. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class PromptSums:
    """Since the router began; a request that is dispatched again counts again, because it is computed again."""

    count: int = 0
    tokens: int = 0  # to compute: without what the chosen worker's prefix cache holds
    tokens_squared: int = 0  # sum of the squares of each prompt's tokens

    def add(self, uncached_tokens: int) -> None:
        """Add one prompt."""
        self.count += 1
        self.tokens += uncached_tokens
        self.tokens_squared += uncached_tokens * uncached_tokens
