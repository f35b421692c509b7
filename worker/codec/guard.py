"""The guard of a worker's cache codec and what follows past its bound, as its settings want it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from ...core.clock import Clock
from ...engine.guard.fallback import CacheBytes, why_not, wider_pool
from ...engine.guard.idle import RESTART, IdleGuard
from ...engine.guard.machine import CodecGuard, GuardLimits
from ...kv.config import CacheConfig
from ...kv.sizing import PoolSize
from ...model.codec_guard import WIDE, CodecScorer
from ...model.heads.resolved import Drafts, with_codec
from ...model.resolved import ResolvedModel
from ...model.runner import Runner
from ..automatic import SizedWorker

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Fallback:
    """What a worker falls back to when its guard finds the cache's codec too coarse."""

    codec: str
    pool: PoolSize


def fallback_of(model: ResolvedModel, draft: Drafts | None, sized: SizedWorker) -> Fallback | None:
    """The fall-back that the settings want. None: they want none, or there is no room for it, which is logged."""
    cache = sized.cache
    if not cache.guarded_tokens or cache.guard_action != "fallback" or model.spec.delta is not None:
        return None
    before = CacheBytes(model.codec, model.kv_spec.bytes_per_token, _bytes_beside(draft, model.codec))
    after = CacheBytes(WIDE, model.spec.kv_spec(WIDE).bytes_per_token, _bytes_beside(draft, WIDE))
    pool = wider_pool(sized.pool, before, after)
    why = why_not(pool, model.max_model_len)
    if why:
        _log.warning("past cache.guard_bound this worker can only report, and not fall back to %s: %s", WIDE, why)
        return None
    return Fallback(WIDE, pool)


def _bytes_beside(draft: Drafts | None, codec: str) -> int:
    """Bytes of a token in the pool of what guesses beside a model whose cache has this codec."""
    group = None if draft is None else with_codec(draft, codec).beside.group
    return 0 if group is None else group.bytes_per_token


def codec_guard(
    cache: CacheConfig, model: ResolvedModel, runner: Runner, clock: Clock, fallback: Fallback | None
) -> IdleGuard | None:
    """Guard of the cache's codec. None: not wanted, or the model has recurrent layers, which is logged."""
    if cache.guard_bound is None or not cache.guarded_tokens:
        return None
    if model.spec.delta is not None:
        refuse_guard(cache, "recurrent layers")
        return None
    most = min(cache.guarded_tokens, model.max_model_len)
    scorer = CodecScorer(runner, model.codec, model.spec.kv_spec(WIDE), most)
    limits = GuardLimits(cache.guard_bound, cache.guard_share, most)
    follows = RESTART
    if fallback is not None:
        follows = f"new requests are served with a cache in {fallback.codec} of {fallback.pool.num_tokens:,} tokens"
    return IdleGuard(CodecGuard(limits, clock.now_s()), scorer, clock, follows)


def refuse_guard(cache: CacheConfig, why: str) -> None:
    """Say that a wanted guard is not there."""
    if cache.guarded_tokens:
        _log.warning("cache.guard_bound is %s, and a worker with %s is not watched", cache.guard_bound, why)
