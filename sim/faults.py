"""The fault simulator: makes a cluster under faults from a seed, and checks every invariant after every event."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from ..engine.plan import StepPlan
from .client import Client
from .invariants import Violation
from .knowledge import Idleness, check_beliefs
from .library import Library
from .network import Network
from .rings import Host
from .router import RouterNode
from .setting import KILLER, Mishap, Setting, Vary, as_drawn, draw
from .workers.node import WorkerNode
from .workers.store import Ledger
from .world import Process, World

LONGEST_S = 60.0
DRAIN_S = 12.0  # longer than the sum of all graces, silences and deadlines of a setting
MAX_EVENTS = 200_000
KILLED_S = 0.5  # until a worker that a request killed begins its next life
MOST_KILLED = 6  # by one request: of two orders the decode worker, and both peers that it asks before its router hears


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of one schedule."""

    seed: int
    violation: Violation | None
    num_events: int
    lasted_s: float  # virtual time
    digest: str  # digest of the transcript
    lines: tuple[str, ...]  # the transcript's last lines, or all of them
    ends: Counter[str] = field(default_factory=Counter)  # number of attempts by outcome
    counters: Counter[str] = field(default_factory=Counter)


class Schedule:
    """One simulated cluster, from the first request until it has drained."""

    def __init__(self, seed: int, *, keep_all: bool = False, vary: Vary = as_drawn) -> None:
        self.setting: Setting = vary(draw(seed))
        self.world = World(seed, keep_all=keep_all)
        self.network = Network(self.world, self.setting.weather, Host(is_shared=self.setting.is_one_host))
        self.ledger = Ledger()
        self.num_killed = 0  # workers, by the request that kills them
        self.processes = {worker.worker_id: Process(worker.worker_id) for worker in self.setting.workers}
        self.processes |= {name: Process(name) for name in self.setting.routers}
        if self.setting.pairs is not None:
            self.network.library = Library(self.world, self.setting.pairs)
        self.nodes: dict[str, WorkerNode] = {}
        self.routers: dict[str, RouterNode] = {}
        self.idleness = Idleness(self.world, self.routers)
        for worker in self.setting.workers:
            self._start_worker(worker.worker_id)
        for name in self.setting.routers:
            self._start_router(name)
        self.clients = [
            Client(self.world, self.network, order, self.setting, self.ledger) for order in self.setting.orders
        ]
        for client in self.clients:
            client.router = partial(self.routers.__getitem__, client.router_name)
        for mishap in self.setting.mishaps:
            self._plan(mishap)

    # ------------------------------------------------------------------ lives

    def _start_worker(self, worker_id: str) -> None:
        process = self.processes[worker_id]
        process.is_alive = True
        worker = next(w for w in self.setting.workers if w.worker_id == worker_id)
        node = WorkerNode(self.network, process, worker, self.setting, self.ledger)
        node.find = self.nodes.get
        node.routers = self.routers.values
        node.engine.dies_of = partial(self._dies_of, worker_id)
        self.nodes[worker_id] = node
        self.world.after(0.0, process, lambda: self._announce(node))

    def _announce(self, node: WorkerNode) -> None:
        """Announce a worker to every living router, and repeat it at a fixed interval."""
        facts = node.router_facts()
        for router in self.routers.values():
            self.network.tell(node.process, router.process, partial(router.announced, facts))
        self.world.after(self.setting.fleet.silent_after_s * 0.3, node.process, lambda: self._announce(node))

    def _start_router(self, name: str) -> None:
        process = self.processes[name]
        process.is_alive = True
        self.routers[name] = RouterNode(self.world, self.network, process, self.setting)
        self.routers[name].find = self.nodes.__getitem__

    def _plan(self, mishap: Mishap) -> None:
        world, process, other = self.world, self.processes[mishap.who], self.processes[mishap.other]

        def happen() -> None:
            if not process.is_alive:
                return
            world.note("nature", f"{mishap.kind} of {mishap.who} for {mishap.seconds} s ({mishap.other})")
            if mishap.kind == "freeze":
                world.freeze(process, mishap.seconds)
            elif mishap.kind == "cut":
                self.network.cut(process, other, mishap.seconds)
            elif mishap.kind == "rank":
                self.nodes[mishap.who].lose_rank(lambda: self._end(mishap))
            elif mishap.kind == "leave":
                self.nodes[mishap.who].leave(lambda: self._end(mishap))
            else:
                self._end(mishap)

        world.after(mishap.at_s, None, happen)

    def _dies_of(self, worker_id: str, plan: StepPlan) -> bool:
        """Crash a worker that computed a step of the request that kills workers; False: the step has none of it."""
        if not any(KILLER in sequence.key.request_id for sequence in plan.sequences):
            return False
        self.num_killed += 1
        self.world.note("nature", f"{worker_id} is killed by a request")
        if self.num_killed > MOST_KILLED:
            raise Violation("R12", f"{self.num_killed} workers were killed by one request")
        self._end(Mishap(self.world.now_s(), "crash", worker_id, worker_id, KILLED_S))
        return True

    def _end(self, mishap: Mishap) -> None:
        """A process ends, and another life of it begins later."""
        process = self.processes[mishap.who]
        self.network.crashed(process)
        self.world.kill(process)
        start = self._start_router if mishap.who in self.routers else self._start_worker
        self.world.after(mishap.seconds, None, lambda: start(mishap.who))

    # ------------------------------------------------------------------ the run

    def play(self) -> None:
        """Run until every request has ended and no state of any request is left.

        Raises:
            Violation: an invariant does not hold, or production code raised an unexpected error.
        """
        try:
            self._run_until(lambda: all(client.is_done for client in self.clients), LONGEST_S, "R7")
            drained_by_s = self.world.now_s() + DRAIN_S
            self._run_until(self._is_quiet, drained_by_s, "K1")
            self._check_drained()
        except Violation:
            raise
        except Exception as error:
            raise Violation("crash", f"{type(error).__name__}: {error}") from error

    def _is_quiet(self) -> bool:
        is_idle = all(router.is_idle for router in self.routers.values())
        is_idle = is_idle and all(node.is_idle for node in self.nodes.values())
        return is_idle and self._is_whole() and not self._has_news()

    def _is_whole(self) -> bool:
        now_s = self.world.now_s()
        return all(p.is_alive and p.frozen_until_s <= now_s for p in self.processes.values())

    def _run_until(self, is_over: Callable[[], bool], until_s: float, invariant: str) -> None:
        world = self.world
        while not is_over():
            process = world.step()
            if process is False or world.now_s() > until_s or world.num_events > MAX_EVENTS:
                everybody: list[WorkerNode | RouterNode] = [*self.nodes.values(), *self.routers.values()]
                left = [str(node.process) for node in everybody if not node.is_idle]
                raise Violation(invariant, f"it does not come to an end; busy are {left}")
            if isinstance(process, Process):
                node = self.nodes.get(process.name)
                if node is not None:
                    node.check()
                    self.idleness.check(node)
                elif process.name in self.routers:
                    self.routers[process.name].check()

    def _has_news(self) -> bool:
        """Return whether cache events are on their way to a face or a router, or wait at a router frozen until now."""
        now_s = self.world.now_s()
        if any(node.engine.is_telling for node in self.nodes.values()):
            return True
        if any(router.process.frozen_until_s >= now_s for router in self.routers.values()):
            return True
        watches = [link.watch for router in self.routers.values() for link in router.links.values()]
        return any(watch is not None and watch.arrival_s >= now_s for watch in watches)

    def _check_drained(self) -> None:
        for node in self.nodes.values():
            node.check_drained()
        for router in self.routers.values():
            router.check_drained()
            for node in self.nodes.values():
                check_beliefs(router, node)

    def outcome(self, seed: int, violation: Violation | None) -> Outcome:
        """Return the result of the schedule."""
        ends = Counter(outcome for client in self.clients for outcome in client.outcomes)
        counters: Counter[str] = Counter()
        for node in self.nodes.values():
            counters.update(dict(node.engine.load().counters))
        counters["transfers_moved"] = 0 if self.network.library is None else self.network.library.num_moved
        transcript = self.world.transcript
        if violation is not None:
            self.world.note("violated", str(violation))
        return Outcome(
            seed,
            violation,
            self.world.num_events,
            self.world.now_s(),
            transcript.digest(),
            tuple(transcript.lines),
            ends,
            counters,
        )


def run_schedule(seed: int, *, keep_all: bool = False, vary: Vary = as_drawn) -> Outcome:
    """Run the schedule of a seed; `vary` changes its setting."""
    violation: Violation | None = None
    silenced = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # faults would make production code log thousands of warnings
    try:
        schedule = Schedule(seed, keep_all=keep_all, vary=vary)
        schedule.play()
    except Violation as found:
        violation = found
    finally:
        logging.disable(silenced)
    return schedule.outcome(seed, violation)


def seeds_of(campaign: int, num_schedules: int) -> Iterator[int]:
    """Seeds of a campaign: consecutive numbers, short enough to type."""
    return iter(range(campaign * 1_000_000, campaign * 1_000_000 + num_schedules))


@dataclass(slots=True)
class Campaign:
    """Sums over many schedules."""

    num_schedules: int = 0
    num_events: int = 0
    virtual_s: float = 0.0
    real_s: float = 0.0
    ends: Counter[str] = field(default_factory=Counter)
    failed: list[Outcome] = field(default_factory=list)

    @property
    def schedules_per_s(self) -> float:
        """Schedules per second of real time."""
        return self.num_schedules / self.real_s if self.real_s else 0.0

    def add(self, outcome: Outcome) -> None:
        """Add the result of one schedule."""
        self.num_schedules += 1
        self.num_events += outcome.num_events
        self.virtual_s += outcome.lasted_s
        self.ends.update(outcome.ends)
        if outcome.violation is not None:
            self.failed.append(outcome)


def run_campaign(
    seeds: Iterator[int], *, stop_after: int = 1, heard: Callable[[Outcome], None] | None = None
) -> Campaign:
    """Run one schedule after the other, until `stop_after` have failed. `heard` gets each result."""
    campaign = Campaign()
    began_s = time.perf_counter()
    for seed in seeds:
        outcome = run_schedule(seed)
        campaign.add(outcome)
        if heard is not None:
            heard(outcome)
        if len(campaign.failed) >= stop_after:
            break
    campaign.real_s = time.perf_counter() - began_s
    return campaign
