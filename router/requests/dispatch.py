"""Asyncio driver of the request lifecycle: sends its orders over sessions, runs its timers, records its events.

Decides nothing: router/requests/lifecycle.py does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from ...core.clock import Clock
from ...core.errors import TwostrokeError, Unavailable
from ...core.request import Epoch, Request
from ...kv.block import BlockIdentity
from ...protos import worker_pb2
from ..config import RouterConfig
from ..metrics import RouterMetrics
from ..routing.candidates import PolicyLimits
from ..routing.coefficients import PredictionError
from ..routing.facts import ModelFacts, WorkerKey
from ..routing.fleet import FleetChange, FleetLimits
from ..routing.views import RETRY_AFTER_S
from ..workers.registry import Identity, RegistryHandlers, WorkerRegistry
from .admission.bounds import AdmissionLimits
from .lifecycle import Lifecycle
from .pieces import OutputDelta
from .state import RequestState, Timer
from .surroundings import LifeLimits, Order

log = logging.getLogger(__name__)


class Dispatcher:
    """Drives the lifecycle of this router's requests, on one event loop."""

    def __init__(self, config: RouterConfig, identity: Identity, metrics: RouterMetrics, clock: Clock) -> None:
        self.metrics = metrics
        self.clock = clock
        self.prediction = PredictionError()
        handlers = RegistryHandlers(self._on_lost, self._on_step, self._on_change, self._on_tick)
        fleet = FleetLimits(return_s=config.worker_return_s)
        self.members = WorkerRegistry(identity, handlers, metrics, clock, fleet)
        limits = LifeLimits(
            config.worker_patience_s,
            config.worker_return_s,
            config.slow_client_s,
            config.client_buffer_pieces,
            AdmissionLimits(config.max_running, config.max_running_tokens, config.max_wait_s),
            PolicyLimits(local_prefill=config.local_prefill),
            has_buddies=config.kv_journal == "buddy",
        )
        self.life = Lifecycle(identity.incarnation, limits, self.members.roster, self, self)

    def fail(self, run: RequestState, error: TwostrokeError) -> None:
        """End a request with an error; no effect on a settled one."""
        self.life.fail(run, error, self.clock.now_s())

    async def close(self) -> None:
        """Fail all running requests and disconnect from all workers."""
        for run in list(self.life.runs.active.values()):
            self.fail(run, Unavailable("the router is stopping", retry_after_s=RETRY_AFTER_S))
        await self.members.close()

    # ------------------------------------------------------------------ events of the workers

    def _on_lost(self, change: FleetChange) -> None:
        self.life.lost(change.worker.key, change.reason, self.clock.now_s(), has_left=change.has_left)

    def _on_step(self, key: WorkerKey, output: worker_pb2.StepOutput) -> None:
        self.life.take_step(key, output, self.clock.now_s())

    def _on_change(self) -> None:
        self.life.workers_changed()

    def _on_tick(self, now_s: float) -> None:
        self.life.tick(now_s)

    # ------------------------------------------------------------------ Driver

    def send(self, key: WorkerKey, order: Order) -> bool:
        """Implements `Driver.send`."""
        return self.members.send(key, order)

    def later(self, delay_s: float, act: Callable[[float], None]) -> Timer:
        """Implements `Driver.later`."""
        return asyncio.get_running_loop().call_later(delay_s, lambda: act(self.clock.now_s()))

    def identities(self, request: Request, model: ModelFacts) -> Sequence[BlockIdentity]:
        """Implements `Driver.identities`."""
        return self.members.identities(request, model)

    # ------------------------------------------------------------------ Observer

    def choosing(self) -> AbstractContextManager[object]:
        """Implements `Observer.choosing`."""
        return self.metrics.choose_s.time()

    def refused(self, request: Request, error: TwostrokeError) -> None:
        """Implements `Observer.refused`."""
        self.metrics.requests.labels("rejected").inc()

    def dispatched(self, run: RequestState) -> None:
        """Implements `Observer.dispatched`."""
        if run.living is not None:
            log.debug("%s: %s", run.name, run.living.choice.reason)

    def dropped(self, name: str, reason: str) -> None:
        """Implements `Observer.dropped`."""
        self.metrics.dropped.labels(reason).inc()

    def heard(self, run: RequestState, epoch: Epoch, num_tokens: int) -> None:
        """Implements `Observer.heard`."""
        if num_tokens:
            self.metrics.generated(run.request.worker_model, num_tokens)

    def first_token(self, run: RequestState, predicted_ms: float, took_ms: float) -> None:
        """Implements `Observer.first_token`."""
        self.metrics.prediction_error.observe(self.prediction.note(predicted_ms, took_ms))

    def usage_differs(self, run: RequestState, said: int, had: int) -> None:
        """Implements `Observer.usage_differs`."""
        self.metrics.usage_disagreements.inc()

    def sent_again(self, run: RequestState, error: TwostrokeError) -> None:
        """Implements `Observer.sent_again`."""
        self.metrics.retries.inc()
        log.info("%s: sent again: %s", run.name, error.message)

    def settled(self, run: RequestState) -> None:
        """Implements `Observer.settled`."""
        self.metrics.in_flight_tokens.set(self.life.admission.tokens)
        self.members.wake()


class PieceStream:
    """Stream of a request's pieces for its client."""

    def __init__(self, run: RequestState) -> None:
        self._run = run
        self._news = asyncio.Event()
        run.on_news = self._news.set

    async def next_piece(self) -> OutputDelta | None:
        """Wait for the next piece; None after the last one.

        Raises:
            TwostrokeError: the request failed, and all earlier pieces were fetched.
        """
        while True:
            piece = self._run.take_piece()
            if piece is not None:
                return piece
            if self._run.error is not None:
                raise self._run.error
            if self._run.is_over:
                return None
            self._news.clear()
            await self._news.wait()
