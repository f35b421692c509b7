"""Every number the router exports, under our names and under vLLM's, so that existing dashboards work.

Knows no request and no worker: who measures calls in. All series that can be known beforehand exist with zero.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ..core.request import FinishReason
from .coefficients import FIELDS
from .facts import LoadFacts, WorkerState

_TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_E2E_BUCKETS = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_ERROR_BUCKETS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 4, 8)

DROP_REASONS = ("unknown_request", "stale_epoch", "wrong_worker", "repeated", "gap", "after_end")
OUTCOMES = ("finished", "rejected", "cancelled", "failed")
TRANSPORTS = ("grpc", "none")


@dataclass(frozen=True, slots=True)
class RequestFigures:
    """What one finished request leaves in the metrics."""

    model: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    finish_reasons: tuple[FinishReason, ...]
    e2e_s: float


class RouterMetrics:
    """The collectors, in a registry of their own: several routers can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._own()
        self._like_vllm()
        self.fleet([])

    def _own(self) -> None:
        registry = self.registry
        self.requests = Counter("twostroke_requests", "Requests by outcome", ["outcome"], registry=registry)
        self.dropped = Counter("twostroke_tokens_dropped", "Refused worker messages", ["reason"], registry=registry)
        self.retries = Counter("twostroke_redispatches", "Requests sent to a second worker", registry=registry)
        self.workers_lost = Counter("twostroke_workers_lost", "Workers that died or fell silent", registry=registry)
        self.resyncs = Counter("twostroke_prefix_resyncs", "Gaps in a worker's block events", registry=registry)
        self.usage_disagreements = Counter(
            "twostroke_usage_disagreements", "Ends whose worker counted other tokens than arrived", registry=registry
        )
        self.ignored_fields = Counter(
            "twostroke_ignored_fields", "Fields of request bodies that are unknown and were ignored", registry=registry
        )
        self.kv_bytes = Counter("twostroke_kv_bytes_moved", "KV handed over", ["transport"], registry=registry)
        self.kv_bytes_as_bf16 = Counter("twostroke_kv_bytes_as_bf16", "The same KV in bf16", registry=registry)
        self.refetched = Counter("twostroke_kv_blocks_refetched", "KV blocks that arrived damaged", registry=registry)
        self.workers = Gauge("twostroke_workers", "Workers by role and state", ["role", "state"], registry=registry)
        self.prefix_entries = Gauge("twostroke_prefix_entries", "Hash blocks in the prefix map", registry=registry)
        self.prefix_dropped = Gauge("twostroke_prefix_entries_dropped", "Forgotten for the bound", registry=registry)
        self.in_flight_tokens = Gauge("twostroke_in_flight_tokens", "Admitted tokens under way", registry=registry)
        self.choose_s = Histogram(
            "twostroke_choose_seconds",
            "Prefix match and choice",
            registry=registry,
            buckets=(1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2),
        )
        self.prediction_error = Histogram(
            "twostroke_ttft_prediction_error_ratio",
            "|predicted - measured| / measured time to first token",
            registry=registry,
            buckets=_ERROR_BUCKETS,
        )
        self.coefficient = Gauge(
            "twostroke_coefficient", "Coefficients that routing uses now", ["worker_id", "name"], registry=registry
        )
        for outcome in OUTCOMES:
            self.requests.labels(outcome)
        for reason in DROP_REASONS:
            self.dropped.labels(reason)
        for transport in TRANSPORTS:
            self.kv_bytes.labels(transport)

    def _like_vllm(self) -> None:
        registry, model = self.registry, ["model_name"]
        self.running = Gauge("vllm:num_requests_running", "Requests in decode", model, registry=registry)
        self.waiting = Gauge("vllm:num_requests_waiting", "Requests before their first step", model, registry=registry)
        self.kv_usage = Gauge("vllm:kv_cache_usage_perc", "KV in use, 1 = all of it", model, registry=registry)
        self.ttft = Histogram(
            "vllm:time_to_first_token_seconds", "TTFT", model, registry=registry, buckets=_TTFT_BUCKETS
        )
        self.itl = Histogram("vllm:inter_token_latency_seconds", "ITL", model, registry=registry, buckets=_ITL_BUCKETS)
        self.e2e = Histogram(
            "vllm:e2e_request_latency_seconds", "Whole requests", model, registry=registry, buckets=_E2E_BUCKETS
        )
        self.prompt_tokens = Counter("vllm:prompt_tokens", "Prompt tokens", model, registry=registry)
        self.generation_tokens = Counter("vllm:generation_tokens", "Generated tokens", model, registry=registry)
        self.success = Counter(
            "vllm:request_success", "Finished requests", ["model_name", "finished_reason"], registry=registry
        )
        self.prefix_queries = Counter("vllm:prefix_cache_queries", "Tokens looked up", model, registry=registry)
        self.prefix_hits = Counter("vllm:prefix_cache_hits", "Tokens found", model, registry=registry)

    def know_model(self, model: str) -> None:
        """Create every series of a model, with zero."""
        for collector in (self.running, self.waiting, self.kv_usage, self.ttft, self.itl, self.e2e):
            collector.labels(model)
        for counter in (self.prompt_tokens, self.generation_tokens, self.prefix_queries, self.prefix_hits):
            counter.labels(model)
        for reason in (FinishReason.STOP, FinishReason.LENGTH, FinishReason.CANCELLED, FinishReason.ERROR):
            self.success.labels(model, reason.value)

    def forget_worker(self, worker_id: str) -> None:
        """Drop the series of a worker that is gone."""
        for name in FIELDS:
            with contextlib.suppress(KeyError):
                self.coefficient.remove(worker_id, name)

    def finished(self, figures: RequestFigures) -> None:
        """A request reached its end."""
        self.e2e.labels(figures.model).observe(figures.e2e_s)
        self.prompt_tokens.labels(figures.model).inc(figures.prompt_tokens)
        self.generation_tokens.labels(figures.model).inc(figures.completion_tokens)
        self.prefix_queries.labels(figures.model).inc(figures.prompt_tokens)
        self.prefix_hits.labels(figures.model).inc(figures.cached_tokens)
        for reason in figures.finish_reasons:
            self.success.labels(figures.model, reason.value).inc()

    def fleet(self, states: Iterable[tuple[str, WorkerState]]) -> None:
        """How many workers of which role stand where."""
        counts: dict[tuple[str, WorkerState], int] = {}
        for role, state in states:
            counts[role, state] = counts.get((role, state), 0) + 1
        for role in ("prefill", "decode", "combined"):
            for state in WorkerState:
                self.workers.labels(role, state.value).set(counts.get((role, state), 0))

    def load(self, model: str, loads: Iterable[LoadFacts]) -> None:
        """A model's sums over its workers."""
        reports = list(loads)
        used = sum(r.total_blocks - r.free_blocks for r in reports)
        total = sum(r.total_blocks for r in reports)
        self.running.labels(model).set(sum(r.running for r in reports))
        self.waiting.labels(model).set(sum(r.waiting for r in reports))
        self.kv_usage.labels(model).set(used / total if total else 0.0)
