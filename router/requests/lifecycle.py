"""Lifecycle of every request in one router, from admission to the end. Pure.

                              a worker refuses it, loses tokens, stops or is lost
                                ┌──────────────── cancel, recall, forget ────────────────┐
                                ▼                                                        │
    admit ── begin ──▶ ROUTING ── order every unfinished choice, new epoch ──▶ DISPATCHED ── all ended ──▶ SETTLED
                                │                                                        │
                                └── patience over, deadline, client left, abort, error ──┴───────────────▶ SETTLED

Events are method calls with the time; orders and timers go out through `Driver`, measurements through `Observer`
(surroundings.py). dispatch.py drives it under asyncio, sim/router.py in virtual time.
At most one dispatch of a request is current: a request that is being routed belongs to no worker, so the loss of
another worker meanwhile does not affect it.
What a client has of a choice is the end of the prompt of its next dispatch: so its stream goes on where it stopped, and
every token is computed after exactly those that the client has.
"""

from __future__ import annotations

from ...core.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    PoisonRequest,
    TokensLost,
    TwostrokeError,
    Unavailable,
    WorkerLost,
)
from ...core.request import Request, SequenceKey
from ...core.timeline import Instant, Timeline
from ...kv.messages import epoch_from_wire
from ...protos import worker_pb2
from ..routing.candidates import RoutingDecision
from ..routing.facts import WorkerKey
from ..routing.views import RETRY_AFTER_S, model_of
from .admission.entrance import Announced, Entrance
from .choosing import Chooser
from .delivery import DeliveryVerdict
from .orders import Orders
from .roster import Roster
from .state import RequestState, RequestStates, Stage
from .surroundings import Driver, LifeLimits, Observer
from .suspects import acquit, blame, forgive, rest
from .waiting import Waiting

MAX_DISPATCHES = 3  # of a request without output, but for refusals of full workers, which its patience bounds
MAX_RESUMED_DISPATCHES = 16  # of one whose client has output
MAX_ID_IN_NAME = 128  # characters of the client's id in a name, for operators who read logs
# A refusal with one of these codes concerns the worker and not the request, so another worker may be tried.
_OTHERS_MAY_TRY = frozenset({"unavailable", "overloaded", "worker_lost", "tokens_lost"})


class Lifecycle:
    """All requests of one router. Each one is admitted once, settled once and concluded once."""

    def __init__(
        self,
        incarnation: int,
        limits: LifeLimits,
        roster: Roster,
        driver: Driver,
        observer: Observer,
    ) -> None:
        """`incarnation`: of this router, higher than all of its earlier ones and different from other routers'."""
        self.runs = RequestStates()
        self.refusing: str | None = None  # reason to refuse new requests; None: accept them
        self._incarnation = incarnation
        self._limits = limits
        self._fleet = roster.fleet
        self._chooser = Chooser(self.runs.active, roster, driver, limits)
        self._driver = driver
        self._observer = observer
        self._num_admitted = 0
        self._orders = Orders(incarnation, roster.fleet, driver, observer)
        self._waiting = Waiting(driver, self._look_again)
        self.entrance = Entrance(limits.admission, driver, self._has_room, self._start)
        self.admission = self.entrance.admission

    @property
    def is_idle(self) -> bool:
        """True if no request is under way and no client's stream is open."""
        return not (self.runs.active or self.runs.open or self._waiting or self.entrance)

    # ------------------------------------------------------------------ from the client

    def foresee(self, announced: Announced, now_s: float) -> None:
        """Refuse a request whose body is not read yet, if it would be refused in any case.

        Raises:
            Unavailable, Overloaded, DeadlineExceeded: it would be.
        """
        if self.refusing is not None:
            raise Unavailable(self.refusing, retry_after_s=RETRY_AFTER_S)
        self.entrance.foresee(announced, now_s)

    def admit(self, request: Request, timeline: Timeline, now_s: float) -> RequestState:
        """Admit a request and start its deadline. `timeline` must hold ARRIVED. Call `begin` next.

        Waiting requests of lower priority, or of tenants with more of them, may be refused to make room for it.

        Raises:
            InvalidRequest: its tenant has a request of that id whose stream is open.
            ModelNotFound, ContextLengthExceeded: it cannot be served.
            Unavailable, Overloaded, DeadlineExceeded: not now, or not in time.
        """
        self.check_id(request)
        model = model_of(self._fleet, request)
        name = self._next_name(request)
        run = RequestState(name, request, timeline, model, self._limits.buffer_pieces)
        try:
            if self.refusing is not None:
                raise Unavailable(self.refusing, retry_after_s=RETRY_AFTER_S)
            expected = request.expected_tokens * self.admission.answers.mean
            answer_ms = self._chooser.least_step_ms(request.worker_model) * expected
            victims = self.entrance.admit(name, request, answer_ms, run.left_s(now_s), now_s)
        except TwostrokeError as error:
            self._observer.refused(request, error)
            raise
        for victim in victims:
            self._give_way(self.runs.active[victim], now_s)
        self.entrance.accept(name, request, now_s)
        timeline.mark(Instant.ADMITTED, now_s)
        self.runs.active[name] = self.runs.open[request.owner, request.request_id] = run
        run.deadline = self._driver.later(max(0.0, run.left_s(now_s)), lambda now_s: self._expire(run, now_s))
        return run

    def check_id(self, request: Request) -> None:
        """Raise InvalidRequest if its tenant has a request of that id whose stream is open."""
        if self.runs.find(request.owner, request.request_id) is not None:
            raise InvalidRequest(f"request_id {request.request_id!r} is in use; choose another", param="request_id")

    def begin(self, run: RequestState, now_s: float) -> None:
        """Route an admitted request to the workers with the lowest cost, when it is its turn and one is free.

        One that has output of another router had its turn there, so it does not wait again.
        """
        if run.has_output:
            self._start(run.name, now_s)
        else:
            self.entrance.wait(run.name, run.request, now_s)

    def abort(self, tenant: str, request_id: str, now_s: float) -> bool:
        """Cancel a tenant's running request. False: it has none of that id."""
        run = self.runs.find(tenant, request_id)
        if run is None or run.stage is Stage.SETTLED:
            return False
        self.fail(run, Cancelled("the request was aborted"), now_s)
        return True

    def fail(self, run: RequestState, error: TwostrokeError, now_s: float) -> None:
        """End a request with an error; no effect on a settled one."""
        if run.stage is Stage.SETTLED:
            return
        self._orders.cancel(run, error.code)
        run.fail(error)
        self._settle(run, now_s)
        run.on_news()

    def conclude(self, run: RequestState) -> bool:
        """Record that the client's stream is closed. False: it was closed before."""
        return self.runs.open.pop((run.request.owner, run.request_id), None) is not None

    # ------------------------------------------------------------------ from the workers

    def take_step(self, key: WorkerKey, output: worker_pb2.StepOutput, now_s: float) -> None:
        """Take the output of one worker's step for all our requests."""
        for taken in output.taken:
            run = self._run_from(key, taken.request_id)
            if run is not None and not run.order_taken(taken):
                self._observer.dropped(run.name, DeliveryVerdict.STALE_EPOCH.value)
        for tokens in output.tokens:
            run = self._run_from(key, tokens.request_id)
            if run is not None:
                self._take_tokens(run, tokens, now_s)
        for end in output.ends:
            run = self._run_from(key, end.request_id)
            if run is not None:
                self._take_end(run, end, now_s)

    def lost(self, key: WorkerKey, reason: str, now_s: float, *, has_left: bool = False) -> None:
        """A worker is lost: its requests go on elsewhere, but for one that it was lost by, as an earlier one was.

        `has_left`: it had said before that it leaves, so no request is to blame.
        """
        active = self.runs.active.values()
        forgive(active, self._fleet.lives)
        guilty = None if has_left else blame(key, active, now_s)
        if guilty is not None and guilty.suspicion is not None:
            names = ", ".join(one.worker_id for one in (*guilty.suspicion.workers, key))
            poison = f"the workers {names} were lost with this request; it is not given to another one"
            rest(active, now_s)
            self.fail(guilty, PoisonRequest(poison), now_s)
        for run in self.runs.on(key):
            error = WorkerLost(f"worker {key.worker_id} was lost: {reason}", retry_after_s=RETRY_AFTER_S)
            self._send_again_or_fail(run, error, now_s, is_lost=True, has_left=has_left)

    def workers_changed(self) -> None:
        """Workers or their load changed: waiting requests are routed again."""
        self._waiting.wake()
        self.entrance.wake()

    def tick(self, now_s: float) -> None:
        """Cancel the requests of clients that do not read; use what is known of free workers, and of those back."""
        self.entrance.wake()
        if forgive(self.runs.active.values(), self._fleet.lives):
            self.workers_changed()  # suspects that wait may be sent now
        patience_s = self._limits.slow_client_s
        for run in list(self.runs.active.values()):
            if run.is_slow(now_s, patience_s):
                self.fail(run, Cancelled(f"the client left its buffer full for {patience_s:g} s"), now_s)

    # ------------------------------------------------------------------ out

    def _next_name(self, request: Request) -> str:
        """Name unique over tenants, routers and their incarnations: no client's id contains '@'."""
        self._num_admitted += 1
        return f"{request.request_id[:MAX_ID_IN_NAME]}@{self._incarnation:x}.{self._num_admitted:x}"

    def _has_room(self, name: str) -> bool:
        return self._chooser.has_room(self.runs.active[name])

    def _start(self, name: str, now_s: float) -> None:
        run = self.runs.active[name]
        run.waits_since_s = now_s
        self._route(run, now_s)

    def _give_way(self, run: RequestState, now_s: float) -> None:
        """Refuse a waiting request, because one that comes before it takes its place."""
        retry_s = self.admission.retry_after_s(self.entrance.waiting_tokens, now_s)
        what = "a request of higher priority, or of a tenant with fewer that wait, has its place in the queue"
        self.fail(run, Overloaded(what, retry_after_s=retry_s), now_s)

    def _route(self, run: RequestState, now_s: float) -> None:
        while run.stage is Stage.ROUTING:
            choice = self._choose(run, now_s)
            if choice is None:
                if run.dispatches or self._chooser.has_room(run):
                    self._wait(run, now_s)
                else:  # it left the queue when there was no worker at all; now there is one, and it is full
                    self.entrance.wait(run.name, run.request, now_s)
                return
            terms = choice.winner.terms
            if not (run.dispatches or run.has_output):
                try:
                    step_ms, left_s = self._chooser.step_ms(choice), run.left_s(now_s)
                    answer_ms = step_ms * run.facts.expected_tokens * self.admission.answers.mean
                    run.predicted = (terms.first_token_ms, step_ms)
                    self.admission.check_deadline(
                        terms.first_token_ms, terms.prefill_ms, left_s, answer_ms, others=bool(self.entrance)
                    )
                except TwostrokeError as error:
                    self.fail(run, error, now_s)
                    return
            if not self._orders.dispatch(run, choice, now_s):
                self._recall(run, Unavailable("its worker takes no orders"), now_s)

    def _choose(self, run: RequestState, now_s: float) -> RoutingDecision | None:
        with self._observer.choosing():
            return self._chooser.choose(run, now_s)

    def _wait(self, run: RequestState, now_s: float) -> None:
        """No worker can take the request now: wait for one, or fail."""
        look_s = self._chooser.next_look_s(run, now_s)
        if look_s is None:
            nobody = Unavailable(
                f"no worker for {run.request.model!r} can take the request now", retry_after_s=RETRY_AFTER_S
            )
            self.fail(run, run.cause or nobody, now_s)  # after a retry report its cause, not the lack of workers
            return
        self._waiting.add(run.name, look_s - now_s, lambda now_s: self._look_again(run.name, now_s))

    def _look_again(self, name: str, now_s: float) -> None:
        if self._waiting.remove(name):
            self._route(self.runs.active[name], now_s)

    # ------------------------------------------------------------------ back

    def _run_from(self, key: WorkerKey, name: str) -> RequestState | None:
        run = self.runs.active.get(name)
        if run is None:
            self._observer.dropped(name, "unknown_request")
        elif run.living is None or run.living.decode != key:
            self._observer.dropped(name, "wrong_worker")
            return None
        return run

    def _take_tokens(self, run: RequestState, tokens: worker_pb2.TokenOutput, now_s: float) -> None:
        is_first = run.delivery.completion_tokens == 0
        verdict = run.take_tokens(tokens, now_s)
        if verdict is not DeliveryVerdict.TAKE:
            self._observer.dropped(run.name, verdict.value)
            if verdict is DeliveryVerdict.GAP:
                lost = TokensLost("a worker skipped tokens", retry_after_s=RETRY_AFTER_S)
                self._send_again_or_fail(run, lost, now_s)
            return
        self._observer.heard(run, epoch_from_wire(tokens.epoch), len(tokens.token_ids))
        if run.living is not None and tokens.first_index == run.living.begins_with(tokens.choice):
            self._fleet.first_token(SequenceKey(run.name, tokens.choice))
        if is_first:
            self.entrance.wake()  # its prompt is computed: there is room for the next one
        if is_first and run.living is not None:
            predicted_ms = run.living.choice.winner.terms.first_token_ms
            self._observer.first_token(run, predicted_ms, (now_s - run.living.at_s) * 1e3)
        self._acquit(run)
        run.on_news()

    def _take_end(self, run: RequestState, end: worker_pb2.RequestEnd, now_s: float) -> None:
        outcome = run.take_end(end, now_s)
        if isinstance(outcome, DeliveryVerdict) and outcome is not DeliveryVerdict.TAKE:
            self._observer.dropped(run.name, outcome.value)
            return
        self._observer.heard(run, epoch_from_wire(end.epoch), 0)
        if isinstance(outcome, TwostrokeError):
            if outcome.code in _OTHERS_MAY_TRY:
                self._send_again_or_fail(run, outcome, now_s)
            else:
                self.fail(run, outcome, now_s)
            return
        self._fleet.ended(SequenceKey(run.name, end.choice))
        had = run.delivery.tokens_of(end.choice)
        if end.usage.completion_tokens != had:
            self._observer.usage_differs(run, end.usage.completion_tokens, had)
        self._acquit(run)
        if not run.delivery.unfinished:
            self._settle(run, now_s)
        run.on_news()

    def _acquit(self, run: RequestState) -> None:
        if acquit(run):
            self.workers_changed()  # the next suspect may take its place

    # ------------------------------------------------------------------ again, or over

    def _send_again_or_fail(
        self, run: RequestState, error: TwostrokeError, now_s: float, *, is_lost: bool = False, has_left: bool = False
    ) -> None:
        """Route the request again, after what its client has of it; if the bounds forbid it, fail it with `error`.

        `is_lost`: its worker was lost, not refusing, and may come back. `has_left`: it had said before that it leaves.
        """
        most = MAX_RESUMED_DISPATCHES if run.has_output else MAX_DISPATCHES
        # The budget is for requests that a client could send again itself; a worker that drains refuses none of them.
        # A suspect waits for its turn, also behind those of other routers.
        drains = has_left or self._drains(run)
        is_free = is_lost or run.has_output or run.suspicion is not None or drains
        if (not drains and run.num_tries >= most) or not (is_free or self.admission.may_retry()):
            self.fail(run, error, now_s)
            return
        self._recall(run, error, now_s, may_return=is_lost, drains=drains)
        run.cause = error
        if run.has_output or not isinstance(error, Overloaded):
            run.waits_since_s = now_s  # else its patience with full workers would begin anew at each of them
        self._observer.sent_again(run, error)
        # Not at once: the caller is still handling a worker's messages or its loss.
        self._waiting.add(run.name, 0.0, lambda now_s: self._look_again(run.name, now_s))
        if run.suspicion is not None:
            self.workers_changed()  # another suspect may take its place

    def _drains(self, run: RequestState) -> bool:
        """True if the request's decode worker drains, so that it gives its work back on purpose."""
        if run.living is None:
            return False
        worker = self._fleet.get(run.living.decode.worker_id)  # that life of it: the next one has no run of it
        return worker is not None and worker.draining

    def _recall(
        self,
        run: RequestState,
        error: TwostrokeError,
        now_s: float,
        *,
        may_return: bool = False,
        drains: bool = False,
    ) -> None:
        """Take a request back from its worker, which gets a cancel and is not chosen for it soon.

        `may_return`: the worker's session broke, so no cancel reaches it. It may get the request once more when it is
        back, under a higher epoch, which ends the older run there.
        """
        assert run.living is not None
        worker = run.living.decode
        self._orders.cancel(run, "sent elsewhere")
        run.recall(error, now_s, drains=drains)  # a token under way now would come from the next worker once more
        self._orders.forget(run)
        if not may_return:
            run.exclude(worker, error, now_s)

    def _expire(self, run: RequestState, now_s: float) -> None:
        self.fail(run, DeadlineExceeded(f"the request's timeout of {run.request.timeout_s:g} s passed"), now_s)

    def _learn(self, run: RequestState, now_s: float) -> None:
        """Compare what was predicted of a request with what it had and how long it took."""
        num_choices, generated = run.request.num_choices, run.delivery.completion_tokens
        first_ms, step_ms = run.predicted
        if len(run.dispatches) == 1 and step_ms and (run.error is None or isinstance(run.error, DeadlineExceeded)):
            had = generated / num_choices
            whole = had if run.error is None else max(had, run.request.expected_tokens * self.admission.answers.mean)
            took_ms = (now_s - run.dispatches[0].at_s) * 1e3 + step_ms * (whole - had)
            self.admission.timing.note(first_ms + step_ms * whole, took_ms)
        if run.error is None:
            self.admission.answers.note(generated, num_choices * run.request.expected_tokens)

    def _settle(self, run: RequestState, now_s: float) -> None:
        """No more output is expected from workers: free the request's resources in this router."""
        run.stage = Stage.SETTLED
        run.timeline.mark(Instant.FINISHED, now_s)
        self._waiting.remove(run.name)
        self.entrance.leave(run.name, now_s)
        if run.deadline is not None:
            run.deadline.cancel()
        self._orders.forget(run)
        del self.runs.active[run.name]
        cancelled = isinstance(run.error, Cancelled)
        served = bool(run.dispatches)
        if run.error is not None and not served and not cancelled:
            self.admission.reject(run.name, now_s)
        else:
            self.admission.release(run.name, now_s, cancelled, served=served)
        self._learn(run, now_s)
        self.entrance.settled(run.request, run.delivery.completion_tokens, now_s, served=served)
        self._observer.settled(run)
        self.workers_changed()
