"""A router process in virtual time: drives the production lifecycle of requests and the production roster of workers.

Of a client it knows only the stream. Decides nothing; checks what it receives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

from ..core.errors import Cancelled, PoisonRequest, TwostrokeError
from ..core.request import Epoch, Request, SequenceKey
from ..core.timeline import Instant, Timeline
from ..kv.block import BlockIdentity
from ..kv.keys import PromptHasher
from ..kv.messages import epoch_from_wire
from ..protos import worker_pb2
from ..router.requests.admission.bounds import AdmissionLimits
from ..router.requests.explain import explain_run
from ..router.requests.history import RequestHistory
from ..router.requests.lifecycle import Lifecycle
from ..router.requests.roster import Roster
from ..router.requests.state import RequestState, Stage
from ..router.requests.surroundings import LifeLimits, Order
from ..router.routing.candidates import PolicyLimits
from ..router.routing.facts import ModelFacts, WorkerFacts, WorkerKey
from ..router.routing.fleet import Fleet, FleetChange
from ..router.routing.prefixes import PrefixMap
from .invariants import Violation
from .links import Link
from .network import End, Network
from .setting import Setting
from .workers.engine import IDENTITY_KEY
from .workers.node import WorkerNode
from .world import Process, Timer, World

TICK_S = 0.2
PREDICTIONS_END_S = 60.0  # longer than any prediction is kept


def _repeating_name(request: Request) -> str:
    return f"{request.owner}/{request.request_id}"


class RouterNode:
    """One life of the router."""

    def __init__(self, world: World, network: Network, process: Process, setting: Setting) -> None:
        self.world, self.network, self.process, self.setting = world, network, process, setting
        self.incarnation = 16 * process.life + setting.routers.index(process.name)  # unique per router and life
        self.journal = RequestHistory()
        self._num_streams = 0
        self._confirmed: set[tuple[WorkerKey, str, Epoch]] = set()  # orders of which workers said that they take them
        self._sent_again: WeakKeyDictionary[RequestState, int] = WeakKeyDictionary()  # dispatches when last sent again
        self.roster = Roster(Fleet(setting.fleet), PrefixMap(max_entries=200), self)
        self.links: dict[WorkerKey, Link] = {}
        self.find: Callable[[str], WorkerNode]  # by worker id: the current life of that worker
        limits = LifeLimits(
            setting.worker_patience_s,
            setting.fleet.return_s,
            buffer_pieces=16,
            admission=AdmissionLimits(max_requests=setting.max_requests),
            policy=PolicyLimits(local_prefill=setting.local_prefill),
            has_buddies=setting.journal is not None,
        )
        self.life = Lifecycle(self.incarnation, limits, self.roster, self, self)
        if setting.names_repeat:
            self.life._next_name = _repeating_name  # type: ignore[method-assign]
        self._tick()

    # ------------------------------------------------------------------ clients

    def generate(self, end: End, request: Request) -> None:
        """Admit and begin a request, or send the error, as flow.py does."""
        now_s = self.world.now_s()
        timeline = Timeline()
        timeline.mark(Instant.ARRIVED, now_s)
        try:
            run = self.life.admit(request, timeline, now_s)
        except TwostrokeError as error:
            end.send(error)
            end.finish()
            return
        self._num_streams += 1
        run.on_news = lambda: self._pump(run, end)
        end.on_end = lambda: self._client_left(run)
        self.life.begin(run, now_s)

    def _client_left(self, run: RequestState) -> None:
        self.life.fail(run, Cancelled("the client went away"), self.world.now_s())
        self._conclude(run)

    def _conclude(self, run: RequestState) -> None:
        if self.life.conclude(run):
            self._num_streams -= 1
            self.journal.add(explain_run(run, "over"))

    def explain(self, tenant: str, request_id: str) -> dict[str, Any] | None:
        """Explanation of a request, running or over, as in flow.py; None: unknown."""
        run = self.life.runs.find(tenant, request_id)
        return explain_run(run, "running") if run is not None else self.journal.find(tenant, request_id)

    def _pump(self, run: RequestState, end: End) -> None:
        """Send the client all waiting pieces, and the end after them."""
        while (piece := run.take_piece()) is not None:
            end.send(piece)
        if run.error is not None:
            end.send(run.error)
        if run.is_over:
            end.finish()
            self._conclude(run)

    # ------------------------------------------------------------------ workers

    def announced(self, facts: WorkerFacts) -> None:
        """Take an announcement of a worker."""
        self.roster.announced(facts, self.world.now_s())

    def leaving(self, key: WorkerKey) -> None:
        """Take a worker's word that it leaves."""
        self.roster.leaving(key)

    def hear(self, key: WorkerKey, message: worker_pb2.SessionDown) -> None:
        """Take a message of a session that is up."""
        now_s = self.world.now_s()
        self.roster.beat(key, message.beat if message.HasField("beat") else None, now_s)
        if message.HasField("step"):
            for taken in message.step.taken:
                self._confirmed.add((key, taken.request_id, epoch_from_wire(taken.epoch)))
            self.life.take_step(key, message.step, now_s)

    def _tick(self) -> None:
        now_s = self.world.now_s()
        self.roster.tick(now_s, 20)
        self.life.tick(now_s)
        self.after(TICK_S, self._tick)

    def after(self, delay_s: float, act: Callable[[], None]) -> Timer:
        """Plan `act` in this life of this process."""
        return self.world.after(delay_s, self.process, act)

    # ------------------------------------------------------------------ what the roster asks (see Wires)

    def connect(self, facts: WorkerFacts) -> None:
        """Implements `Wires.connect`."""
        self._note(facts.key, "connect")
        self.links[facts.key] = Link(self, facts.key)

    def reset(self, key: WorkerKey) -> None:
        """Implements `Wires.reset`."""
        self.links[key].reset()

    def disconnect(self, facts: WorkerFacts) -> None:
        """Implements `Wires.disconnect`."""
        self.links.pop(facts.key).close()

    def lost(self, change: FleetChange) -> None:
        """Implements `Wires.lost`."""
        key = change.worker.key
        self._note(key, f"{change.change.value}: {change.reason}")
        self.life.lost(key, change.reason, self.world.now_s(), has_left=change.has_left)

    def changed(self) -> None:
        """Implements `Wires.changed`."""
        self.life.workers_changed()

    def _note(self, key: WorkerKey, what: str) -> None:
        self.world.note(self.process, f"{key.worker_id}.{key.incarnation} {what}")

    # ------------------------------------------------------------------ what the life asks (see Driver)

    def send(self, key: WorkerKey, order: Order) -> bool:
        """Implements `Driver.send`."""
        link = self.links.get(key)
        if link is None:
            return False
        return link.send(submit=order) if isinstance(order, worker_pb2.Submit) else link.send(cancel=order)

    def later(self, delay_s: float, act: Callable[[float], None]) -> Timer:
        """Implements `Driver.later`."""
        return self.after(delay_s, lambda: act(self.world.now_s()))

    def identities(self, request: Request, model: ModelFacts) -> Sequence[BlockIdentity]:
        """Implements `Driver.identities`."""
        return PromptHasher.of(IDENTITY_KEY, model).name(request.prompt_ids, request.cache_scope).identities

    # ------------------------------------------------------------------ what it tells (see Observer)

    def choosing(self) -> AbstractContextManager[object]:
        """Implements `Observer.choosing`."""
        return nullcontext()

    def refused(self, request: Request, error: TwostrokeError) -> None:
        """Implements `Observer.refused`."""

    def dispatched(self, run: RequestState) -> None:
        """Implements `Observer.dispatched`."""
        if run.living is not None:
            pair = run.living.choice.winner
            if pair.prefill is not None and pair.prefill.numerics != pair.decode.numerics:
                raise Violation("R10", f"{run.name}: {pair.name} differ in their numerics")
            winner = pair.name
            self.world.note(self.process, f"{run.name} goes to {winner} under epoch {run.living.epoch}")

    def dropped(self, name: str, reason: str) -> None:
        """Implements `Observer.dropped`."""
        self.world.note(self.process, f"{name}: dropped: {reason}")

    def heard(self, run: RequestState, epoch: Epoch, num_tokens: int) -> None:
        """Check R6: tokens are accepted only from the current dispatch."""
        if run.living is None or run.living.epoch != epoch:
            raise Violation("R6", f"{run.name}: epoch {epoch} was heard, another lives")

    def first_token(self, run: RequestState, predicted_ms: float, took_ms: float) -> None:
        """Implements `Observer.first_token`."""

    def usage_differs(self, run: RequestState, said: int, had: int) -> None:
        """Check R5: the worker's usage equals the tokens that were delivered."""
        raise Violation("R5", f"{run.name}: the worker says {said} tokens, {had} were delivered")

    def sent_again(self, run: RequestState, error: TwostrokeError) -> None:
        """Check R9: one loss causes one dispatch."""
        if self._sent_again.get(run) == len(run.dispatches):
            raise Violation("R9", f"{run.name} is sent again twice after one dispatch")
        self._sent_again[run] = len(run.dispatches)
        self.world.note(self.process, f"{run.name} is sent again: {error.code}: {error.message}")

    def settled(self, run: RequestState) -> None:
        """Implements `Observer.settled`."""
        if run.error is not None:
            self.world.note(self.process, f"{run.name} fails: {run.error.code}: {run.error.message}")
        if isinstance(run.error, PoisonRequest):
            self._check_blame(run)

    def _check_blame(self, run: RequestState) -> None:
        """Check R11: its last worker had said that it has the request, unless it was the third one that was lost."""
        last, lost = run.dispatches[-1], () if run.suspicion is None else run.suspicion.workers
        confirms = next(w.confirms for w in self.setting.workers if w.worker_id == last.decode.worker_id)
        if confirms and (last.decode, run.name, last.epoch) not in self._confirmed and len(lost) < 2:
            raise Violation("R11", f"{run.name} is blamed for {last.decode}, which never had it")

    # ------------------------------------------------------------------ what must hold

    def waits_for(self, key: WorkerKey, sequence: SequenceKey, epoch: Epoch) -> bool:
        """Return whether the router waits for this worker to compute this choice under this epoch."""
        run = self.life.runs.active.get(sequence.request_id)
        living = None if run is None else run.living
        if run is None or living is None or (living.decode, living.epoch) != (key, epoch):
            return False
        return sequence.choice in run.delivery.unfinished

    @property
    def is_idle(self) -> bool:
        """True when no request is under way and no client's stream is open."""
        return self.life.is_idle

    def check(self) -> None:
        """Check R1 of the router's counts, and that every request without a worker waits for one (R7)."""
        admission, active = self.life.admission, self.life.runs.active
        if admission.offered != admission.accepted + admission.rejected + admission.cancelled:
            raise Violation("R1", "offered is not accepted + rejected + cancelled")
        if len(self.life.runs.open) != self._num_streams:
            raise Violation("R1", f"{self._num_streams} streams are open, {len(self.life.runs.open)} are known")
        for run in active.values():
            if run.stage is Stage.ROUTING and run.name not in self.life._waiting and run.name not in self.life.entrance:
                raise Violation("R7", f"{run.name} belongs to no worker, and none is looked for")
        if len(admission) != len(active):
            raise Violation("R1", f"{len(admission)} requests are admitted, {len(active)} are under way")

    def check_drained(self) -> None:
        """Check that no request is left and no work is counted against any worker."""
        self.check()
        if not self.life.is_idle:
            runs = self.life.runs
            raise Violation("R1", f"after the drain the router still has {[*runs.active, *runs.open]}")
        counted = [w.facts.worker_id for w in self.roster.fleet if w.in_flight]
        if counted:
            raise Violation("R1", f"after the drain work is still counted against {counted}")
        admission, prefixes = self.life.admission, self.roster.prefixes
        if admission.tokens or self.life.entrance.waiting_tokens:
            raise Violation("R1", f"after the drain {admission.tokens} tokens are still admitted")
        prefixes.check_integrity()
        prefixes.tick(self.world.now_s() + PREDICTIONS_END_S)
        if prefixes.num_predicted:
            raise Violation("K5", f"after the drain {prefixes.num_predicted} blocks are still expected")
