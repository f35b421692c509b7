"""Admitted requests to workers and back: ordered, heard, sent again, settled. Knows no client and no face."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import Any

from ..core.clock import Clock
from ..core.errors import Cancelled, DeadlineExceeded, TokensLost, TwostrokeError, Unavailable, WorkerLost
from ..core.request import Epoch, SequenceKey
from ..core.timeline import Instant
from ..kv.messages import epoch_to_wire
from ..protos import worker_pb2
from .admission import Admission, AdmissionLimits
from .coefficients import PredictionError
from .config import RouterConfig
from .delivery import Verdict
from .facts import WorkerKey
from .members import Identity, MemberHandlers, Members
from .metrics import RouterMetrics
from .policy import Choice, PolicyLimits, choose
from .run import Dispatch, Run, Runs
from .views import count_work
from .wire import submit_to_wire

log = logging.getLogger(__name__)

RETRY_AFTER_S = 1.0
MAX_DISPATCHES = 3
# A worker that refuses an order with one of these has not judged the request, only itself.
_OTHERS_MAY_TRY = frozenset({"unavailable", "overloaded", "worker_lost", "tokens_lost"})


class Dispatcher:
    """Owns every request that workers still owe something. Each one leaves through `fail` or by itself, once."""

    def __init__(self, config: RouterConfig, identity: Identity, metrics: RouterMetrics, clock: Clock) -> None:
        self.metrics = metrics
        self.clock = clock
        self.admission = Admission(AdmissionLimits(config.max_running, config.max_running_tokens))
        self.runs = Runs()
        self.prediction = PredictionError()
        handlers = MemberHandlers(self._on_lost, self._on_step, self._on_tick)
        self.members = Members(identity, handlers, metrics, clock)
        self._config = config
        self._policy = PolicyLimits(local_prefill=config.local_prefill)
        self._incarnation = identity.incarnation
        self._num_dispatched = 0  # over all requests: a client may use a request's id again
        self._tasks: set[asyncio.Task[None]] = set()

    def take(self, run: Run) -> None:
        """An admitted request is ours from now on; its deadline runs."""
        self.runs.active[run.request_id] = self.runs.open[run.request_id] = run
        left_s = max(0.0, run.left_s(self.clock.now_s()))
        run.deadline = asyncio.get_running_loop().call_later(left_s, self._expire, run)

    async def close(self) -> None:
        """Fail what still runs and leave all workers."""
        for run in list(self.runs.active.values()):
            self.fail(run, Unavailable("the router is stopping", retry_after_s=RETRY_AFTER_S))
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.members.close()

    # ------------------------------------------------------------------ out

    async def route(self, run: Run) -> None:
        """Send a request to the workers that will be quickest; wait a moment for one that comes.

        Raises:
            Unavailable, Overloaded, DeadlineExceeded: nobody can serve it, or not in time.
        """
        patience_end_s = self.clock.now_s() + self._config.worker_patience_s
        while run.error is None:
            now_s = self.clock.now_s()
            choice = self._choose(run, now_s)
            if choice is not None:
                if not run.dispatches:
                    terms = choice.winner.terms
                    self.admission.check_deadline(terms.first_token_ms, terms.prefill_ms, run.left_s(now_s))
                if self._dispatch(run, choice):
                    return
                continue  # that worker is excluded now
            if now_s >= patience_end_s or not self.members.fleet.may_serve_soon(run.request.model):
                raise Unavailable(
                    f"no worker for {run.request.model!r} can take the request now", retry_after_s=RETRY_AFTER_S
                )
            await self.members.wait_for_change(patience_end_s - now_s)

    def _choose(self, run: Run, now_s: float) -> Choice | None:
        began_s = time.perf_counter()
        request = run.request
        views = self.members.views(request.model, run.excluded)
        identities = self.members.identities(request, run.model)
        usable = identities if request.sampling.prompt_logprobs is None else []  # a scored prompt is computed anew
        held = self.members.prefixes.expected(usable, now_s)
        choice = choose(run.facts, views, held, self._policy)
        if choice is not None:
            # Siblings may wait behind it where it is computed. Where it is handed to, it helps nobody yet.
            computes = choice.winner.prefill or choice.winner.decode
            self.members.prefixes.predict([computes.worker_id], identities, now_s)
            log.debug("%s: %s", request.request_id, choice.reason)
        self.metrics.choose_s.observe(time.perf_counter() - began_s)
        return choice

    def _dispatch(self, run: Run, choice: Choice) -> bool:
        """Order every unfinished choice from the chosen worker, under a new epoch. False: its session is down."""
        now_s = self.clock.now_s()
        self._num_dispatched += 1
        epoch = Epoch(self._incarnation, self._num_dispatched)
        dispatch = Dispatch(epoch, choice, now_s)
        unfinished = run.delivery.dispatch(epoch)
        run.dispatches.append(dispatch)
        run.timeline.mark(Instant.ROUTED, now_s)
        for index in unfinished:
            order = submit_to_wire(run.request, index, epoch, choice.prefill_peers, run.left_s(now_s))
            if not self.members.send(dispatch.decode, worker_pb2.SessionUp(submit=order)):
                run.excluded.add(dispatch.decode)
                self._forget_work(run)
                return False
            count_work(self.members.fleet, run.facts, index, choice, now_s)
        return True

    # ------------------------------------------------------------------ back

    def _on_step(self, key: WorkerKey, output: worker_pb2.StepOutput) -> None:
        """Everything one worker's step produced for all our requests."""
        now_s = self.clock.now_s()
        for tokens in output.tokens:
            run = self._run_from(key, tokens.request_id)
            if run is not None:
                self._take_tokens(run, tokens, now_s)
        for end in output.ends:
            run = self._run_from(key, end.request_id)
            if run is not None:
                self._take_end(run, end, now_s)

    def _run_from(self, key: WorkerKey, request_id: str) -> Run | None:
        run = self.runs.active.get(request_id)
        if run is None:
            self.metrics.dropped.labels("unknown_request").inc()
        elif run.current is None or run.current.decode != key:
            self.metrics.dropped.labels("wrong_worker").inc()
            return None
        return run

    def _take_tokens(self, run: Run, tokens: worker_pb2.TokenOutput, now_s: float) -> None:
        is_first = run.delivery.completion_tokens == 0
        verdict = run.take_tokens(tokens, now_s)
        if verdict is not Verdict.TAKE:
            self.metrics.dropped.labels(verdict.value).inc()
            if verdict is Verdict.GAP:
                self._retry_or_fail(run, TokensLost("a worker skipped tokens", retry_after_s=RETRY_AFTER_S))
            return
        self.metrics.generated(run.request.model, len(tokens.token_ids))
        if tokens.first_index == 0:
            self.members.fleet.first_token(SequenceKey(run.request_id, tokens.choice))
        if is_first and run.current is not None:
            predicted_ms = run.current.choice.winner.terms.first_token_ms
            ratio = self.prediction.note(predicted_ms, (now_s - run.current.at_s) * 1e3)
            self.metrics.prediction_error.observe(ratio)

    def _take_end(self, run: Run, end: worker_pb2.RequestEnd, now_s: float) -> None:
        outcome = run.take_end(end, now_s)
        if isinstance(outcome, TwostrokeError):
            self._forget_work(run)
            if outcome.code in _OTHERS_MAY_TRY:
                self._retry_or_fail(run, outcome)
            else:
                self.fail(run, outcome)
        elif outcome is not Verdict.TAKE:
            self.metrics.dropped.labels(outcome.value).inc()
        else:
            self.members.fleet.ended(SequenceKey(run.request_id, end.choice))
            if end.usage.completion_tokens != run.delivery.tokens_of(end.choice):
                self.metrics.usage_disagreements.inc()
            if not run.delivery.unfinished:
                self._settle(run, cancelled=False)

    def _on_lost(self, key: WorkerKey, reason: str) -> None:
        """A worker is lost: those of its requests that gave nothing yet go elsewhere, the others end now."""
        for run in self.runs.on(key):
            error = WorkerLost(f"worker {key.worker_id} was lost: {reason}", retry_after_s=RETRY_AFTER_S)
            self._retry_or_fail(run, error)

    def _on_tick(self, now_s: float) -> None:
        patience_s = self._config.slow_client_s
        for run in list(self.runs.active.values()):
            if run.is_slow(now_s, patience_s):
                self.fail(run, Cancelled(f"the client left its buffer full for {patience_s:g} s"))

    def _expire(self, run: Run) -> None:
        self.fail(run, DeadlineExceeded(f"the request's timeout of {run.request.timeout_s:g} s passed"))

    # ------------------------------------------------------------------ again, or over

    def _retry_or_fail(self, run: Run, error: TwostrokeError) -> None:
        """Send it to another worker if its client has nothing yet and the budget allows; else it ends in `error`."""
        current = run.current
        assert current is not None
        may_retry = run.delivery.may_start_over and len(run.dispatches) < MAX_DISPATCHES
        if not may_retry or not self.admission.may_retry():
            self.fail(run, error)
            return
        self._cancel_on_worker(run, "sent elsewhere")
        run.delivery.recall()  # a token that is under way now would make starting over impossible
        self._forget_work(run)
        run.excluded.add(current.decode)
        self.metrics.retries.inc()
        log.info("%s: sent again: %s", run.request_id, error.message)
        self._spawn(self._route_again(run, error))

    async def _route_again(self, run: Run, error: TwostrokeError) -> None:
        try:
            await self.route(run)
        except TwostrokeError:
            self.fail(run, error)  # what happened, not that nobody else was there

    def fail(self, run: Run, error: TwostrokeError) -> None:
        """End a request in an error; a settled one stays as it is."""
        if run.settled:
            return
        self._cancel_on_worker(run, error.code)
        run.fail(error)
        self._settle(run, cancelled=isinstance(error, Cancelled))

    def _cancel_on_worker(self, run: Run, reason: str) -> None:
        current = run.current
        if current is not None:
            order = worker_pb2.CancelRequest(
                request_id=run.request_id, epoch=epoch_to_wire(current.epoch), reason=reason
            )
            self.members.send(current.decode, worker_pb2.SessionUp(cancel=order))

    def _forget_work(self, run: Run) -> None:
        for index in range(run.request.num_choices):
            self.members.fleet.ended(SequenceKey(run.request_id, index))

    def _settle(self, run: Run, cancelled: bool) -> None:
        """Nothing more is expected from workers: give back what the request holds here."""
        run.settled = True
        now_s = self.clock.now_s()
        run.timeline.mark(Instant.FINISHED, now_s)
        if run.deadline is not None:
            run.deadline.cancel()
        self._forget_work(run)
        del self.runs.active[run.request_id]
        if run.error is not None and not run.dispatches and not cancelled:
            self.admission.reject(run.request_id, now_s)
        else:
            self.admission.release(run.request_id, now_s, cancelled)
        self.metrics.in_flight_tokens.set(self.admission.tokens)
        self.members.wake()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
