"""Medusa heads: each guesses one token from the hidden state that gave the last one. Knows no owner of blocks.

    h = norm(x)                                     x: residual stream of the row that sampled the last token
    z = h; per block: z += silu(W z + b);  logits of head i = H_i z: the i-th token after the last one

A chain: of each head one token, drawn with the target's noise; no tree.
Source: Medusa (Cai et al. 2024), section 2.1.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...checkpoint.heads.medusa import MedusaSpec, open_heads
from ...core.errors import CheckpointError
from ...core.request import SequenceKey
from ...engine.speculation.draft_model.plan import DraftPlan, DraftResult
from ..ops.elementwise import activated
from ..ops.seam import Linear, Ops
from ..runner import Runner
from ..sampling.sampler import Sampler
from .drawing import Guess, GuessDrawer
from .features import SampledRows


class _Head(NamedTuple):
    blocks: tuple[Linear, ...]
    output: Linear


@dataclass(frozen=True, slots=True)
class MedusaWeights:
    """Matrices of Medusa heads, packed for one device."""

    heads: tuple[_Head, ...]
    token_ids: Tensor | None  # [rows] int64 on the CPU: the token of each output


def load_medusa_weights(spec: MedusaSpec, ops: Ops, vocab_size: int) -> MedusaWeights:
    """Read and pack the heads' matrices. Call it before `ops.prepare`.

    Raises:
        CheckpointError: a tensor cannot be read, or the token map names a token that the model does not have.
    """
    files = open_heads(spec.directory)
    heads = [
        _Head(
            tuple(ops.pack(files.take(weight), None if bias is None else files.take(bias)) for weight, bias in blocks),
            ops.pack(files.take(output), wide=True),
        )
        for blocks, output in ((head.blocks, head.output) for head in spec.heads)
    ]
    token_ids = None
    if spec.token_map is not None:
        token_ids = files.take(spec.token_map).long()
        if int(token_ids.min()) < 0 or int(token_ids.max()) >= vocab_size:
            raise CheckpointError(
                f"{spec.directory}: {spec.token_map} names tokens {int(token_ids.min())} to {int(token_ids.max())}; "
                f"the model has 0 to {vocab_size - 1}"
            )
    return MedusaWeights(tuple(heads), token_ids)


class MedusaDrafter:
    """Implements `Drafter` of engine/loop.py over the target's runner. Only the steps' thread may use it."""

    def __init__(self, runner: Runner, weights: MedusaWeights, end_ids: Sequence[int]) -> None:
        """From now on `runner` keeps the hidden rows that the heads read."""
        self._runner = runner
        self.weights = weights
        self._features = SampledRows()
        sampler = Sampler(end_ids, runner.ops.extremes)
        self._drawer = GuessDrawer(sampler, end_ids, weights.token_ids, runner.spec.vocab_size)
        runner.features = self._features

    def warm_up(self) -> None:
        """Compute every head once. Call it in the thread of the steps, after the runner's `warm_up`."""
        ops, width = self._runner.ops, self._runner.spec.hidden_size
        rows = torch.zeros(ops.row_multiple, width, dtype=ops.dtype, device=ops.device)
        with torch.inference_mode():
            for head in self.weights.heads:
                self._logits(head, rows)

    def release(self) -> None:
        """Give back the hidden rows, after the last call; the weights stay."""
        self._features = SampledRows()

    def catch_up(self, plan: DraftPlan) -> frozenset[SequenceKey]:
        """Implements `Drafter.catch_up`: heads without keys and values have nothing to catch up."""
        assert not plan.catch_up.sequences, "Medusa heads have no keys and values"
        return frozenset()

    def guess(self, plan: DraftPlan) -> DraftResult:
        """Guess for the sequences whose last sampled row is known; nothing for the others."""
        guesses = [Guess(step, most) for step, most in zip(plan.guesses.sequences, plan.lengths, strict=True)]
        found = [(guess, self._features.find(guess.step.key, guess.step.end - 2)) for guess in guesses]
        rows = [row for _, row in found if row is not None]
        going = [guess for guess, row in found if row is not None]
        if rows:
            with torch.inference_mode():
                self._guess(going, rows)
        return DraftResult(tuple(guess.ids for guess in guesses))

    def _guess(self, guesses: list[Guess], rows: list[Tensor]) -> None:
        """Add to the guesses; `rows` [hidden]: of each."""
        ops, norm = self._runner.ops, self._runner.weights.norm
        h = ops.rms_norm(padded(rows, ops.row_multiple), norm)
        for head in self.weights.heads:
            places = [place for place, guess in enumerate(guesses) if guess.wants_more]
            if not places:
                return
            if len(places) < len(guesses):
                guesses = [guesses[place] for place in places]
                h = padded([h[place] for place in places], ops.row_multiple)
            self._drawer.add(guesses, self._logits(head, h))

    def _logits(self, head: _Head, h: Tensor) -> Tensor:
        """Logits [rows, outputs] float32 of one head for h [rows, hidden]."""
        linear: Callable[[Tensor, Linear], Tensor] = self._runner.ops.linear
        for block in head.blocks:
            h = h + activated(linear(h, block).float(), "silu").to(h.dtype)
        return linear(h, head.output).float()


def padded(rows: Sequence[Tensor], multiple: int) -> Tensor:
    """Rows [n, width], n a multiple of `multiple`: the given ones, then the first one again."""
    return torch.stack([*rows, *[rows[0]] * (-len(rows) % multiple)])
