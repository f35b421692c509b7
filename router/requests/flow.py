"""Runs requests of the API through the workers, as streams, and reports about them. Knows no client protocol.

Decisions are made in pure modules: router/requests/lifecycle.py and those that it calls.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict
from typing import Any

import grpc.aio

from ...core.clock import Clock, MonotonicClock
from ...core.errors import Cancelled, InternalError, TwostrokeError
from ...core.guard import Guard
from ...core.request import Request
from ...core.timeline import Instant, Timeline
from ...core.tls.identity import TlsIdentity
from ..config import RouterConfig
from ..metrics import TRANSPORTS, RouterMetrics
from ..routing.facts import ModelFacts
from ..workers.adapters import ClusterAdapters
from ..workers.registry import Identity, WorkerRegistry
from .admission.entrance import Announced
from .dispatch import Dispatcher, PieceStream
from .explain import explain_decisions, explain_run
from .foretold import foretold
from .history import RequestHistory
from .life import life_of
from .pairs import PairKey, Pairs
from .pieces import OutputDelta
from .state import RequestState


class Flow:
    """Runs validated requests on the workers. One per router process, on one event loop.

    The APIs call `generate`, `abort`, `explain`, `cluster`, `models`; the process calls `internal_server`, then
    `start`, and at the end `drain` and `close`.
    """

    def __init__(
        self,
        config: RouterConfig,
        identity_key: bytes,
        metrics: RouterMetrics | None = None,
        clock: Clock | None = None,
        *,
        proof_key: bytes,
        tls: TlsIdentity | None = None,
    ) -> None:
        """`identity_key`: `kv.keys.identity_key` of the cluster's shared secret; gives the workers' block identities.

        `proof_key`: `kv.keys.proof_key` of it; workers and routers prove to each other that they know it.

        `tls`: the router's certificates for workers; None: it has none.

        `metrics`: the metrics for /metrics; None: new ones in their own registry.
        """
        self.metrics = metrics or RouterMetrics()
        self.clock = clock or MonotonicClock()
        self._config = config
        name = config.name or f"router-{os.getpid()}"
        self._identity = Identity(name, _new_incarnation(), identity_key, proof_key, tls)
        self._guard = Guard(proof_key, "router", tls=tls)
        self.metrics.calls_refused.set_function(self._guard.refusals.total)
        self.metrics.tls_failed.set_function(lambda: tls.num_failed if tls else 0)
        self._is_encrypted = tls is not None
        self._dispatcher = Dispatcher(config, self._identity, self.metrics, self.clock)
        self._members = self._dispatcher.members
        self._life = self._dispatcher.life
        self.adapters = ClusterAdapters(self._members, self.clock)
        self._journal = RequestHistory(config.decision_log)
        self._began_s = self.clock.now_s()
        self._moved: Counter[str] = Counter()  # hand-overs and KV bytes of requests that have ended
        self._pairs = Pairs()
        self.metrics.pair_speeds = lambda: self._known_pairs().speeds()

    @property
    def router_id(self) -> str:
        """Name of this router."""
        return self._identity.router_id

    @property
    def incarnation(self) -> int:
        """Number of this life of this router."""
        return self._identity.incarnation

    @property
    def members(self) -> WorkerRegistry:
        """The workers that this router knows, and the connections to them."""
        return self._members

    # ------------------------------------------------------------------ the process

    def internal_server(self, options: Sequence[tuple[str, Any]] = ()) -> grpc.aio.Server:
        """The server of the Announce service, behind its guard; not bound yet."""
        server = grpc.aio.server(options=options, interceptors=[self._guard])
        self._members.add_announce(server)
        return server

    async def start(self) -> None:
        """Start to monitor workers and deadlines. Returns at once; workers announce themselves later."""
        self._members.start()

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests (`Unavailable`, Retry-After) and wait for the running ones. False: some still run."""
        self._life.refusing = "the router is draining"
        loop = asyncio.get_running_loop()
        end_s = loop.time() + timeout_s
        while self._life.runs.open and loop.time() < end_s:
            await self._members.wait_for_change(end_s - loop.time())
        return not self._life.runs.open

    async def close(self) -> None:
        """Fail all running requests with `Unavailable` and disconnect from all workers. Idempotent."""
        self._life.refusing = "the router is stopping"
        await self.adapters.close()
        await self._dispatcher.close()
        self._journal.close()

    @property
    def refusing(self) -> str | None:
        """Reason why new requests are refused (the router drains or stops); None: they are accepted."""
        return self._life.refusing

    # ------------------------------------------------------------------ for the APIs

    async def generate(
        self, request: Request, timeline: Timeline, had: Sequence[OutputDelta] = ()
    ) -> AsyncGenerator[OutputDelta, None]:
        """Run a request; yields its pieces, without gaps per choice, `usage` with the very last one.

        `had`: pieces of it that came at another router; the rest follows them.

        `timeline` must hold ARRIVED on this flow's clock (`self.clock`); the deadline counts from there. Admission,
        routing and every refusal happen before the first piece: await it before you send a 200. `aclose()` (or
        cancelling the task that waits in it) cancels the request on its worker.

        Raises:
            ModelNotFound, ContextLengthExceeded, InvalidRequest: the request cannot be served.
            Overloaded, Unavailable: not now; both with `retry_after_s`.
            WorkerLost, TokensLost: its worker died, or skipped tokens, after the client had some.
            DeadlineExceeded: `request.timeout_s` passed.
            Cancelled: `abort`, or the client read too slowly.
        """
        timeline.mark(Instant.ARRIVED, self.clock.now_s())
        run = self._life.admit(request, timeline, self.clock.now_s())
        self.metrics.in_flight_tokens.set(self._life.admission.tokens)
        try:
            if not all(run.delivery.restore(p.choice, p.first_index, p.token_ids, p.finish_reason) for p in had):
                raise InternalError("the journaled pieces of the request have gaps")
            stream = PieceStream(run)
            self._life.begin(run, self.clock.now_s())
            while (piece := await stream.next_piece()) is not None:
                timeline.mark(Instant.FIRST_SENT, self.clock.now_s())
                yield piece
        finally:
            self._dispatcher.fail(run, Cancelled("the client went away"))  # no effect if it is settled
            self._conclude(run)

    def check_id(self, request: Request) -> None:
        """Check that the tenant has no running request of the same id.

        Raises:
            InvalidRequest: it has one.
        """
        self._life.check_id(request)

    def foresee(self, announced: Announced) -> None:
        """Refuse a request whose body is not read yet, if it would be refused in any case.

        Raises:
            Unavailable, Overloaded, DeadlineExceeded: it would be.
        """
        try:
            self._life.foresee(announced, self.clock.now_s())
        except TwostrokeError:
            self.metrics.requests.labels("rejected").inc()
            raise

    async def abort(self, tenant: str, request_id: str) -> bool:
        """Cancel a tenant's running request: its stream ends with `Cancelled`. False: there is none of that id."""
        return self._life.abort(tenant, request_id, self.clock.now_s())

    def explain(self, tenant: str, request_id: str) -> dict[str, Any] | None:
        """Report about a tenant's running or recent request, JSON-able; None: not known (any more).

        Request ids are separate for each tenant.

        Keys: request_id, name (what workers call it), tenant, isolation_domain, model, state ("running", "finished",
        "cancelled", "failed", "rejected"), num_choices, sampling, timeout_s, tokens {prompt, cached, completion},
        prefill_worker (None: prefilled locally), decode_worker, kv_bytes_moved, kv_bytes_as_bf16, handover, ttft_ms,
        itl_ms {mean, p50, max} or None, finish_reasons, error {code, message} or None, timeline {instant: ms since
        arrived, in order}, choice {reason, winner, prefill_peers, candidates}, dispatches.
        """
        run = self._life.runs.find(tenant, request_id)
        return explain_run(run, "running") if run is not None else self._journal.find(tenant, request_id)

    def cluster(self) -> dict[str, Any]:
        """Workers {worker_id, role, state, address, pid, model, load, ...}, router facts and counters, JSON-able.

        prompts: {count, tokens, tokens_squared} of all dispatched prompts, in tokens to compute.
        pairs: {prefill_worker, decode_worker, transport, reason, bytes_per_s, handovers, bytes_moved} of the pairs of
        present workers that handed over since this router began.
        supervisor: {desired, actual, action, reason, decision, events, age_s, incarnation} of its last report, or None.
        cordoned_gpus: {uuid, name, worker_id, reasons, since_s} of GPUs that workers gave up since then.
        """
        now_s = self.clock.now_s()
        admission = self._life.admission
        return {
            "workers": self._members.facts(now_s),
            "models": [model.name for model in self.models()],
            "prompts": asdict(self._members.fleet.prompts),
            "pairs": self._known_pairs().facts(),
            "cordoned_gpus": self._members.cordoned(now_s),
            "supervisor": self._members.supervision.facts(now_s),
            "router": {
                "name": self._identity.router_id,
                "router_id": self._identity.router_id,
                "incarnation": str(self._identity.incarnation),
                "pid": os.getpid(),
                "state": "draining" if self._life.refusing else "serving",
                "uptime_s": round(now_s - self._began_s, 3),
                "in_flight_requests": len(admission),
                "in_flight_tokens": admission.tokens,
                "waiting_requests": len(self._life.entrance),
                "waiting_tokens": self._life.entrance.waiting_tokens,
                "prefix_blocks": len(self._members.prefixes),
                "ttft_prediction_error": self._dispatcher.prediction.mean_ratio,
                "handovers_by_transport": {name: self._moved[f"handovers_{name}"] for name in TRANSPORTS[:-1]},
                "inner_tls": self._is_encrypted,
                "calls_refused": self._guard.refusals.total(),
                "last_refused": self._guard.last_refused,
            },
            "counters": {
                "offered": admission.offered,
                "accepted": admission.accepted,
                "rejected": admission.rejected,
                "cancelled": admission.cancelled,
                "workers_lost": self._members.fleet.num_lost,
                "prefix_gaps": self._members.prefixes.num_gaps,
                "decision_log_lines_lost": self._journal.num_lost_lines,
                "handovers": self._moved["handovers"],
                "kv_bytes_moved": self._moved["kv_bytes_moved"],
            },
        }

    def models(self) -> list[ModelFacts]:
        """Models that requests are accepted for, sorted by name: a decode worker is connected, or lost and expected.

        Adapters that such workers hold are models, too.
        """
        fleet = self._members.fleet
        accepted = {**fleet.adapters(), **fleet.expected_models()}  # a model keeps its name
        return [accepted[name] for name in sorted(accepted)]

    @property
    def is_ready(self) -> bool:
        """True if a worker that decodes is connected."""
        return bool(self._members.fleet.ready_models())

    def _known_pairs(self) -> Pairs:
        """The pairs; those of workers that are gone are forgotten first."""
        self._pairs.keep(frozenset(worker.facts.worker_id for worker in self._members.fleet))
        return self._pairs

    def _conclude(self, run: RequestState) -> None:
        """The stream is closed: record the outcome of the request."""
        if not self._life.conclude(run):
            return
        state = _state_of(run)
        self.metrics.requests.labels(state).inc()
        _measure(self.metrics, run, self.clock.now_s())
        for _, report in run.handovers:
            self._moved["handovers"] += report["bytes_moved"] > 0
            self._moved[f"handovers_{report['transport']}"] += report["bytes_moved"] > 0
            self._moved["kv_bytes_moved"] += report["bytes_moved"]
            if run.current is not None and report["prefill_worker"]:
                self._pairs.observe(PairKey(report["prefill_worker"], run.current.decode.worker_id), report)
        self._journal.add(explain_run(run, state), lambda: explain_decisions(run))
        self._members.wake()


def _new_incarnation() -> int:
    """Number of this life of a router: higher than those of its earlier lives, different from all other routers'.

    Routers may start in the same instant, so the lowest bits, 1 µs of the time, are drawn.
    """
    return time.time_ns() >> 10 << 10 | secrets.randbits(10)


def _state_of(run: RequestState) -> str:
    if run.error is None:
        return "finished"
    if isinstance(run.error, Cancelled):
        return "cancelled"
    return "failed" if run.dispatches else "rejected"


def _measure(metrics: RouterMetrics, run: RequestState, now_s: float) -> None:
    for _, report in run.handovers:
        transport = report["transport"] if report["transport"] in TRANSPORTS else "none"
        metrics.kv_bytes.labels(transport).inc(report["bytes_moved"])
        metrics.kv_bytes_as_bf16.inc(report["bytes_as_bf16"])
        metrics.refetched.inc(report["refetched_blocks"])
    for told in foretold(run):
        for outcome, num_tokens in told.outcomes.items():
            metrics.foretold_tokens.labels(told.side, outcome).inc(num_tokens)
    if run.dispatches:
        metrics.ended(run.request.worker_model, life_of(run, now_s))
