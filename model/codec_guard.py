"""Divergence of the served cache's codec from bfloat16, over small caches of its own. Knows no request, no clock."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.request import SamplingParams, SequenceKey
from ..engine.guard.machine import Part, PartScore
from ..engine.plan import SequenceStep, StepPlan
from ..kv.block import BlockId
from ..kv.spec import KvSpec
from ..kv.store.store import KvStore
from .batch import build_batch, on_device, read_whole
from .runner import Runner

WIDE = "bfloat16"
_PARAMS = SamplingParams(max_tokens=1, temperature=0.0)


class CodecScorer:
    """Scores parts of prompts with a runner's decoder. To be used in the thread of its steps."""

    def __init__(self, runner: Runner, served: str, wide: KvSpec, num_tokens: int) -> None:
        """`num_tokens`: of the longest sample. `wide`: the layout in `WIDE` of the runner's model."""
        self.served = served
        self._runner = runner
        block_tokens = runner.store.block_tokens
        num_blocks = -(-num_tokens // block_tokens)
        device = runner.ops.device
        self._stores = [KvStore(spec, num_blocks, block_tokens, device) for spec in (wide, runner.store.spec)]
        self._table = tuple(BlockId(block) for block in range(num_blocks))

    @torch.inference_mode()
    def score(self, part: Part) -> PartScore:
        """KL(wide ‖ served) of the part's scored rows."""
        first = max(part.first_scored, part.start) - part.start
        wide, served = (self._rows(part, store) for store in self._stores)
        if first >= part.num_tokens:
            return PartScore(0.0, 0)
        expected, got = (self._logs(rows, first, part.num_tokens) for rows in (wide, served))
        divergences = (expected.exp() * (expected - got)).sum(-1)
        return PartScore(float(divergences.clamp(min=0.0).sum()), part.num_tokens - first)

    def _rows(self, part: Part, store: KvStore) -> Tensor:
        ids = part.ids[part.start :]
        step = SequenceStep(
            SequenceKey("guard", 0), part.start, ids, self._table, (1,) * len(self._table),
            samples=False, params=_PARAMS, num_generated=0,
        )  # fmt: skip
        batch = build_batch(StepPlan(0, (step,)), [ids], store.block_tokens, self._runner.ops)
        batch = read_whole(on_device(batch, self._runner.ops.device))
        return self._runner.decoder.hidden(batch, store).rows

    def _logs(self, rows: Tensor, first: int, count: int) -> Tensor:
        """Log-probabilities [count - first, vocab] float64; logits take as many rows as the ops do."""
        cut = first - first % self._runner.ops.row_multiple
        logits = self._runner.decoder.logits(rows[cut:]).rows[first - cut : count - cut]
        return logits.double().log_softmax(-1)
