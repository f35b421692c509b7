"""Prometheus metrics of the router, under our names and under vLLM's, so that existing dashboards work.

Knows no request's state and no connection: the measuring parts call it. Series known beforehand exist with zero.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from itertools import product

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ..core import metrics
from ..core.board import Board, render
from ..core.life import Life
from .routing.coefficients import FIELDS
from .routing.engine_totals import EngineTotals
from .routing.facts import LoadFacts, WorkerFacts, WorkerState
from .workers.supervision import Supervision

_ERROR_BUCKETS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 4, 8)

DROP_REASONS = ("unknown_request", "stale_epoch", "wrong_worker", "repeated", "gap", "after_end")
OUTCOMES = ("finished", "rejected", "cancelled", "failed")
PLANNER_ACTIONS = ("hold", "change_role", "start", "drain", "stop")
TRANSPORTS = ("grpc", "shm", "gloo", "none")
FORETOLD_SIDES, FORETOLD_OUTCOMES = ("decode", "prefill"), ("right", "missing", "more")


class RouterMetrics:
    """The metrics, in their own registry, because several routers can run in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._totals: dict[str, EngineTotals] = {}
        self.pair_speeds: Callable[[], Mapping[tuple[str, str, str], float]] = dict  # read at each scrape
        self._board = Board(self.registry, ("model_name",), self._refresh)
        self._pools = Board(self.registry, ("model_name", "engine"))
        self._own()
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
        self.calls_refused = Gauge(
            "twostroke_inside_calls_refused", "Calls at the workers' port without proof or role", registry=registry
        )
        self.tls_failed = Gauge(
            "twostroke_inside_tls_failed", "Connections to workers that failed for certificates", registry=registry
        )
        self.journal_requests = Gauge(
            "twostroke_journal_requests", "Resumable requests and stored responses in memory", registry=registry
        )
        self.journal_bytes = Gauge("twostroke_journal_bytes", "Estimated memory of these", registry=registry)
        self.journal_store_up = Gauge(
            "twostroke_journal_store_up",
            "1: streams of this router could be adopted by another; 0: its store does not answer, or there is none",
            registry=registry,
        )
        self.streams_adopted = Gauge(
            "twostroke_streams_adopted", "Streams of lost routers that go on here", registry=registry
        )
        self.streams_fenced = Counter(
            "twostroke_streams_fenced", "Streams of ours that another router took over", registry=registry
        )
        self.kv_bytes = Counter("twostroke_kv_bytes_moved", "KV handed over", ["transport"], registry=registry)
        self._pair_speed = Gauge(
            "twostroke_handover_bytes_per_second",
            "Measured speed of a pair's hand-overs by the transport that it uses now; 0: too small to tell",
            ["prefill_worker", "decode_worker", "transport"],
            registry=registry,
        )
        self.kv_bytes_as_bf16 = Counter("twostroke_kv_bytes_as_bf16", "The same KV in bf16", registry=registry)
        self.refetched = Counter("twostroke_kv_blocks_refetched", "KV blocks that arrived damaged", registry=registry)
        self.foretold_tokens = Counter(
            "twostroke_foretold_cached_tokens",
            "Prompt tokens that routing expected in a prefix cache: found there (right) or not (missing); found beside "
            "them (more)",
            ["side", "outcome"],
            registry=registry,
        )
        self.workers = Gauge("twostroke_workers", "Workers by role and state", ["role", "state"], registry=registry)
        self._planned = Gauge(
            "twostroke_planner_workers",
            "Workers by role that the planner wants (desired) and that serve (actual), as the supervisor reported",
            ["role", "kind"],
            registry=registry,
        )
        self._last_action = Gauge(
            "twostroke_planner_last_action",
            "1 for the action of the planner's last decision",
            ["action"],
            registry=registry,
        )
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
        for side, outcome in product(FORETOLD_SIDES, FORETOLD_OUTCOMES):
            self.foretold_tokens.labels(side, outcome)

    def know_model(self, model: str) -> None:
        """Create all series of a model, with zero."""
        if model not in self._totals:
            self._totals[model] = EngineTotals()
            metrics.know(self._board, model)

    def know_worker(self, facts: WorkerFacts) -> None:
        """Create the series of a connected worker: its model, and the size of its KV pool."""
        self.know_model(facts.model.name)
        self._pools.set(
            metrics.CACHE_POOL,
            facts.model.name,
            facts.worker_id,
            str(facts.block_tokens),
            str(facts.num_kv_blocks),
            value=1,
        )

    def forget_worker(self, facts: WorkerFacts) -> None:
        """Remove the series of a worker that is gone."""
        worker_id = facts.worker_id
        self._pools.forget(metrics.CACHE_POOL, facts.model.name, worker_id)
        if totals := self._totals.get(facts.model.name):
            totals.forget(facts.key)
        for name in FIELDS:
            with contextlib.suppress(KeyError):
                self.coefficient.remove(worker_id, name)

    def generated(self, model: str, num_tokens: int) -> None:
        """Count generated tokens."""
        self._board.add(metrics.GENERATION_TOKENS, model, amount=num_tokens)

    def ended(self, model: str, life: Life) -> None:
        """Count a request that is over."""
        metrics.count_life(self._board, life, model)

    def engine(self, worker: WorkerFacts, load: LoadFacts) -> None:
        """Add the engine counters of a worker's load report."""
        self.know_model(worker.model.name)
        self._totals[worker.model.name].take(worker.key, load)

    def render(self, accept: str) -> tuple[bytes, str]:
        """All metrics, in the format that the Accept header asks for: body and content type."""
        self._pair_speed.clear()
        for pair, bytes_per_s in self.pair_speeds().items():
            self._pair_speed.labels(*pair).set(bytes_per_s)
        return render(self.registry, accept)

    def fleet(self, states: Iterable[tuple[str, WorkerState]]) -> None:
        """Set the number of workers by role and state."""
        counts: dict[tuple[str, WorkerState], int] = {}
        for role, state in states:
            counts[role, state] = counts.get((role, state), 0) + 1
        for role in ("prefill", "decode", "combined"):
            for state in WorkerState:
                self.workers.labels(role, state.value).set(counts.get((role, state), 0))

    def planned(self, report: Supervision) -> None:
        """Set what the supervisor reported last."""
        self._planned.clear()
        for kind, counts in (("desired", report.desired), ("actual", report.actual)):
            for role, count in counts.items():
                self._planned.labels(role, kind).set(count)
        self._last_action.clear()
        if report.action in PLANNER_ACTIONS:
            self._last_action.labels(report.action).set(1)

    def load(self, model: str, loads: Iterable[LoadFacts]) -> None:
        """Set a model's sums over its workers."""
        reports = list(loads)
        used = sum(r.total_blocks - r.free_blocks for r in reports)
        total = sum(r.total_blocks for r in reports)
        self._board.set(metrics.RUNNING, model, value=sum(r.running for r in reports))
        self._board.set(metrics.WAITING, model, value=sum(r.waiting for r in reports))
        self._board.set(metrics.KV_USAGE, model, value=used / total if total else 0.0)

    def _refresh(self) -> None:
        for model, totals in self._totals.items():
            metrics.count_engines(self._board, totals.counters, totals.spreads, model)
