"""The guard of a worker's cache codec, as its settings want it."""

from __future__ import annotations

import logging

from ..core.clock import Clock
from ..engine.guard.idle import IdleGuard
from ..engine.guard.machine import CodecGuard, GuardLimits
from ..kv.config import CacheConfig
from ..model.codec_guard import WIDE, CodecScorer
from ..model.resolved import ResolvedModel
from ..model.runner import Runner

_log = logging.getLogger(__name__)


def codec_guard(cache: CacheConfig, model: ResolvedModel, runner: Runner, clock: Clock) -> IdleGuard | None:
    """Guard of the cache's codec. None: not wanted, or the model has recurrent layers, which is logged."""
    if cache.guard_bound is None or not cache.guarded_tokens:
        return None
    if model.spec.delta is not None:
        refuse_guard(cache, "recurrent layers")
        return None
    most = min(cache.guarded_tokens, model.max_model_len)
    scorer = CodecScorer(runner, model.codec, model.spec.kv_spec(WIDE), most)
    limits = GuardLimits(cache.guard_bound, cache.guard_share, most)
    return IdleGuard(CodecGuard(limits, clock.now_s()), scorer, clock)


def refuse_guard(cache: CacheConfig, why: str) -> None:
    """Say that a wanted guard is not there."""
    if cache.guarded_tokens:
        _log.warning("cache.guard_bound is %s, and a worker with %s is not watched", cache.guard_bound, why)
