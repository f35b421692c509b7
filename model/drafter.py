"""The draft model: computes KV that it lacks, and guesses token by token. Knows no target model and no owner of blocks.

It draws as the target does, from the same noise: argmax(its filtered logits / T + Gumbel noise of seed, choice,
position and token). So two equal distributions give the same token, and unlike ones p, q differ with probability
1 - sum_i 1 / sum_j max(p_j / p_i, q_j / q_i), which lies between TV(p, q) and 2 TV / (1 + TV).
Source: Daliri, Musco and Suresh, Coupling without Communication and Drafter-Invariant Speculative Decoding (2024).
"""

from __future__ import annotations

from collections.abc import Sequence

from ..core.request import SequenceKey
from ..engine.plan import SequenceStep, StepPlan
from ..engine.speculation.draft_model.plan import DraftPlan, DraftResult
from .runner import Runner


class ModelDrafter:
    """A runner of the draft model, whose store has no other reader. Only one thread may use it."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._ends = frozenset(runner.spec.eos_ids)

    def warm_up(self) -> None:
        """Prepare the draft model's runner. Call it in the thread of the steps."""
        self.runner.warm_up()

    def release(self) -> None:
        """Give back the memory of everything but weights, after the last call."""
        self.runner.release()

    def catch_up(self, plan: DraftPlan) -> frozenset[SequenceKey]:
        """Compute the rows of `plan.catch_up`; returns the sequences whose keys or values are not finite."""
        return self.runner.run(plan.catch_up).non_finite

    def guess(self, plan: DraftPlan) -> DraftResult:
        """Guess for the sequences of `plan.guesses`, all together, one token per call of the model.

        A sequence's guesses end early before a token that would end its text, behind which no row is needed, and where
        none can be drawn.
        """
        step, going = plan.guesses.step, list(range(len(plan.lengths)))
        works = list(plan.guesses.sequences)
        guesses: list[tuple[int, ...]] = [()] * len(works)
        unusable: set[SequenceKey] = set()
        while going:
            result = self.runner.run(StepPlan(step, tuple([works[i] for i in going])))
            unusable |= result.non_finite
            after = []
            for i, sampled in zip(going, result.tokens, strict=True):
                if not sampled or self._ends_text(works[i], sampled[0]):
                    continue
                guesses[i] += sampled
                if len(guesses[i]) < plan.lengths[i]:
                    works[i] = _next(works[i], sampled)
                    after.append(i)
            going = after
        return DraftResult(tuple(guesses), frozenset(unusable))

    def _ends_text(self, step: SequenceStep, token_id: int) -> bool:
        params = step.params
        return token_id in params.stop_token_ids or (token_id in self._ends and not params.ignore_eos)


def _next(step: SequenceStep, sampled: Sequence[int]) -> SequenceStep:
    """The row of a guessed token, after the rows of `step`."""
    history = step.history
    if history is not None:
        history = history._replace(output_ids=(*history.output_ids, *sampled))
    ids = tuple(sampled)
    return step._replace(start=step.end, token_ids=ids, num_generated=step.num_generated + 1, history=history)
