"""A worker's draft model in the simulator: every row reads the KV of all earlier tokens and checks it."""

from __future__ import annotations

from ..engine.plan import SequenceStep
from ..engine.speculation.draft_model.catch_up import CatchUp
from ..engine.speculation.draft_model.holdings import DraftHoldings
from ..engine.speculation.draft_model.plan import DraftPlan, DraftResult, all_failed
from ..engine.speculation.draft_model.planner import DraftBounds, DraftPlanner
from ..kv.section import HeldTokens
from .cells import CellStore, cells_after, domain_cell, mix
from .setting import Setting
from .store import VOCABULARY, Store
from .world import World

CONTEXT = 1 << 20


class DraftModel:
    """Guesses right at a rate, in blocks of its own, and fails like steps. It is called by engine/turn.py."""

    def __init__(self, world: World, store: Store, setting: Setting, block_tokens: int) -> None:
        holdings = DraftHoldings(setting.draft_blocks, block_tokens)
        catch_up = CatchUp(1.0)
        catch_up.tokens = setting.draft_chunk
        self.planner = DraftPlanner(DraftBounds(CONTEXT, VOCABULARY), holdings, catch_up)
        self._world = world
        self._store = store
        self._setting = setting
        self._cells = CellStore(block_tokens, holdings.pool)

    def draft(self, plan: DraftPlan) -> DraftResult:
        """Compute a plan. One that fails has written all of its rows before."""
        for step in plan.catch_up.sequences:
            self._compute(step)
        guesses = [self._guess(step, most) for step, most in zip(plan.guesses.sequences, plan.lengths, strict=True)]
        if self._world.chance(self._setting.step_failure):
            return all_failed(plan)
        return DraftResult(tuple(guesses))

    def _compute(self, step: SequenceStep) -> int:
        """Check the cells before a step's rows, and write theirs; returns the last one."""
        known = self._store.known[step.key]
        self._cells.check_prefix(_held(step, 0, step.start), known.cells)
        before = known.cells[step.start - 1] if step.start else domain_cell(known.domain)
        cells = cells_after(before, step.token_ids)
        self._cells.write(_held(step, step.start, step.end), cells)
        return cells[-1]

    def _guess(self, step: SequenceStep, most: int) -> tuple[int, ...]:
        last, rate = self._compute(step), self._setting.right_guesses
        tokens = [*self._store.known[step.key].tokens[: step.end - 1], step.token_ids[-1]]
        right = self._store.guess(step.key, tokens, step.params.seed, most)
        luck = [mix(step.end + place, tokens[-1]) % 1000 < 1000 * rate for place in range(most)]
        guessed = [(id_ if is_right else id_ + 1) % VOCABULARY for id_, is_right in zip(right, luck, strict=True)]
        computed = guessed[:-1]
        self._cells.write(_held(step, step.end, step.end + len(computed)), cells_after(last, computed))
        return tuple(guessed)


def _held(step: SequenceStep, start: int, end: int) -> HeldTokens:
    return HeldTokens(step.block_table, step.generations, start, end - start)
