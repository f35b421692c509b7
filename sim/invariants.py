"""Invariants of the simulator, which must hold after every event. Knows the checks, not the events.

K1 allocated - freed = live in every pool, and nothing is live after the drain
K2 a block has as many owners as sequences claim it; states, promises and the prefix index agree
K3 no sequence reads or writes a block that has another owner, or writes a block that others read
K4 a step attends to the KV of exactly its tokens, in its domain; KV is sealed before it leaves the worker
K5 routers are told of exactly the blocks that can be found, and their maps hold what they were told
K7 a findable block holds the KV of its identity, and what a worker offers to a buddy is computed there
K6 admission keeps blocks in use and promised within the policy's watermark, unless the sequence is alone
R1 every request ends exactly once    R2 a stream has no gap    R3 every token was computed from what its client has
R4 its text and its reason are those of the same tokens on a worker that never fails
L1 in bearable weather every request finishes, also if one worker crashes, freezes, leaves or is cut off; without it
   a hand-over is lost only by a refusal or by damage
R5 usage = tokens delivered           R6 only the newest epoch is accepted        R7 nothing waits past its deadline
R8 a worker computes a choice only while its router waits for it: so at most one worker computes it
Q1 offers to buddies are few at once, and within their bytes per second
P1 a plan that travelled as differences is the plan that was made
R9 one loss is one dispatch           R10 a pair has one numerics class
R11 a request ends as one that kills workers only if its last one had said that it has it, or was the third one
R12 a request that kills each worker that computes it kills a few, and nobody else fails by that
R13 a step counts only if all ranks of a worker did it
S1 request ids are separate per tenant: another tenant's use of an id has no effect, and is never explained
"""

from __future__ import annotations

from typing import Protocol

from ..engine.core import EngineCore
from ..engine.plan import StepPlan
from ..kv.cache.pool import BlockPool


class Violation(Exception):
    """An invariant does not hold."""

    def __init__(self, invariant: str, detail: str) -> None:
        super().__init__(f"{invariant}: {detail}")
        self.invariant = invariant
        self.detail = detail


class Samples(Protocol):
    """Record of sampled tokens: which tokens may follow which prefix."""

    def may_follow(self, token_id: int, cell: int, seed: int, choice: int) -> bool:
        """Return whether any worker sampled this token after exactly this prefix."""
        ...


def check_core(who: str, core: EngineCore, pool: BlockPool) -> None:
    """Check K1 and K2 of one worker."""
    live = pool.allocated_total - pool.freed_total
    if live != pool.num_live:
        raise Violation("K1", f"{who}: allocated - freed is {live}, live are {pool.num_live}")
    try:
        core.check_integrity()
    except AssertionError as error:
        raise Violation("K2", f"{who}: {error}") from error


def check_deadlines(who: str, core: EngineCore, now_s: float, slack_s: float) -> None:
    """Check R7 of one worker: every sequence ends by its deadline, with `slack_s` for the running step."""
    due_s = core.next_deadline_s()
    if due_s is not None and now_s > due_s + slack_s:
        raise Violation("R7", f"{who}: a sequence outlives its deadline by {now_s - due_s:.2f} s")


def check_promises(who: str, core: EngineCore, pool: BlockPool, watermark: float) -> None:
    """Check K6 of one worker, just after it admitted a sequence."""
    holders = sum(bool(s.blocks or s.num_promised) for s in core._scheduler.by_key.values())
    promised = core.load(0.0).promised_blocks
    if holders > 1 and pool.num_live + promised > watermark * pool.num_blocks:
        raise Violation("K6", f"{who}: {pool.num_live} blocks in use and {promised} promised of {pool.num_blocks}")


def check_travelled(who: str, plan: StepPlan, travelled: StepPlan) -> None:
    """Check P1 of one step."""
    if travelled != plan:
        raise Violation("P1", f"{who}: step {plan.step} arrives as {travelled}, sent was {plan}")


def check_drained(who: str, core: EngineCore, pool: BlockPool) -> None:
    """Check K1 after the drain: no block is owned or promised, no sequence is live."""
    if core.num_live:
        raise Violation("K1", f"{who}: after the drain live {core.states()}")
    if core.load(0.0).promised_blocks:
        raise Violation("K1", f"{who}: after the drain {core.load(0.0).promised_blocks} blocks are promised")
    if dict(core.load(0.0).counters).get("swap_blocks_in_use"):
        raise Violation("K1", f"{who}: after the drain host blocks are live")
    if dict(core.load(0.0).counters).get("draft_blocks_in_use"):
        raise Violation("K1", f"{who}: after the drain draft blocks are live")
    if pool.num_live or pool.allocated_total != pool.freed_total:
        raise Violation("K1", f"{who}: after the drain {pool.num_live} blocks are live")
