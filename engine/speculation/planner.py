"""The seam of guesses that a model or heads compute for all sequences together, before a step. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

from ...core.request import SamplingParams, SequenceKey
from ..plan import SequenceStep
from ..sequence import Sequence
from .draft_model.holdings import DraftHoldings
from .draft_model.plan import DraftPlan, DraftResult
from .proposer import Proposer


@runtime_checkable
class GuessPlanner(Protocol):
    """Plans what is computed before each step, and takes its result: of a draft model, or of heads."""

    @property
    def holdings(self) -> DraftHoldings | None:
        """Blocks of its keys and values; None: it has none."""
        ...

    def start(self, params: SamplingParams) -> Proposer:
        """The state of a new sequence."""
        ...

    def settle(self, sequence: Sequence) -> None:
        """Take note of the tokens that came since the last guess."""
        ...

    def computed(self, sequence: Sequence, step: SequenceStep) -> None:
        """Take note that a step computed rows of a sequence, whose `num_computed` and tokens are those after it."""
        ...

    def plan(self, wishes: Iterable[tuple[Sequence, int]]) -> DraftPlan | None:
        """Plan for sequences and the most tokens to guess for each. None: there is nothing to compute."""
        ...

    def take(self, sequences: Mapping[SequenceKey, Sequence], plan: DraftPlan, result: DraftResult) -> None:
        """Take the result of a plan. `sequences`: all live ones, by key."""
        ...

    def caught_up(self, num_tokens: int, took_ms: float) -> None:
        """Take note of how long the rows of `DraftPlan.catch_up` took."""
        ...
