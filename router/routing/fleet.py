"""Known workers with their states and loads, updated by events. Pure: knows no network and reads no clock.

    joining ── session up ──▶ live ◀── heard again ──▶ suspect    no message for 0.75 s, no session, or no step
                               │                          │
                               └─ reports it ▶ draining   └── neither announce nor session for 2 s ──▶ gone

Only live workers get new work. Dispatched work is counted at once and reconciled with the next load report.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum

from ...core.lease import SUSPECT_AFTER_S, WORKER_LEASE
from ...core.request import Role, SequenceKey
from .cordoned import CordonedGpus
from .facts import LoadFacts, ModelFacts, WorkerFacts, WorkerKey, WorkerState
from .known_worker import Dispatched, Worker
from .lost_workers import LostWorkers
from .prompt_sums import PromptSums

TICK_S = 0.2
"""Longest time between two ticks that counts as silence of the workers: what exceeds it is a pause of our own."""


@dataclass(frozen=True, slots=True)
class FleetLimits:
    """Timeouts for silent workers, in seconds, and the largest number of workers."""

    suspect_after_s: float = SUSPECT_AFTER_S
    silent_after_s: float = WORKER_LEASE.silence_s
    stall_after_s: float = 15.0  # the step loop's count stands still while it claims to work: of a worker without times
    max_workers: int = 1024
    return_s: float = 30.0  # a lost decode worker may come back within this time


class Change(Enum):
    """Action that the caller must take for a worker."""

    CONNECT = "connect"  # open a session and a watch to it
    LOST = "lost"  # its requests are lost; the connection may be tried again
    GONE = "gone"  # its requests are lost; forget it


@dataclass(frozen=True, slots=True)
class FleetChange:
    """A change of one worker that the caller must act on."""

    change: Change
    worker: WorkerFacts
    reason: str
    has_left: bool = False  # it had reported that it drains or leaves


class Fleet:
    """All workers known to this router. Methods that can lose a worker return the changes for the caller to act on."""

    def __init__(self, limits: FleetLimits | None = None) -> None:
        self._limits = limits or FleetLimits()
        self._workers: dict[str, Worker] = {}
        self.lost = LostWorkers(self._limits.return_s)
        self._replaced: dict[str, deque[int]] = {}  # incarnations that may not come back
        self._ticked_s: float | None = None
        self.cordoned = CordonedGpus()
        self.prompts = PromptSums()
        self.num_lost = 0  # workers that went without announcing it

    # ------------------------------------------------------------------ events

    def announced(self, facts: WorkerFacts, now_s: float) -> list[FleetChange]:
        """A message arrived on a worker's announce stream, the first or a later one.

        A new incarnation replaces the old one, whose requests are lost; a replaced incarnation cannot come back.
        """
        self.cordoned.see(facts.worker_id, facts.gpus, now_s)
        known = self._workers.get(facts.worker_id)
        if known is not None and known.facts.incarnation == facts.incarnation:
            known.facts, known.role, known.heard_s, known.announcing = facts, facts.role, now_s, True
            known.draining = known.draining or known.comes_back
            return []
        if facts.incarnation in self._replaced.get(facts.worker_id, ()):
            return []  # a zombie of an earlier life
        if known is None and len(self._workers) >= self._limits.max_workers:
            return []
        changes = []
        if known is not None:
            changes = self._gone(known, now_s, "a new incarnation took its place")
            self._replaced.setdefault(facts.worker_id, deque(maxlen=8)).append(known.facts.incarnation)
        self._workers[facts.worker_id] = Worker(
            facts, heard_s=now_s, beat_s=now_s, step_changed_s=now_s, role=facts.role
        )
        return [*changes, FleetChange(Change.CONNECT, facts, "announced itself")]

    def leaving(self, key: WorkerKey) -> None:
        """A worker announced that it leaves: it gets no new work; running work may end."""
        if worker := self._find(key):
            worker.leaving = worker.draining = True
            self.lost.remove(key.worker_id)

    def announce_ended(self, key: WorkerKey, now_s: float) -> list[FleetChange]:
        """A worker's announce stream ended. If it has no session either, the worker is gone."""
        worker = self._find(key)
        if worker is None:
            return []
        worker.announcing = False
        if worker.session_up:
            return []
        return self._gone(worker, now_s, "its announce stream ended and it has no session")

    def session_up(self, key: WorkerKey, facts: WorkerFacts | None, now_s: float) -> None:
        """The worker welcomed this router."""
        if worker := self._find(key):
            worker.session_up = worker.welcomed = True
            worker.silent = worker.stalled = False
            worker.heard_s = worker.beat_s = worker.step_changed_s = now_s
            if facts is not None and facts.key == key:
                worker.facts, worker.role = facts, facts.role
            self.lost.remove(key.worker_id)

    def session_down(self, key: WorkerKey, now_s: float, reason: str) -> list[FleetChange]:
        """A worker's session broke: its requests are lost from now on."""
        worker = self._find(key)
        if worker is None or not worker.session_up:
            return []
        worker.session_up = False
        if worker.draining or not worker.announcing or now_s - worker.heard_s > self._limits.silent_after_s:
            return self._gone(worker, now_s, reason)
        self._note_loss(worker, now_s)
        worker.in_flight.clear()
        return [FleetChange(Change.LOST, worker.facts, reason)]

    def beat(self, key: WorkerKey, now_s: float, phase: str | None = None, steps: int | None = None) -> bool:
        """A message arrived on a worker's session; phase and steps come with a Beat only.

        Returns True if the worker was suspect until now, and is live again.
        """
        worker = self._find(key)
        if worker is None or not worker.session_up:
            return False
        was_suspect = worker.state is WorkerState.SUSPECT
        worker.heard_s = worker.beat_s = now_s
        worker.silent = False
        if steps is None or steps != worker.steps or phase == "idle":
            worker.step_changed_s, worker.stalled = now_s, False
        worker.steps = worker.steps if steps is None else steps
        worker.phase = worker.phase if phase is None else phase
        return was_suspect and worker.state is WorkerState.LIVE

    def loaded(self, key: WorkerKey, load: LoadFacts, role: Role, now_s: float) -> None:
        """A load report arrived on a worker's watch."""
        if worker := self._find(key):
            worker.load, worker.load_s, worker.role = load, now_s, role
            worker.draining = worker.leaving or load.draining or worker.comes_back
            self.cordoned.see(key.worker_id, load.gpus, now_s)

    def tick(self, now_s: float) -> list[FleetChange]:
        """Find workers that fell silent. Call at least every TICK_S: a longer gap counts as a pause of this process."""
        self._forgive_own_pause(now_s)
        self.lost.tick(now_s)
        changes: list[FleetChange] = []
        limits = self._limits
        for worker in list(self._workers.values()):
            if worker.session_up:
                silence_s = now_s - worker.beat_s
                worker.silent = silence_s > limits.suspect_after_s
                stall_s = worker.stall_s(limits.stall_after_s)
                worker.stalled = now_s - worker.step_changed_s > stall_s and worker.phase != "idle"
                if silence_s > limits.silent_after_s:
                    changes += self.session_down(worker.facts.key, now_s, f"silent for {silence_s:.1f} s")
            elif now_s - worker.heard_s > limits.silent_after_s:
                changes += self._gone(worker, now_s, f"silent for {now_s - worker.heard_s:.1f} s")
        return changes

    # ------------------------------------------------------------------ work under way

    def dispatched(self, worker_id: str, key: SequenceKey, cost: Dispatched) -> None:
        """Count a sequence as work of a worker from now on."""
        if worker := self._workers.get(worker_id):
            worker.in_flight[key] = cost

    def first_token(self, key: SequenceKey) -> None:
        """A sequence's prompt is computed: its prefill tokens are no longer queued."""
        for worker in self._workers.values():
            cost = worker.in_flight.get(key)
            if cost is not None and cost.context_tokens:
                worker.in_flight[key] = Dispatched(cost.at_s, 0, cost.context_tokens)
            elif cost is not None:
                del worker.in_flight[key]

    def ended(self, key: SequenceKey) -> None:
        """A sequence is over, with or without an error."""
        for worker in self._workers.values():
            worker.in_flight.pop(key, None)

    # ------------------------------------------------------------------ questions

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers.values())

    def get(self, worker_id: str) -> Worker | None:
        """The worker of that name in any state, or None."""
        return self._workers.get(worker_id)

    def lives(self, key: WorkerKey) -> bool:
        """True if this life of a worker has a session."""
        worker = self._find(key)
        return worker is not None and worker.session_up

    def serving(self, model: str, adapter: bytes = b"") -> list[Worker]:
        """Live workers of a model that hold an adapter (empty: none is needed), sorted by name."""
        found = [w for w in self._workers.values() if w.state is WorkerState.LIVE and _serves(w, model, adapter)]
        return sorted(found, key=lambda w: w.facts.worker_id)

    def may_serve_soon(self, model: str, adapter: bytes = b"") -> bool:
        """True if a worker that can decode the model is joining, suspect or live, so that waiting may help.

        Or it drains to change its cache's codec, after which it comes back.
        """
        hopeful = (WorkerState.JOINING, WorkerState.SUSPECT, WorkerState.LIVE)
        return any(
            _serves(w, model, adapter) and w.role is not Role.PREFILL and (w.state in hopeful or w.comes_back)
            for w in self._workers.values()
        )

    def may_be_lost(self, model: str, adapter: bytes = b"") -> bool:
        """True if a worker that can decode the model is suspect or changes its codec: soon it is live, or lost."""
        return any(
            _serves(w, model, adapter)
            and w.role is not Role.PREFILL
            and (w.state is WorkerState.SUSPECT or w.comes_back)
            for w in self._workers.values()
        )

    def knows(self, adapter: bytes) -> bool:
        """True if a worker that decodes holds the adapter, in any state, or one that may come back did."""
        decoders = [w.facts for w in self._workers.values() if w.role is not Role.PREFILL]
        return any(facts.holds(adapter) for facts in (*decoders, *self.lost.workers()))

    def adapters(self) -> dict[str, ModelFacts]:
        """Adapters that requests are accepted for, as models by the adapters' names.

        While a name gets another adapter, workers may differ: then the one counts that most of them have.
        """
        ready = [w.facts for w in self._workers.values() if w.session_up and w.role is not Role.PREFILL]
        votes: dict[str, dict[bytes, list[ModelFacts]]] = {}
        for facts in (*ready, *self.lost.workers()):
            for adapter in facts.adapters:
                model = replace(facts.model, name=adapter.name, adapter=adapter, base=facts.model.name)
                votes.setdefault(adapter.name, {}).setdefault(adapter.digest, []).append(model)
        chosen = {}
        for name, by_digest in votes.items():
            _, models = max(by_digest.items(), key=lambda vote: (len(vote[1]), vote[0]))
            chosen[name] = min(models, key=lambda model: model.max_model_len)
        return chosen

    def models(self) -> dict[str, ModelFacts]:
        """Models of all known workers and of lost ones that may come back, by name."""
        return _by_name([*(w.facts.model for w in self._workers.values()), *self.lost.models()])

    def expected_models(self) -> dict[str, ModelFacts]:
        """Models that requests are accepted for, by name: ready ones, and those whose lost worker may come back."""
        return _by_name([*self.ready_models().values(), *self.lost.models()])

    def ready_models(self) -> dict[str, ModelFacts]:
        """Models that can be served now, by name: a worker that decodes them has a session."""
        return _by_name(w.facts.model for w in self._workers.values() if w.session_up and w.role is not Role.PREFILL)

    # ------------------------------------------------------------------ inside

    def _find(self, key: WorkerKey) -> Worker | None:
        worker = self._workers.get(key.worker_id)
        return worker if worker is not None and worker.facts.incarnation == key.incarnation else None

    def _note_loss(self, worker: Worker, now_s: float) -> None:
        """Remember a decode worker that served and did not leave on purpose, or only to change its codec."""
        may_return = worker.comes_back or not worker.draining
        if worker.welcomed and may_return and worker.role is not Role.PREFILL:
            self.lost.add(worker.facts, now_s)

    def _gone(self, worker: Worker, now_s: float, reason: str) -> list[FleetChange]:
        self._note_loss(worker, now_s)
        worker.in_flight.clear()
        self._workers.pop(worker.facts.worker_id, None)
        self.num_lost += 0 if worker.draining else 1
        return [FleetChange(Change.GONE, worker.facts, reason, has_left=worker.draining)]

    def _forgive_own_pause(self, now_s: float) -> None:
        """Do not count a pause of this process as silence of the workers.

        What a tick may take counts all the same, so that a router that is always late still finds a frozen worker.
        """
        pause_s = 0.0 if self._ticked_s is None else now_s - self._ticked_s - TICK_S
        self._ticked_s = now_s
        if pause_s > 0.0:
            for worker in self._workers.values():
                worker.heard_s = min(now_s, worker.heard_s + pause_s)
                worker.beat_s = min(now_s, worker.beat_s + pause_s)
                worker.step_changed_s = min(now_s, worker.step_changed_s + pause_s)


def _serves(worker: Worker, model: str, adapter: bytes) -> bool:
    return worker.facts.model.name == model and worker.facts.holds(adapter)


def _by_name(models: Iterable[ModelFacts]) -> dict[str, ModelFacts]:
    """Models by name. If workers differ in context length, the shortest counts: any of them may get a request."""
    found: dict[str, ModelFacts] = {}
    for model in models:
        known = found.get(model.name)
        if known is None or model.max_model_len <= known.max_model_len:
            found[model.name] = model
    return found
