"""Work of a draft model before one step, and its result. Plain values, no tensor.

tokens      | … computed … | not seen by the draft model | last |  guess 0 | guess 1 | guess 2
catch_up    |              |<------- some rows -------->|
guesses     |                                           |<-1-->|<- one row each ->|
                                               gives:  guess 0    guess 1   guess 2
"""

from __future__ import annotations

from typing import NamedTuple

from ....core.request import SequenceKey
from ...plan import StepPlan


class DraftPlan(NamedTuple):
    """Rows that a draft model or heads compute, in blocks of their own. At least one of both parts has sequences."""

    catch_up: StepPlan  # rows whose KV is missing; nothing is sampled
    guesses: StepPlan  # last rows of the sequences that get guesses
    lengths: tuple[int, ...]  # tokens to guess for each of these, at least 1; block tables cover their rows
    ahead: tuple[int, ...] = ()  # of heads with keys and values, per sequence of both parts: see `layer_planner.py`


class DraftResult(NamedTuple):
    """Guessed tokens, and the sequences whose draft KV is not to be used any more."""

    guesses: tuple[tuple[int, ...], ...]  # per `DraftPlan.guesses.sequences`, up to `lengths`
    unusable: frozenset[SequenceKey] = frozenset()


def all_failed(plan: DraftPlan) -> DraftResult:
    """Result of a plan that failed as a whole."""
    steps = (*plan.catch_up.sequences, *plan.guesses.sequences)
    return DraftResult(((),) * len(plan.guesses.sequences), frozenset(step.key for step in steps))
