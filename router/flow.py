"""The life of a request in the router: admitted, routed, dispatched, streamed, ended, explained.

Knows no client protocol. What decides is elsewhere and pure: admission, policy, prefixes, fleet, delivery.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator
from typing import Any

import grpc.aio

from ..core.clock import Clock, MonotonicClock
from ..core.errors import (
    Cancelled,
    ContextLengthExceeded,
    InvalidRequest,
    ModelNotFound,
    TwostrokeError,
    Unavailable,
)
from ..core.request import Request, Role
from ..core.timeline import Instant, Timeline
from .admission import Offer
from .config import RouterConfig
from .dispatch import RETRY_AFTER_S, Dispatcher
from .explain import explain_run
from .facts import ModelFacts
from .journal import Journal
from .life import life_of
from .members import Identity
from .metrics import TRANSPORTS, RouterMetrics
from .pieces import Piece
from .run import Run


class Flow:
    """Takes admitted requests through the workers. One per router process, on one event loop.

    Faces call `generate`, `abort`, `explain`, `cluster`, `models`; the process calls `add_announce` for its internal
    server, then `start`, and at the end `drain` and `close`.
    """

    def __init__(
        self,
        config: RouterConfig,
        identity_key: bytes,
        metrics: RouterMetrics | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`identity_key` names prompts as the workers do: `kv.keys.identity_key` of the cluster's shared secret.

        `metrics` is what the face serves on /metrics; none: a registry of its own, see `self.metrics.registry`.
        """
        self.metrics = metrics or RouterMetrics()
        self.clock = clock or MonotonicClock()
        self._config = config
        # Only the order of incarnations matters: a restarted router must be above its former self.
        self._identity = Identity(f"router-{os.getpid()}", time.time_ns(), identity_key)
        self._dispatcher = Dispatcher(config, self._identity, self.metrics, self.clock)
        self._members = self._dispatcher.members
        self._admission = self._dispatcher.admission
        self._runs = self._dispatcher.runs
        self._journal = Journal(config.decision_log)
        self._began_s = self.clock.now_s()
        self._refusing: str | None = None

    # ------------------------------------------------------------------ the process

    def add_announce(self, server: grpc.aio.Server) -> None:
        """Register the Announce service, by which workers come, on the router's internal server."""
        self._members.add_announce(server)

    async def start(self) -> None:
        """Begin to watch over workers and deadlines. Returns at once; workers announce themselves later."""
        self._members.start()

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests (`Unavailable`, Retry-After) and wait for the running ones. False: some still run."""
        self._refusing = "the router is draining"
        loop = asyncio.get_running_loop()
        end_s = loop.time() + timeout_s
        while self._runs.open and loop.time() < end_s:
            await self._members.wait_for_change(end_s - loop.time())
        return not self._runs.open

    async def close(self) -> None:
        """Cancel what still runs (their clients get `Unavailable`) and leave all workers. Idempotent."""
        self._refusing = "the router is stopping"
        await self._dispatcher.close()
        self._journal.close()

    @property
    def refusing(self) -> str | None:
        """Why new requests are refused: the router drains or stops."""
        return self._refusing

    # ------------------------------------------------------------------ the faces

    async def generate(self, request: Request, timeline: Timeline) -> AsyncGenerator[Piece, None]:
        """Run a request; the stream of its pieces, gapless per choice, `usage` with the very last one.

        `timeline` must hold ARRIVED on this flow's clock (`self.clock`); the deadline counts from there. Admission,
        routing and every refusal happen before the first piece: await it before a 200 goes out. `aclose()` (or
        cancelling the task that waits in it) cancels the request on its worker.

        Raises:
            ModelNotFound, ContextLengthExceeded, InvalidRequest: the request cannot be served.
            Overloaded, Unavailable: not now; both with `retry_after_s`.
            WorkerLost, TokensLost: its worker died, or skipped tokens, after the client had some.
            DeadlineExceeded: `request.timeout_s` passed.
            Cancelled: `abort`, or the client read too slowly.
        """
        timeline.mark(Instant.ARRIVED, self.clock.now_s())
        run = self._admit(request, timeline)
        try:
            await self._dispatcher.route(run)
            while (piece := await run.next_piece()) is not None:
                timeline.mark(Instant.FIRST_SENT, self.clock.now_s())
                yield piece
        except TwostrokeError as error:
            self._dispatcher.fail(run, error)
            raise
        finally:
            self._dispatcher.fail(run, Cancelled("the client went away"))  # nothing, if it is settled
            self._conclude(run)

    async def abort(self, request_id: str) -> bool:
        """Cancel a running request: its stream ends in `Cancelled`. False: no such request runs here."""
        run = self._runs.active.get(request_id)
        if run is None:
            return False
        self._dispatcher.fail(run, Cancelled("the request was aborted"))
        return True

    def explain(self, request_id: str) -> dict[str, Any] | None:
        """Everything known about a running or recent request, JSON-able; None: not known (any more).

        Keys: request_id, tenant, isolation_domain, model, state ("running", "finished", "cancelled", "failed",
        "rejected"), num_choices, sampling, timeout_s, tokens {prompt, cached, completion}, prefill_worker (None:
        prefilled locally), decode_worker, kv_bytes_moved, kv_bytes_as_bf16, handover, ttft_ms, itl_ms {mean, p50, max}
        or None, finish_reasons, error {code, message} or None, timeline {instant: ms since arrived, in order},
        choice {reason, winner, prefill_peers, candidates}, dispatches.
        """
        run = self._runs.open.get(request_id)
        return explain_run(run, "running") if run is not None else self._journal.find(request_id)

    def cluster(self) -> dict[str, Any]:
        """Workers {worker_id, role, state, address, pid, model, load, ...}, router facts and counters, JSON-able."""
        now_s = self.clock.now_s()
        admission = self._admission
        return {
            "workers": self._members.facts(now_s),
            "models": [model.name for model in self.models()],
            "router": {
                "router_id": self._identity.router_id,
                "incarnation": str(self._identity.incarnation),
                "pid": os.getpid(),
                "state": "draining" if self._refusing else "serving",
                "uptime_s": round(now_s - self._began_s, 3),
                "in_flight_requests": len(admission),
                "in_flight_tokens": admission.tokens,
                "prefix_blocks": len(self._members.prefixes),
                "ttft_prediction_error": self._dispatcher.prediction.mean_ratio,
                "kv_transport": "grpc",
            },
            "counters": {
                "offered": admission.offered,
                "accepted": admission.accepted,
                "rejected": admission.rejected,
                "cancelled": admission.cancelled,
                "workers_lost": self._members.fleet.num_lost,
                "prefix_gaps": self._members.prefixes.num_gaps,
                "decision_log_lines_lost": self._journal.num_lost_lines,
            },
        }

    def models(self) -> list[ModelFacts]:
        """What can be served now, by name: a worker that decodes is connected. `path`: tokenizer and template."""
        ready = self._members.fleet.ready_models()
        return [ready[name] for name in sorted(ready)]

    # ------------------------------------------------------------------ in

    def _admit(self, request: Request, timeline: Timeline) -> Run:
        now_s = self.clock.now_s()
        if request.request_id in self._runs.open:
            raise InvalidRequest(f"request_id {request.request_id!r} is in use; choose another", param="request_id")
        model = self._model_of(request)
        tokens = request.num_choices * (len(request.prompt_ids) + request.expected_tokens)
        offer = Offer(request.request_id, request.owner, tokens, request.timeout_s)
        try:
            if self._refusing:
                raise Unavailable(self._refusing, retry_after_s=RETRY_AFTER_S)
            self._admission.offer(offer, now_s)
        except TwostrokeError:
            self.metrics.requests.labels("rejected").inc()
            raise
        timeline.mark(Instant.ADMITTED, now_s)
        run = Run(request, timeline, model, self._config.client_buffer_pieces)
        self._dispatcher.take(run)
        self.metrics.in_flight_tokens.set(self._admission.tokens)
        return run

    def _model_of(self, request: Request) -> ModelFacts:
        models = self._members.fleet.models()
        if not models:
            raise Unavailable("no worker has announced itself yet", retry_after_s=RETRY_AFTER_S)
        model = models.get(request.model)
        if model is None:
            raise ModelNotFound(
                f"no worker serves {request.model!r}; known: {', '.join(sorted(models))}", param="model"
            )
        needed = len(request.prompt_ids) + request.sampling.max_tokens
        decoding = [w for w in self._members.fleet if w.facts.model.name == model.name and w.role is not Role.PREFILL]
        room = max((w.facts.num_kv_tokens for w in decoding), default=needed)  # none: it waits for one
        bound = min(room, model.max_model_len or room)
        if not request.prompt_ids:
            raise InvalidRequest("the prompt has no tokens", param="prompt")
        if needed > bound:
            what = f"{len(request.prompt_ids)} prompt tokens and {request.sampling.max_tokens} asked for"
            raise ContextLengthExceeded(f"{what} make {needed}; at most {bound} fit", param="max_tokens")
        return model

    def _conclude(self, run: Run) -> None:
        """The stream is closed: write down what became of the request."""
        if self._runs.open.pop(run.request_id, None) is None:
            return
        state = _state_of(run)
        self.metrics.requests.labels(state).inc()
        _measure(self.metrics, run, self.clock.now_s())
        self._journal.add(explain_run(run, state))
        self._members.wake()


def _state_of(run: Run) -> str:
    if run.error is None:
        return "finished"
    if isinstance(run.error, Cancelled):
        return "cancelled"
    return "failed" if run.dispatches else "rejected"


def _measure(metrics: RouterMetrics, run: Run, now_s: float) -> None:
    for _, report in run.handovers:
        transport = report["transport"] if report["transport"] in TRANSPORTS else "none"
        metrics.kv_bytes.labels(transport).inc(report["bytes_moved"])
        metrics.kv_bytes_as_bf16.inc(report["bytes_as_bf16"])
        metrics.refetched.inc(report["refetched_blocks"])
    if run.dispatches:
        metrics.ended(run.request.model, life_of(run, now_s))
