"""How many workers a load needs: formulas of queueing theory and of a memory-bound decode step. Pure functions.

    prefill   smallest n with   A / n <= busy
                                backlog / n + s <= target
                                s + quantile of the wait <= target
    decode    smallest n with   step <= target,   X / n * step <= kv_target * pool,   Y / n * step <= seats
                                where step = c0 / (1 - c1 * X / n)

Where s alone exceeds the target (or c0 does, of decode), workers cannot bring it back: only the work counts then, so
that queues do not grow without end.

A: work that arrives, in worker-seconds per second; s: mean time of one prompt. X = K / step and Y = B / step, per ms,
of K tokens of KV in use and B sequences: what is asked of decode, whatever its number of workers. K is no demand: with
fewer workers a step takes longer, so a sequence stays longer (Little's law) and K grows. A step reads the weights
and the KV once, step = c0 + c1 * K / n, and K = X * step, so step = c0 + c1 * X / n * step: the formula above.

The wait in front of n workers that share one queue: it is P_w that a prompt waits, and who waits does so for
exponentially distributed time with mean w:

    P_w = rho^(sqrt(2(n+1)) - 1)        w = (1 + cs2)/2 * s / (n (1 - rho))        rho = A / n

so the q-quantile of the wait is w * ln(P_w / (1 - q)), and 0 where P_w <= 1 - q. cs2: squared coefficient of variation
of a prompt's time. Arrivals count as Poisson.
Sources: Sakasegawa 1977, "An approximation formula Lq = alpha rho^beta / (1 - rho)"; Hopp and Spearman, "Factory
Physics", section 8.6; exponential waits of those who wait: Kingman 1961.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MOST_WORKERS = 4096  # more is no plan
LEAST_PATIENCE = 0.5  # of the target may be waited, also where a prompt takes most of it: else the need has no bound


@dataclass(frozen=True, slots=True)
class PrefillLoad:
    """Work for prefill. Seconds are seconds of one worker."""

    work: float  # arriving, in worker-seconds per second
    backlog_s: float  # queued
    mean_s: float  # of one prompt
    variability: float  # cs2


@dataclass(frozen=True, slots=True)
class PrefillTarget:
    """What prefill must hold."""

    ttft_s: float
    attainment: float  # q
    busy: float


def wait_quantile_s(load: PrefillLoad, num_workers: int, quantile: float) -> float:
    """The wait that a share `quantile` of prompts does not exceed, in seconds; infinite where work exceeds workers."""
    rho = load.work / num_workers
    if rho >= 1:
        return math.inf
    waits = rho ** (math.sqrt(2 * (num_workers + 1)) - 1)
    if waits <= 1 - quantile:
        return 0.0
    mean_s = (1 + load.variability) / 2 * load.mean_s / (num_workers * (1 - rho))
    return mean_s * math.log(waits / (1 - quantile))


def misses_alone(load: PrefillLoad, target: PrefillTarget) -> bool:
    """True if the mean prompt takes longer than the target on an idle worker: no number of workers can help."""
    return load.mean_s >= target.ttft_s


def prefill_workers(load: PrefillLoad, target: PrefillTarget) -> int:
    """Fewest workers that hold the target. Where one prompt alone misses it, only as many as the work keeps busy."""
    least = max(1, math.ceil(load.work / target.busy))
    if misses_alone(load, target):
        return min(least, MOST_WORKERS)
    patience_s = max(target.ttft_s - load.mean_s, target.ttft_s * LEAST_PATIENCE)
    least = max(least, math.ceil(load.backlog_s / patience_s))
    for num_workers in range(least, MOST_WORKERS):
        if wait_quantile_s(load, num_workers, target.attainment) <= patience_s:
            return num_workers
    return MOST_WORKERS


@dataclass(frozen=True, slots=True)
class DecodeLoad:
    """Work for decode, which does not depend on the number of workers."""

    kv_tokens_per_ms: float  # X
    sequences_per_ms: float  # Y: tokens generated per ms


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """What one decode worker can carry within the targets."""

    itl_ms: float
    kv_tokens: float  # of its pool, within the target
    sequences: float  # within the target
    step_base_ms: float  # c0
    step_ms_per_kv_token: float  # c1; 0: unknown

    def step_ms(self, load: DecodeLoad, num_workers: int) -> float:
        """Predicted time of a step; infinite where sequences come faster than so many workers end them."""
        share = self.step_ms_per_kv_token * load.kv_tokens_per_ms / num_workers
        return self.step_base_ms / (1 - share) if share < 1 else math.inf

    def holds(self, load: DecodeLoad, num_workers: int) -> bool:
        """True if so many workers carry the load.

        Where even an empty step misses the ITL target, no number helps: then the pool and the seats alone count.
        """
        step_ms = self.step_ms(load, num_workers)
        if step_ms > self.itl_ms > self.step_base_ms or math.isinf(step_ms):
            return False
        fits = load.kv_tokens_per_ms / num_workers * step_ms <= self.kv_tokens
        return fits and load.sequences_per_ms / num_workers * step_ms <= self.sequences


def decode_workers(load: DecodeLoad, limits: DecodeLimits) -> int:
    """Fewest workers that carry the load."""
    return next((n for n in range(1, MOST_WORKERS) if limits.holds(load, n)), MOST_WORKERS)
