"""Runs step plans: batch, decoder, sampling, seals. Knows no queue, no request, no peer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checkpoint.spec import ModelSpec
from ..core.request import SequenceKey
from ..engine.plan import SequenceStep, StepPlan, StepResult
from ..kv.section import HeldTokens
from ..kv.spec import HASH_BLOCK_TOKENS
from ..kv.store.store import KvStore
from .adapters.loaded import LoadedAdapter
from .batch import StepBatch, build_batch, on_device, read_whole, warm_up_batch, with_adapters
from .decoder.decoder import Decoder, Hidden
from .heads.features import HiddenKeeper
from .ops.seam import Logits, Ops
from .parallel.collectives import ONE_RANK, Collectives
from .sampling.greedy import all_greedy, speak_greedily
from .sampling.masks import GrammarMasks, StartMatcher
from .sampling.step import StepOutputs, StepSampler
from .weights.weights import Weights

if TYPE_CHECKING:  # needs triton
    from .graphs import DecodeGraphs

_NO_MODE = nullcontext()
_REMEMBERED_STEPS = 4  # a plan may use tokens sampled up to this many steps ago


class Runner:
    """One model with its store. Only one thread may call `run`.

    A row's tokens depend on its own prefix only: not on other rows of the step, the chunks of a prompt, cached blocks,
    or the number of threads. (On a GPU, products are an exception: ops/triton_ops.py.)
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        ops: Ops,
        store: KvStore,
        max_model_len: int | None = None,
        *,
        graph_seqs: int = 0,
        collectives: Collectives = ONE_RANK,
        samples: bool = True,
        seals: bool = True,
    ) -> None:
        """`graph_seqs`: decode steps of up to this many sequences run as graphs (on a GPU only; 0: none).

        `collectives`: of a tensor-parallel group, whose ranks warm up together and run the same plans in the same
        order. `spec`, `weights` and `store` are then the rank's. Several ranks run without graphs.
        `samples` False: another rank samples, and results have no tokens. `seals` False: nobody verifies the store's
        bytes, because they never leave it (a draft model's).
        """
        self.spec = spec
        self.weights = weights
        self.store = store
        self.ops = ops
        self.max_model_len = max_model_len or spec.max_model_len
        self.features: HiddenKeeper | None = None  # keeps hidden rows for heads that guess
        self._collectives = collectives
        self._samples = samples
        self._seals = seals
        self._graph_seqs = graph_seqs if collectives.size == 1 else 0
        self._is_cpu = ops.device.type == "cpu"
        self._decoder: Decoder | None = None
        self._has_many_ops = True  # many torch ops run faster in inference mode; for a few, entering it costs more
        self._graphs: DecodeGraphs | None = None
        self._results: OrderedDict[int, StepResult] = OrderedDict()
        self._sampler: StepSampler | None = None
        self._masks: GrammarMasks | None = None
        self._adapters: dict[int, LoadedAdapter] = {}

    @property
    def decoder(self) -> Decoder:
        """The model, after `warm_up`."""
        assert self._decoder is not None, "warm_up comes first"
        return self._decoder

    def serve_grammars(self, start: StartMatcher) -> None:
        """Sample sequences that have a grammar by the matchers that `start` makes. Call it before the first step."""
        self._masks = GrammarMasks(start)

    def hold_adapter(self, slot: int, adapter: LoadedAdapter) -> None:
        """Serve the sequences of a slot (above 0) with this adapter, from the next step on. Any thread may call it."""
        assert slot > 0
        assert self._collectives.size == 1, "adapters are not served by several ranks"
        self._adapters[slot] = adapter

    def drop_adapter(self, slot: int) -> None:
        """Forget the adapter of a slot, if there is one. Any thread may call it."""
        self._adapters.pop(slot, None)

    def release(self) -> None:
        """Give back the memory of everything but weights and adapters: for `over`, after the last step."""
        self._decoder = self._graphs = self._sampler = self._masks = self.features = None
        self._results.clear()
        self.store.release()

    def over(self, store: KvStore) -> Runner:
        """A runner of these weights and adapters over another store, without heads. This one must not run any more."""
        runner = Runner(
            self.spec,
            self.weights,
            self.ops,
            store,
            self.max_model_len,
            graph_seqs=self._graph_seqs,
            collectives=self._collectives,
            samples=self._samples,
            seals=self._seals,
        )
        runner._adapters = self._adapters  # the same: adapters may be loaded and dropped by either
        return runner

    def warm_up(self) -> None:
        """Prepare the ops, run steps that write nothing, capture graphs. Call it in the thread of the steps."""
        self.ops.prepare()
        self._decoder = Decoder(self.spec, self.weights, self.ops, self.max_model_len, self._collectives)
        self._has_many_ops = not self._decoder.is_fused
        device = self.ops.device
        with torch.inference_mode():
            for num_tokens in (1,) if device.type == "cpu" else (1, 2):  # a GPU has separate kernels for chunks
                batch = on_device(warm_up_batch(self.store.block_tokens, self.ops, num_tokens), device)
                hidden = self._decoder.hidden(batch, self.store)
                self._decoder.logits(batch.spoken(hidden.rows))
            if self._graph_seqs and not (self.features and self.features.layers):
                self._graphs = self._captured(self._decoder)

    def run(self, plan: StepPlan) -> StepResult:
        """Compute a plan: store its keys and values, seal finished hash blocks, sample tokens.

        A sequence whose keys, values or logits are not finite is listed in `non_finite`; it gets no token, and its
        blocks get no seal. A sequence whose token could not be sampled is listed in `failed`, one whose grammar cannot
        go on in `refused`. The others are not affected. A draft with such a row counts as rejected: if it was right,
        the next step computes its token and reports it.
        """
        if self._decoder is None:
            self.warm_up()
        assert self._decoder is not None
        if not plan.sequences:
            return self._remember(StepResult(plan.step, ()))
        self._check_states(plan)
        ids = [self._resolve(step) for step in plan.sequences]
        if self._masks is not None and self._samples:
            self._masks.begin(plan)
        with torch.inference_mode() if self._has_many_ops else _NO_MODE:
            batch, hidden = self._compute(self._decoder, plan, ids)
            if self.features is not None:
                self.features.keep(plan, batch, hidden)
            bad = _bad_sequences(plan, batch, hidden)
            last = [row[len(step.token_ids) - 1] for row, step in zip(ids, plan.sequences, strict=True)]
            spoken = self._sample(plan, batch, hidden.rows, bad, last)
        _drop_non_finite_drafts(plan, batch, hidden, spoken)
        if self._seals:
            self._seal(plan, spoken.tokens, bad)
        self._note_states(plan)
        result = StepResult(
            plan.step,
            tuple(spoken.tokens),
            frozenset(bad),
            spoken.logprobs,
            spoken.prompt_logprobs,
            spoken.failed,
            spoken.refused,
            spoken.deferred,
        )
        return self._remember(result)

    def _captured(self, decoder: Decoder) -> DecodeGraphs | None:
        from .graphs import DecodeGraphs, can_capture

        if not can_capture(self.spec):
            return None
        graphs = DecodeGraphs(decoder, self.store, self._graph_seqs)
        graphs.capture()
        return graphs

    def _compute(self, decoder: Decoder, plan: StepPlan, ids: Sequence[tuple[int, ...]]) -> tuple[StepBatch, Hidden]:
        taps = () if self.features is None else self.features.layers
        if self._graphs is not None and not taps and self._graphs.serves(plan):
            return self._graphs.run(plan, ids)
        batch = build_batch(plan, ids, self.store.block_tokens, self.ops)
        if not self._is_cpu:
            batch = on_device(batch, self.ops.device)
        if any(step.adapter_slot for step in plan.sequences):
            batch = with_adapters(batch, plan, self._adapters, self.ops.device)
        if self.spec.num_layers in taps:
            batch = read_whole(batch)
        return batch, decoder.hidden(batch, self.store, taps)

    def _resolve(self, step: SequenceStep) -> tuple[int, ...]:
        """Token ids of a sequence's rows. The first one may be the result of an earlier step."""
        assert not step.draft_ids or (self._samples and step.samples), "only a rank that samples can judge drafts"
        if step.from_place is None:
            return step.token_ids + step.draft_ids if step.draft_ids else step.token_ids
        sampled = self._results[step.from_place.step].tokens[step.from_place.row]
        # A sequence that failed in that step has no token; its rows are computed anyway, and the caller drops them.
        return (sampled[-1] if sampled else 0, *step.token_ids[1:], *step.draft_ids)

    def _sample(
        self, plan: StepPlan, batch: StepBatch, rows: Tensor, bad: set[SequenceKey], last: Sequence[int]
    ) -> StepOutputs:
        decoder = self._decoder
        assert decoder is not None
        if batch.sampled and all_greedy(plan):
            logits = decoder.logits(batch.spoken(rows))
            if not self._samples:
                return StepOutputs([()] * len(plan.sequences), {}, {}, {}, {})
            if self._is_cpu and logits.extremes is None:
                logits = Logits(logits.rows, self.ops.extremes(logits.rows.numpy()))
            return speak_greedily(plan, batch, logits, bad)
        if self._sampler is None:
            to_logits = decoder.logits if self._is_cpu else lambda rows: Logits(decoder.logits(rows).rows.cpu(), None)
            self._sampler = StepSampler(
                self.spec.vocab_size, self.spec.eos_ids, to_logits, self.ops.extremes, draws=self._samples
            )
        take = None if self._masks is None else self._masks.take
        return self._sampler.run(plan, batch, rows, bad, last, take_masks=take)

    def _check_states(self, plan: StepPlan) -> None:
        """Check that each recurrent state covers the tokens before its step. Raises InternalError: it does not."""
        if self.store.states is None:
            return
        assert len(plan.states) == len(plan.sequences), "the model has recurrent layers, and a sequence has no state"
        for step, state in zip(plan.sequences, plan.states, strict=True):
            assert not step.draft_ids, f"{step.key} has drafts, and a state cannot go back"
            self.store.states.check(state.source, step.start)

    def _note_states(self, plan: StepPlan) -> None:
        if self.store.states is not None:
            for step, state in zip(plan.sequences, plan.states, strict=True):
                marks = [(place, step.start + rows) for rows, place in state.marks]
                self.store.states.note([*marks, (state.target, step.end)])

    def _seal(self, plan: StepPlan, tokens: Sequence[tuple[int, ...]], bad: set[SequenceKey]) -> None:
        """Seal what the step has finished. Of drafts those that were accepted: all of `tokens` but the last one."""
        ranges = []
        for step, sampled in zip(plan.sequences, tokens, strict=True):
            if bad and step.key in bad:
                continue
            start, end = step.start, step.start + len(step.token_ids)
            if step.draft_ids:
                end += max(len(sampled) - 1, 0)
            first = start - start % HASH_BLOCK_TOKENS
            if not step.seals_tail:
                end -= end % HASH_BLOCK_TOKENS
            if end > first:
                ranges.append(HeldTokens(step.block_table, step.generations, first, end - first))
        self.store.seal_all(ranges)

    def _remember(self, result: StepResult) -> StepResult:
        self._results[result.step] = result
        while len(self._results) > _REMEMBERED_STEPS:
            self._results.popitem(last=False)
        return result


def _bad_sequences(plan: StepPlan, batch: StepBatch, hidden: Hidden) -> set[SequenceKey]:
    refused = hidden.num_refused
    if not (any(hidden.non_finite.tolist()) if refused is None else refused):  # torch's `any` takes far longer
        return set()
    return {
        step.key
        for row, step in zip(batch.first_rows, plan.sequences, strict=True)
        if bool(hidden.non_finite[row : row + len(step.token_ids)].any())
    }


def _drop_non_finite_drafts(plan: StepPlan, batch: StepBatch, hidden: Hidden, spoken: StepOutputs) -> None:
    """Drop the tokens from the first draft on whose keys or values are not finite."""
    if hidden.num_refused == 0 or all(len(told) < 2 for told in spoken.tokens):
        return
    counts = hidden.non_finite.tolist()
    for i, (step, told) in enumerate(zip(plan.sequences, spoken.tokens, strict=True)):
        if len(told) > 1:
            first = batch.first_rows[i] + len(step.token_ids)
            drafts = counts[first : first + len(told) - 1]
            good = next((place for place, count in enumerate(drafts) if count), len(drafts))
            spoken.cut(i, step.key, good + 1)
