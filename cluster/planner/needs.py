"""The terms of a decision: how many workers of each role the load needs, now and when a new one would serve. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean

from ...core.request import Role
from .config import PlannerConfig
from .decision import Terms
from .estimates import Estimates
from .observation import Observation, WorkerReport, prefill_ms
from .queueing import (
    DecodeLimits,
    DecodeLoad,
    PrefillLoad,
    PrefillTarget,
    decode_workers,
    misses_alone,
    prefill_workers,
)


@dataclass(frozen=True, slots=True)
class Needs:
    """Loads and limits of both roles. `None`: nothing was measured, so the present number is kept."""

    prefill: PrefillLoad | None
    prefill_forecast: PrefillLoad | None
    decode: DecodeLoad
    decode_forecast: DecodeLoad
    limits: DecodeLimits
    target: PrefillTarget

    def prefill_now(self, have: int, more: float = 0.0) -> int:
        """Prefill workers for the present load, or for a share `more` above it."""
        return have if self.prefill is None else prefill_workers(_grown(self.prefill, more), self.target)

    def prefill_later(self, have: int) -> int:
        """Prefill workers for the load when a worker started now would serve."""
        return have if self.prefill_forecast is None else prefill_workers(self.prefill_forecast, self.target)

    @property
    def is_out_of_reach(self) -> bool:
        """True if one prompt alone misses the target, so that no worker is started for it."""
        return self.prefill is not None and misses_alone(self.prefill, self.target)

    def decode_now(self, more: float = 0.0) -> int:
        """Decode workers for the present load, or for a share `more` above it."""
        load = self.decode
        grown = DecodeLoad(load.kv_tokens_per_ms * (1 + more), load.sequences_per_ms * (1 + more))
        return decode_workers(grown, self.limits)

    def decode_later(self) -> int:
        """Decode workers for the load when a worker started now would serve."""
        return decode_workers(self.decode_forecast, self.limits)


def _grown(load: PrefillLoad, more: float) -> PrefillLoad:
    return PrefillLoad(load.work * (1 + more), load.backlog_s * (1 + more), load.mean_s, load.variability)


def needs_of(config: PlannerConfig, observation: Observation, estimates: Estimates) -> Needs:
    """Loads and limits from an observation and what is known before it."""
    backlog = sum(worker.queued_prompt_tokens for worker in observation.workers if not worker.is_draining)
    speeds = [worker for worker in observation.workers if worker.prefill_ms_per_token > 0]
    num_prefill = len(observation.live(Role.PREFILL))
    now = _prefill_load(estimates, speeds, backlog, 0.0)
    later = _prefill_load(estimates, speeds, backlog, config.start_up_s)
    if now is not None and later is not None:
        # What is queued when new workers serve, to be worked off within one start-up more.
        left_s = max(0.0, now.backlog_s + (later.work - num_prefill) * config.start_up_s)
        later = PrefillLoad(later.work + left_s / config.start_up_s, 0.0, later.mean_s, later.variability)
    margin = config.target_margin_fraction
    return Needs(
        prefill=now,
        prefill_forecast=later,
        decode=_decode_load(estimates, 0.0),
        decode_forecast=_decode_load(estimates, config.start_up_s),
        limits=_limits(config, decoders_of(observation), estimates),
        target=PrefillTarget(
            config.ttft_target_ms * margin / 1e3, config.ttft_attainment_fraction, config.prefill_busy_fraction
        ),
    )


def decoders_of(observation: Observation) -> list[WorkerReport]:
    """Workers whose KV and sequences count as decode's."""
    return [worker for worker in observation.workers if worker.role is not Role.PREFILL]


def decoders_of_live(observation: Observation, going: set[str]) -> list[WorkerReport]:
    """Live workers that decode, without those in `going`."""
    return [worker for worker in decoders_of(observation) if worker.is_live and worker.name not in going]


def _prefill_load(
    estimates: Estimates, speeds: list[WorkerReport], backlog_tokens: int, ahead_s: float
) -> PrefillLoad | None:
    if not speeds:
        return None
    count = max(0.0, estimates.prompts.ahead(ahead_s))
    tokens = max(0.0, estimates.tokens.ahead(ahead_s))
    squared = max(0.0, estimates.tokens_squared.ahead(ahead_s))
    work = fmean(prefill_ms(worker, tokens, squared) for worker in speeds) / 1e3
    if count <= 0 or tokens <= 0:
        per_token_s = fmean(worker.prefill_ms_per_token for worker in speeds) / 1e3
        return PrefillLoad(0.0, backlog_tokens * per_token_s, 0.0, 0.0)
    mean = tokens / count
    variability = max(0.0, squared / count / (mean * mean) - 1)
    return PrefillLoad(work, backlog_tokens * work / tokens, work / count, variability)


def _decode_load(estimates: Estimates, ahead_s: float) -> DecodeLoad:
    return DecodeLoad(
        max(0.0, estimates.kv_tokens_per_ms.ahead(ahead_s)), max(0.0, estimates.sequences_per_ms.ahead(ahead_s))
    )


def _limits(config: PlannerConfig, decoders: list[WorkerReport], estimates: Estimates) -> DecodeLimits:
    live = [worker for worker in decoders if worker.is_live and worker.kv_capacity_tokens > 0]
    pool = fmean(worker.kv_capacity_tokens for worker in live) if live else math.inf
    seats = fmean(worker.max_num_seqs for worker in live) if live else math.inf
    base_ms, slope = estimates.step.line
    return DecodeLimits(
        config.itl_target_ms * config.target_margin_fraction,
        config.kv_target_fraction * pool,
        config.seats_target_fraction * seats,
        base_ms,
        slope,
    )


def terms_of(needs: Needs, estimates: Estimates, observation: Observation, counts: dict[str, int]) -> Terms:
    """All numbers, for the explanation. `counts`: fields of `Terms` that only the law knows."""
    now, later = needs.prefill, needs.prefill_forecast
    limits = needs.limits
    step_ms = limits.step_ms(needs.decode, max(1, counts["have_decode"]))
    return Terms(
        prompts_per_s=estimates.prompts.ahead(0.0),
        prompt_tokens_per_s=estimates.tokens.ahead(0.0),
        prefill_work=now.work if now else 0.0,
        prefill_work_forecast=later.work if later else 0.0,
        prefill_backlog_s=now.backlog_s if now else 0.0,
        prompt_mean_ms=now.mean_s * 1e3 if now else 0.0,
        prompt_variability=now.variability if now else 0.0,
        decode_kv_tokens_per_ms=needs.decode.kv_tokens_per_ms,
        decode_kv_tokens_per_ms_forecast=needs.decode_forecast.kv_tokens_per_ms,
        decode_tokens_per_ms=needs.decode.sequences_per_ms,
        decode_kv_tokens=sum(worker.kv_tokens for worker in decoders_of(observation)),
        step_base_ms=limits.step_base_ms,
        step_ms_per_kv_token=limits.step_ms_per_kv_token,
        step_predicted_ms=0.0 if math.isinf(step_ms) else step_ms,
        have_prefill=len(observation.live(Role.PREFILL)),
        **counts,
    )
