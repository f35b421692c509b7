"""Runs step plans: batch, decoder, sampling, seals. Knows no queue, no request's life, no peer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.request import SequenceKey
from ..kv.spec import HASH_BLOCK_TOKENS
from ..kv.store import HeldTokens, KvStore
from .batch import StepBatch, build_batch, warm_up_batch
from .decoder import Decoder
from .ops import Ops
from .plan import SequenceStep, StepPlan, StepResult
from .sampling.step import Spoken, StepSampler
from .spec import ModelSpec
from .weights import Weights

_REMEMBERED_STEPS = 4  # a plan may name tokens of this many steps back


class Runner:
    """One model, one store, one thread that calls `run`.

    A row's tokens depend on its own prefix alone, not on what else is in the step, how a prompt was cut into chunks,
    what was cached, or the number of threads.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        ops: Ops,
        store: KvStore,
        max_model_len: int | None = None,
    ) -> None:
        self.spec = spec
        self.weights = weights
        self.store = store
        self.ops = ops
        self.max_model_len = max_model_len or spec.max_model_len
        self._decoder: Decoder | None = None
        self._results: OrderedDict[int, StepResult] = OrderedDict()
        self._sampler: StepSampler | None = None

    def warm_up(self) -> None:
        """Let the ops choose their forms, and run a step that writes nothing. Call it in the thread of the steps."""
        self.ops.prepare()
        self._decoder = Decoder(self.spec, self.weights, self.ops, self.max_model_len)
        with torch.inference_mode():
            hidden = self._decoder.hidden(warm_up_batch(self.store.block_tokens, self.ops), self.store)
            self._decoder.logits(hidden.rows)

    def run(self, plan: StepPlan) -> StepResult:
        """Compute a plan: its keys and values are in the store, finished hash blocks sealed, tokens sampled.

        A sequence whose keys, values or logits are not finite is named in `non_finite`, gets no token, and its blocks
        no seal; the others are untouched by it.
        """
        if self._decoder is None:
            self.warm_up()
        assert self._decoder is not None
        if not plan.sequences:
            return self._remember(StepResult(plan.step, ()))
        ids = [self._resolve(step) for step in plan.sequences]
        batch = build_batch(plan, ids, self.store.block_tokens, self.ops)
        with torch.inference_mode():
            hidden = self._decoder.hidden(batch, self.store)
            bad = _bad_sequences(plan, batch, hidden.non_finite)
            spoken = self._sample(plan, batch, hidden.rows, bad, [row[-1] for row in ids])
        for step in plan.sequences:
            if step.key not in bad:
                self._seal(step)
        result = StepResult(plan.step, tuple(spoken.tokens), frozenset(bad), spoken.logprobs, spoken.prompt_logprobs)
        return self._remember(result)

    def _resolve(self, step: SequenceStep) -> tuple[int, ...]:
        """The sequence's ids, the first one looked up where an earlier step sampled it."""
        assert not step.draft_ids, "drafts are not run yet"
        assert step.adapter_slot == 0, "adapters are not run yet"
        if step.from_place is None:
            return step.token_ids
        sampled = self._results[step.from_place.step].tokens[step.from_place.row]
        # A sequence that failed in that step has no token; its rows are computed for nothing and dropped by the caller.
        return (sampled[-1] if sampled else 0, *step.token_ids[1:])

    def _sample(
        self, plan: StepPlan, batch: StepBatch, rows: Tensor, bad: set[SequenceKey], last: Sequence[int]
    ) -> Spoken:
        assert self._decoder is not None
        if self._sampler is None:
            self._sampler = StepSampler(self.spec.eos_ids, self._decoder.logits)
        return self._sampler.run(plan, batch, rows, bad, last)

    def _seal(self, step: SequenceStep) -> None:
        first = step.start - step.start % HASH_BLOCK_TOKENS
        end = step.end if step.seals_tail else step.end - step.end % HASH_BLOCK_TOKENS
        if end > first:
            self.store.seal(HeldTokens(step.block_table, step.generations, first, end - first))

    def _remember(self, result: StepResult) -> StepResult:
        self._results[result.step] = result
        while len(self._results) > _REMEMBERED_STEPS:
            self._results.popitem(last=False)
        return result


def _bad_sequences(plan: StepPlan, batch: StepBatch, non_finite: Tensor) -> set[SequenceKey]:
    if not bool(non_finite.any()):
        return set()
    return {
        step.key
        for row, step in zip(batch.first_rows, plan.sequences, strict=True)
        if bool(non_finite[row : row + step.num_tokens].any())
    }
