"""What must hold at every moment, as in the table below. Knows what to ask, not what happened.

K1 allocated - freed = live in every pool, and nothing is live after the drain
K2 a block has as many owners as sequences claim it; states, promises and the prefix index agree
K3 nobody writes (or reads) a block that changed hands, nobody writes one that others read
K4 what a step attends to is the KV of exactly its tokens, in its domain, and was sealed before it left
K5 routers are told of exactly the blocks that are findable, and believe what they were told
K6 whoever is let in has room: blocks in use and promised stay within the policy's watermark, or it is alone
R1 every request ends exactly once    R2 a stream is gapless    R3 every token was computed from what its client has
L1 in weather that can be borne every request finishes, and no hand-over is lost but by a refusal or damage
R5 usage = tokens delivered           R6 only the living epoch is heard           R7 nothing waits past its deadline
R8 a worker computes a choice only while its router waits for it: so at most one worker computes it
R9 one loss is one dispatch           R10 a pair has one numerics class
S1 a tenant's request ids are its own: no other tenant's use is felt, nothing of another tenant's is explained
"""

from __future__ import annotations

from typing import Protocol

from ..engine.core import EngineCore
from ..kv.cache.pool import BlockPool


class Violation(Exception):
    """An invariant does not hold."""

    def __init__(self, invariant: str, detail: str) -> None:
        super().__init__(f"{invariant}: {detail}")
        self.invariant = invariant
        self.detail = detail


class Samples(Protocol):
    """Who knows which tokens may follow which prefix."""

    def may_follow(self, token_id: int, cell: int, seed: int, choice: int) -> bool:
        """Whether somebody computed this token from exactly this prefix."""
        ...


def check_core(who: str, core: EngineCore, pool: BlockPool) -> None:
    """K1 and K2 of one worker."""
    live = pool.allocated_total - pool.freed_total
    if live != pool.num_live:
        raise Violation("K1", f"{who}: allocated - freed is {live}, live are {pool.num_live}")
    try:
        core.check_integrity()
    except AssertionError as error:
        raise Violation("K2", f"{who}: {error}") from error


def check_deadlines(who: str, core: EngineCore, now_s: float, slack_s: float) -> None:
    """R7 of one worker: every sequence is ended by its deadline, give or take the step under way."""
    due_s = core.next_deadline_s()
    if due_s is not None and now_s > due_s + slack_s:
        raise Violation("R7", f"{who}: a sequence outlives its deadline by {now_s - due_s:.2f} s")


def check_promises(who: str, core: EngineCore, pool: BlockPool, watermark: float) -> None:
    """K6 of one worker, just after it let somebody in."""
    holders = sum(bool(s.blocks or s.num_promised) for s in core._scheduler.by_key.values())
    promised = core.load(0.0).promised_blocks
    if holders > 1 and pool.num_live + promised > watermark * pool.num_blocks:
        raise Violation("K6", f"{who}: {pool.num_live} blocks in use and {promised} promised of {pool.num_blocks}")


def check_drained(who: str, core: EngineCore, pool: BlockPool) -> None:
    """K1 after the drain: nothing is owned, nothing is promised, nothing runs."""
    if core.num_live:
        raise Violation("K1", f"{who}: after the drain live {core.states()}")
    if core.load(0.0).promised_blocks:
        raise Violation("K1", f"{who}: after the drain {core.load(0.0).promised_blocks} blocks are promised")
    if dict(core.load(0.0).counters).get("swap_blocks_in_use"):
        raise Violation("K1", f"{who}: after the drain host blocks are live")
    if pool.num_live or pool.allocated_total != pool.freed_total:
        raise Violation("K1", f"{who}: after the drain {pool.num_live} blocks are live")
