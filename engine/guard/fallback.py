"""What follows when a cache's codec is too coarse: the pool in a wider one, and the way there. Pure.

    watching ── exceeded ──▶ draining ── all ended, or handed back ──▶ building ── built ──▶ changed
        ▲                       │                                         └── failed ──▶ returning ── built ──▶ kept
        └───── the worker ends, or drains by order: nothing follows                         └── failed ──▶ lost

`kept`: the codec before goes on. `lost`: neither pool could be made, so the process must end and start again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from ...kv.sizing import PoolSize


@dataclass(frozen=True, slots=True)
class CacheBytes:
    """Bytes of one token in a worker's pool, and in its swap space."""

    codec: str  # as --kv-cache-dtype names it
    own: int  # of the served model
    beside: int = 0  # of a draft model, whose codec does not change, or of a head, which has the served model's

    @property
    def per_token(self) -> int:
        """Bytes of a token of the pool."""
        return self.own + self.beside


def wider_pool(pool: PoolSize, before: CacheBytes, after: CacheBytes) -> PoolSize:
    """The pool in the bytes of `pool`, whose tokens take `after` instead of `before`; swap space alike.

    It has no more blocks than before.
    """
    block_bytes = after.per_token * pool.block_tokens
    num_blocks = min(pool.num_blocks, pool.pool_bytes // block_bytes)
    return replace(
        pool,
        num_blocks=num_blocks,
        pool_bytes=num_blocks * block_bytes,
        num_swap_blocks=min(pool.num_swap_blocks, pool.num_swap_blocks * before.own // after.own),
        arithmetic=(
            f"{pool.pool_bytes / 2**20:,.1f} MiB of the pool in {before.codec} ÷ ({after.per_token:,} bytes/token in "
            f"{after.codec} × {pool.block_tokens} tokens/block) = {num_blocks:,} blocks"
        ),
    )


def why_not(pool: PoolSize, context: int) -> str:
    """Why a worker cannot change to `pool`, with a remedy; empty: it can. `context`: tokens of the longest one."""
    if pool.num_tokens >= context:
        return ""
    return (
        f"its pool would hold {pool.num_tokens:,} tokens ({pool.arithmetic}) and the context has {context:,}; give the "
        "pool more memory (cache.memory_fraction, cache.tokens), or ask for a shorter model.max_model_len"
    )


class Stage(Enum):
    """Where a change is."""

    WATCHING = "watching"
    DRAINING = "draining"
    BUILDING = "building"
    RETURNING = "returning"
    CHANGED = "changed"
    KEPT = "kept"
    LOST = "lost"


UNDER_WAY = (Stage.DRAINING, Stage.BUILDING, Stage.RETURNING)


class CodecChange:
    """The one change of a worker's cache from a codec to another. After it there is no second one."""

    def __init__(self, before: str, after: str) -> None:
        self.before = before
        self.after = after
        self.stage = Stage.WATCHING
        self.reason = ""  # of the last failure

    @property
    def is_under_way(self) -> bool:
        """True if new work waits for the end of the change."""
        return self.stage in UNDER_WAY

    @property
    def changes_to(self) -> str:
        """The codec that the worker is about to have; empty: it keeps the one it has."""
        return self.after if self.is_under_way else ""

    @property
    def builds(self) -> str:
        """The codec of the pool that must be made now."""
        assert self.stage in (Stage.BUILDING, Stage.RETURNING), self.stage
        return self.after if self.stage is Stage.BUILDING else self.before

    @property
    def fell_back_from(self) -> str:
        """The codec that the pool that is made now, or was made, replaces; empty: it replaces none."""
        return self.before if self.stage in (Stage.BUILDING, Stage.CHANGED) else ""

    def exceeded(self, *, is_ending: bool) -> bool:
        """The guard has its verdict. True: stop new work and let running work end. `is_ending`: the worker drains."""
        if self.stage is not Stage.WATCHING or is_ending:
            return False
        self.stage = Stage.DRAINING
        return True

    def emptied(self) -> None:
        """No sequence is left, and the pool is free."""
        assert self.stage is Stage.DRAINING, self.stage
        self.stage = Stage.BUILDING

    def built(self) -> None:
        """The pool that `builds` named serves."""
        assert self.stage in (Stage.BUILDING, Stage.RETURNING), self.stage
        self.stage = Stage.CHANGED if self.stage is Stage.BUILDING else Stage.KEPT

    def failed(self, reason: str) -> bool:
        """A step of the change failed. True: make the pool that `builds` names now; False: the process must end."""
        self.reason = reason
        self.stage = Stage.RETURNING if self.stage is Stage.BUILDING else Stage.LOST
        return self.stage is Stage.RETURNING
