"""A router process in virtual time: what router/flow.py, dispatch.py and members.py do around the pure parts.

Fleet, prefix map, policy, admission, delivery and run are production's. Knows no client but its stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..core.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    TokensLost,
    TwostrokeError,
    Unavailable,
    WorkerLost,
)
from ..core.request import Epoch, Request, SequenceKey
from ..core.timeline import Instant, Timeline
from ..kv.block import BlockIdentity, chain
from ..kv.messages import epoch_from_wire, epoch_to_wire
from ..protos import worker_pb2
from ..router.admission import Admission, AdmissionLimits, Offer
from ..router.delivery import Verdict
from ..router.dispatch import _OTHERS_MAY_TRY, MAX_DISPATCHES
from ..router.facts import WorkerFacts, WorkerKey
from ..router.fleet import Change, Fleet, FleetChange
from ..router.policy import Choice, PolicyLimits, choose
from ..router.prefixes import PrefixMap
from ..router.run import Dispatch, Run
from ..router.views import count_work, views_of
from ..router.wire import submit_to_wire
from .engine import IDENTITY_KEY, root_of
from .invariants import Violation
from .links import Link
from .network import End, Network
from .setting import Setting
from .workers import MODEL, ROUTER_MODEL, WorkerNode
from .world import Process, Timer, World

TICK_S = 0.2


def identities_of(request: Request) -> list[BlockIdentity]:
    """The prompt's chain as every worker names it."""
    return chain(IDENTITY_KEY, root_of(request.isolation_domain).digest(IDENTITY_KEY), request.prompt_ids)


@dataclass(slots=True, eq=False)
class Waiting:
    """A request for which nobody is there just now."""

    run: Run
    until_s: float
    error: TwostrokeError | None  # of the dispatch before


class RouterNode:
    """One life of the router."""

    def __init__(self, world: World, network: Network, process: Process, setting: Setting) -> None:
        self.world, self.network, self.process, self.setting = world, network, process, setting
        self.fleet = Fleet(setting.fleet)
        self.prefixes = PrefixMap(max_entries=200)
        self.admission = Admission(AdmissionLimits(max_requests=setting.max_requests))
        self.links: dict[WorkerKey, Link] = {}
        self.find: Callable[[str], WorkerNode]  # by worker id, whoever lives there now
        self.active: dict[str, Run] = {}
        self.open: dict[str, Run] = {}
        self._ends: dict[str, End] = {}
        self._deadlines: dict[str, Timer] = {}
        self._waiting: list[Waiting] = []
        self._num_dispatched = 0
        self._policy = PolicyLimits(local_prefill=setting.local_prefill)
        self._tick()

    def later(self, delay_s: float, act: Callable[[], None]) -> Timer:
        """In this life of this process."""
        return self.world.after(delay_s, self.process, act)

    # ------------------------------------------------------------------ workers

    def announced(self, facts: WorkerFacts) -> None:
        """A worker says that it is there."""
        self.apply(self.fleet.announced(facts, self.world.now_s()))

    def session_up(self, key: WorkerKey) -> None:
        """A worker welcomed us."""
        self.fleet.session_up(key, None, self.world.now_s())
        self._wake()

    def apply(self, changes: list[FleetChange]) -> None:
        """As members.py: connect, reset, forget; and tell the requests."""
        for change in changes:
            key = change.worker.key
            self.world.note(self.process, f"{key.worker_id}.{key.incarnation} {change.change.value}: {change.reason}")
            if change.change is Change.CONNECT:
                self.links[key] = Link(self, key)
                continue
            if change.change is Change.LOST and key in self.links:
                self.links[key].reset()
            elif change.change is Change.GONE and key in self.links:
                self.links.pop(key).close()
                self.prefixes.leave(key.worker_id)
            for run in [run for run in self.active.values() if run.current and run.current.decode == key]:
                self._retry_or_fail(run, WorkerLost(f"worker {key.worker_id} was lost", retry_after_s=1.0))
        if changes:
            self._wake()

    def take_event(self, key: WorkerKey, event: worker_pb2.WatchEvent) -> bool:
        """News of a prefix cache. False: watch again."""
        if key not in self.links or event.incarnation != key.incarnation:
            return False
        if event.HasField("snapshot"):
            piece = event.snapshot
            return self.prefixes.snapshot(key.worker_id, event.sequence, piece.identities, piece.last)
        return self.prefixes.delta(key.worker_id, event.sequence, event.delta.stored, event.delta.removed)

    def hear(self, key: WorkerKey, message: worker_pb2.SessionDown) -> None:
        """Anything on a session that is up."""
        now_s = self.world.now_s()
        if message.HasField("beat"):
            self.fleet.beat(key, now_s, message.beat.phase, message.beat.steps)
            return
        self.fleet.beat(key, now_s)
        for tokens in message.step.tokens:
            self._take_tokens(key, tokens, now_s)
        for end in message.step.ends:
            self._take_end(key, end, now_s)

    def _tick(self) -> None:
        now_s = self.world.now_s()
        self.apply(self.fleet.tick(now_s))
        self.prefixes.tick(now_s)
        self.prefixes.sweep(20)
        self.later(TICK_S, self._tick)

    # ------------------------------------------------------------------ a request comes in

    def generate(self, end: End, request: Request) -> None:
        """As flow.py: admit, route, or say why not."""
        now_s = self.world.now_s()
        try:
            if request.request_id in self.open:
                raise InvalidRequest(f"request_id {request.request_id!r} is in use", param="request_id")
            tokens = request.num_choices * (len(request.prompt_ids) + request.expected_tokens)
            self.admission.offer(Offer(request.request_id, request.isolation_domain, tokens, request.timeout_s), now_s)
        except TwostrokeError as error:
            end.send(error)
            end.finish()
            return
        timeline = Timeline()
        timeline.mark(Instant.ARRIVED, now_s)
        run = Run(request, timeline, ROUTER_MODEL, 16)
        self.active[run.request_id] = self.open[run.request_id] = run
        self._ends[run.request_id] = end
        end.on_end = lambda: self._client_left(run)
        expired = DeadlineExceeded("the request's timeout passed")
        self._deadlines[run.request_id] = self.later(request.timeout_s, lambda: self.fail(run, expired))
        self._route(Waiting(run, now_s + self.setting.worker_patience_s, None))

    def _client_left(self, run: Run) -> None:
        self.fail(run, Cancelled("the client went away"))
        self._conclude(run)

    def _route(self, waiting: Waiting) -> None:
        run = waiting.run
        while run.error is None:
            now_s = self.world.now_s()
            choice = self._choose(run, now_s)
            if choice is not None:
                if self._dispatch(run, choice, now_s):
                    return
                continue
            if now_s >= waiting.until_s or not self.fleet.may_serve_soon(MODEL):
                self.fail(run, waiting.error or Unavailable("nobody can take the request now", retry_after_s=1.0))
                return
            self._waiting.append(waiting)
            self.later(waiting.until_s - now_s, self._wake)
            return

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            self._route(one)

    def _choose(self, run: Run, now_s: float) -> Choice | None:
        views = views_of(w for w in self.fleet.serving(MODEL) if w.facts.key not in run.excluded)
        identities = identities_of(run.request)
        choice = choose(run.facts, views, self.prefixes.expected(identities, now_s), self._policy)
        if choice is not None:
            computes = choice.winner.prefill or choice.winner.decode
            self.prefixes.predict([computes.worker_id], identities, now_s)
        return choice

    def _dispatch(self, run: Run, choice: Choice, now_s: float) -> bool:
        epoch = self.next_epoch(run)
        dispatch = Dispatch(epoch, choice, now_s)
        unfinished = run.delivery.dispatch(epoch)
        run.dispatches.append(dispatch)
        self.world.note(self.process, f"{run.request_id} goes to {choice.winner.name} under epoch {epoch}")
        for index in unfinished:
            order = submit_to_wire(run.request, index, epoch, choice.prefill_peers, run.left_s(now_s))
            link = self.links.get(dispatch.decode)
            if link is None or not link.send(submit=order):
                run.excluded.add(dispatch.decode)
                self._forget_work(run)
                return False
            count_work(self.fleet, run.facts, index, choice, now_s)
        return True

    def next_epoch(self, run: Run) -> Epoch:
        """Counts over all requests, as dispatch.py does: an id may come again."""
        self._num_dispatched += 1
        return Epoch(self.process.life, self._num_dispatched)

    # ------------------------------------------------------------------ what workers say

    def _run_from(self, key: WorkerKey, request_id: str) -> Run | None:
        run = self.active.get(request_id)
        return None if run is None or run.current is None or run.current.decode != key else run

    def _take_tokens(self, key: WorkerKey, tokens: worker_pb2.TokenOutput, now_s: float) -> None:
        run = self._run_from(key, tokens.request_id)
        if run is None:
            return
        verdict = run.take_tokens(tokens, now_s)
        if verdict is Verdict.GAP:
            self._retry_or_fail(run, TokensLost("a worker skipped tokens", retry_after_s=1.0))
            return
        if verdict is not Verdict.TAKE:
            self.world.note(self.process, f"{run.request_id}: tokens dropped: {verdict}")
            return
        self._check_epoch(run, epoch_from_wire(tokens.epoch))
        if tokens.first_index == 0:
            self.fleet.first_token(SequenceKey(run.request_id, tokens.choice))
        self._pump(run)

    def _take_end(self, key: WorkerKey, end: worker_pb2.RequestEnd, now_s: float) -> None:
        run = self._run_from(key, end.request_id)
        if run is None:
            return
        outcome = run.take_end(end, now_s)
        if isinstance(outcome, TwostrokeError):
            self._check_epoch(run, epoch_from_wire(end.epoch))
            self._forget_work(run)
            if outcome.code in _OTHERS_MAY_TRY:
                self._retry_or_fail(run, outcome)
            else:
                self.fail(run, outcome)
        elif outcome is Verdict.TAKE:
            self._check_epoch(run, epoch_from_wire(end.epoch))
            self.fleet.ended(SequenceKey(run.request_id, end.choice))
            if end.usage.completion_tokens != run.delivery.tokens_of(end.choice):
                said, had = end.usage.completion_tokens, run.delivery.tokens_of(end.choice)
                self.usage_disagrees(run, said, had)
            if not run.delivery.unfinished:
                self._settle(run, cancelled=False)
            self._pump(run)

    def usage_disagrees(self, run: Run, said: int, had: int) -> None:
        """The worker counts otherwise than we do."""
        raise Violation("R5", f"{run.request_id}: the worker says {said} tokens, {had} were delivered")

    def _check_epoch(self, run: Run, epoch: Epoch) -> None:
        if run.current is None or run.current.epoch != epoch:
            raise Violation("R6", f"{run.request_id}: epoch {epoch} was heard, another lives")

    # ------------------------------------------------------------------ again, or over

    def _retry_or_fail(self, run: Run, error: TwostrokeError) -> None:
        current = run.current
        assert current is not None
        may_retry = run.delivery.may_start_over and len(run.dispatches) < MAX_DISPATCHES
        if not may_retry or not self.admission.may_retry():
            self.fail(run, error)
            return
        self._cancel_on_worker(run, "sent elsewhere")
        run.delivery.recall()
        self._forget_work(run)
        run.excluded.add(current.decode)
        patience_s = self.setting.worker_patience_s
        again = Waiting(run, self.world.now_s() + patience_s, error)
        self.later(0.0, lambda: self._route(again))

    def fail(self, run: Run, error: TwostrokeError) -> None:
        """End a request in an error; a settled one stays as it is."""
        if run.settled:
            return
        self.world.note(self.process, f"{run.request_id} fails: {error.code}: {error.message}")
        self._cancel_on_worker(run, error.code)
        run.fail(error)
        self._settle(run, cancelled=isinstance(error, Cancelled))
        self._pump(run)

    def _cancel_on_worker(self, run: Run, reason: str) -> None:
        current = run.current
        link = None if current is None else self.links.get(current.decode)
        if current is not None and link is not None:
            epoch = epoch_to_wire(current.epoch)
            link.send(cancel=worker_pb2.CancelRequest(request_id=run.request_id, epoch=epoch, reason=reason))

    def _forget_work(self, run: Run) -> None:
        for index in range(run.request.num_choices):
            self.fleet.ended(SequenceKey(run.request_id, index))

    def _settle(self, run: Run, *, cancelled: bool) -> None:
        now_s = self.world.now_s()
        run.settled = True
        self._deadlines.pop(run.request_id).cancel()
        self._forget_work(run)
        del self.active[run.request_id]
        if run.error is not None and not run.dispatches and not cancelled:
            self.admission.reject(run.request_id, now_s)
        else:
            self.admission.release(run.request_id, now_s, cancelled)
        self._wake()

    def _pump(self, run: Run) -> None:
        """Give the client what is there, and the end after it."""
        end = self._ends.get(run.request_id)
        if self.open.get(run.request_id) is not run or end is None:
            return
        while (piece := run._buffer.take()) is not None:
            end.send(piece)
        if run.error is not None:
            end.send(run.error)
        if run.settled:
            end.finish()
            self._conclude(run)

    def _conclude(self, run: Run) -> None:
        if self.open.get(run.request_id) is run:
            del self.open[run.request_id], self._ends[run.request_id]

    # ------------------------------------------------------------------ what must hold

    @property
    def is_idle(self) -> bool:
        """No request is under way, no client's stream is open."""
        return not (self.active or self.open)

    def check(self) -> None:
        """R1 and Q2 of the router, now."""
        admission = self.admission
        if admission.offered != admission.accepted + admission.rejected + admission.cancelled:
            raise Violation("R1", "offered is not accepted + rejected + cancelled")
        if len(admission) != len(self.active):
            raise Violation("R1", f"{len(admission)} requests are admitted, {len(self.active)} are under way")

    def check_drained(self) -> None:
        """Nothing is left of any request; nothing is counted against any worker."""
        self.check()
        if self.active or self.open or self._waiting or self._deadlines:
            raise Violation("R1", f"after the drain the router still has {[*self.active, *self.open]}")
        counted = [w.facts.worker_id for w in self.fleet if w.in_flight]
        if counted:
            raise Violation("R1", f"after the drain work is still counted against {counted}")
