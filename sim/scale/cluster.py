"""Queue-level model of a cluster under a virtual clock: workers that start, prefill, decode, change roles and drain.

Not the schedulers of `engine/`, which would cost hours per run: a prompt is served whole and in order of arrival by the
prefill worker that is free first; all sequences of a decode worker advance together, one token per step, and a step's
time is constant within a tick. A worker with work of an earlier role does both at half speed. A request whose KV no
decode worker can hold waits, and the wait counts into its first token, because prefill would have begun later.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Protocol

from ...core.request import Role
from .demand import Demand
from .machine import Machine

TICK_S = 0.25


@dataclass(frozen=True, slots=True)
class Times:
    """Durations that the model takes for given, in seconds."""

    start_up_s: float = 60.0
    role_change_s: float = 1.0


@dataclass(slots=True)
class SimWorker:
    """One worker."""

    name: str
    role: Role
    ready_s: float  # serves from then on
    began_s: float  # paid from then on
    draining: bool = False
    next_role: tuple[float, Role] | None = None  # a change under way, and when it holds
    free_s: float = 0.0  # its prefill queue is empty then
    queue: deque[tuple[float, int]] = field(default_factory=deque)  # (finished at, prompt tokens)
    queued_tokens: int = 0
    steps: float = 0.0  # decode steps so far
    step_s: float = 0.0
    running: list[tuple[float, float, int, int, int]] = field(default_factory=list)  # heap: steps at the end, …
    kv_tokens: float = 0.0
    fixed_tokens: float = 0.0  # prompt tokens of `running`, less the steps at which each began

    def is_live(self, now_s: float) -> bool:
        """True if it takes new work."""
        return not self.draining and now_s >= self.ready_s

    @property
    def is_empty(self) -> bool:
        """True if it has no work."""
        return not self.queue and not self.running


class Control(Protocol):
    """A way to scale a cluster."""

    def act(self, cluster: SimCluster, now_s: float) -> None:
        """Called once per second of virtual time."""
        ...


@dataclass(slots=True)
class Outcome:
    """What happened in a run."""

    ttft_s: list[float] = field(default_factory=list)  # by request, in the order of the first tokens
    itl_s: list[float] = field(default_factory=list)  # mean of each ended request
    both: int = 0  # requests within both targets
    num_requests: int = 0
    paid_s: float = 0.0  # of all workers
    counts: dict[str, int] = field(default_factory=lambda: {"role_changes": 0, "starts": 0, "drains": 0})
    course: list[tuple[float, int, int, int]] = field(default_factory=list)  # time, prefill, decode, all that is paid


class SimCluster:
    """The workers, their queues, and the actions of a control."""

    def __init__(self, machine: Machine, split: tuple[int, int], times: Times, targets_s: tuple[float, float]) -> None:
        """`targets_s`: time to the first token, and mean time between tokens."""
        self.machine, self.times = machine, times
        self.now_s = 0.0
        self.workers: list[SimWorker] = []
        self.outcome = Outcome()
        self.prompts = self.prompt_tokens = self.prompt_tokens_squared = 0
        self._targets_s = targets_s
        self._made = 0
        self._live: dict[Role, list[SimWorker]] = {}  # empty: to be listed again
        self._unserved: deque[int] = deque()  # no prefill worker is there
        self._handed: list[tuple[float, int]] = []  # heap: prefill ends at, request
        self._waiting: deque[int] = deque()  # for room on a decode worker
        self._first_s: dict[int, float] = {}
        self._ttft_met: set[int] = set()
        for role, count in zip((Role.PREFILL, Role.DECODE), split, strict=True):
            for _ in range(count):
                self._add(role, ready_s=0.0)

    # ------------------------------------------------------------------ actions

    def start(self, role: Role) -> None:
        """Order a worker; it serves after the start-up."""
        self.outcome.counts["starts"] += 1
        self._add(role, ready_s=self.now_s + self.times.start_up_s)

    def change_role(self, worker: SimWorker, role: Role) -> None:
        """Give a worker another role; it holds after a moment."""
        self.outcome.counts["role_changes"] += 1
        worker.next_role = (self.now_s + self.times.role_change_s, role)

    def drain(self, worker: SimWorker) -> None:
        """Let a worker take no new work."""
        self.outcome.counts["drains"] += 1
        worker.draining = True
        self._live.clear()

    def stop(self, worker: SimWorker) -> None:
        """End a worker without work."""
        assert worker.is_empty
        self.outcome.paid_s += self.now_s - worker.began_s
        self.workers.remove(worker)
        self._live.clear()

    def live(self, role: Role) -> list[SimWorker]:
        """Workers of a role that take new work."""
        if not self._live:
            for each in (Role.PREFILL, Role.DECODE):
                self._live[each] = [w for w in self.workers if w.role is each and w.is_live(self.now_s)]
        return self._live[role]

    def _add(self, role: Role, ready_s: float) -> None:
        self.workers.append(SimWorker(f"worker-{self._made:03}", role, ready_s, self.now_s))
        self._made += 1

    # ------------------------------------------------------------------ the course of time

    def run(self, demands: Sequence[Demand], control: Control) -> Outcome:
        """Play all requests to their ends."""
        self._demands = demands
        outcome, place, second = self.outcome, 0, 0
        outcome.num_requests = len(demands)
        while place < len(demands) or self._handed or self._unserved or self._waiting or self._busy():
            until_s = self.now_s + TICK_S
            while place < len(demands) and demands[place].arrived_s < until_s:
                self._arrive(place)
                place += 1
            while self._handed and self._handed[0][0] < until_s:
                self._hand_over(*heapq.heappop(self._handed))
            for worker in self.workers:
                self._decode(worker)
            self.now_s = until_s
            self._live.clear()
            for worker in self.workers:
                self._settle(worker)
            self._retry()
            if self.now_s >= second + 1:
                second += 1
                control.act(self, self.now_s)
                if second % 10 == 0:
                    split = len(self.live(Role.PREFILL)), len(self.live(Role.DECODE))
                    outcome.course.append((self.now_s, *split, len(self.workers)))
        for worker in self.workers:
            outcome.paid_s += self.now_s - worker.began_s
        return outcome

    def _busy(self) -> bool:
        return any(worker.running for worker in self.workers)

    def _settle(self, worker: SimWorker) -> None:
        """Let what became due happen: an end of a prompt, a change of the role."""
        while worker.queue and worker.queue[0][0] <= self.now_s:
            worker.queued_tokens -= worker.queue.popleft()[1]
        if worker.next_role is not None and worker.next_role[0] <= self.now_s:
            worker.role, worker.next_role = worker.next_role[1], None
            self._live.clear()

    def _retry(self) -> None:
        while self._unserved and self.live(Role.PREFILL):
            self._serve(self._unserved.popleft(), self.now_s)
        while self._waiting and self._join(self._waiting[0], self.now_s):
            self._waiting.popleft()

    def _arrive(self, place: int) -> None:
        each = self._demands[place]
        uncached = each.prompt_tokens - each.held_tokens
        self.prompts += 1
        self.prompt_tokens += uncached
        self.prompt_tokens_squared += uncached * uncached
        self._serve(place, each.arrived_s)

    def _serve(self, place: int, now_s: float) -> None:
        best = min(self.live(Role.PREFILL), key=_free_s, default=None)
        if best is None:
            self._unserved.append(place)
            return
        each = self._demands[place]
        uncached = each.prompt_tokens - each.held_tokens
        took_s = self.machine.prefill_s(uncached, each.held_tokens) * (2.0 if best.running else 1.0)
        best.free_s = max(now_s, best.free_s) + took_s
        best.queue.append((best.free_s, uncached))
        best.queued_tokens += uncached
        heapq.heappush(self._handed, (best.free_s, place))

    def _hand_over(self, at_s: float, place: int) -> None:
        if self._waiting or not self._join(place, at_s):
            self._waiting.append(place)

    def _join(self, place: int, at_s: float) -> bool:
        """Give a request to the decode worker with the least KV in use. False: none has room."""
        each = self._demands[place]
        room = self.machine.kv_capacity_tokens - each.prompt_tokens
        seats = self.machine.max_num_seqs
        fits = [w for w in self.live(Role.DECODE) if w.kv_tokens <= room and len(w.running) < seats]
        if not fits:
            return False
        worker = min(fits, key=_kv_tokens)
        ttft_s = at_s - each.arrived_s
        self.outcome.ttft_s.append(ttft_s)
        if ttft_s <= self._targets_s[0]:
            self._ttft_met.add(place)
        if not worker.step_s:
            worker.step_s = self.machine.step_s(1, each.prompt_tokens)
        begun = worker.steps + max(0.0, at_s - self.now_s) / worker.step_s
        worker.fixed_tokens += each.prompt_tokens - begun
        heapq.heappush(
            worker.running, (begun + each.answer_tokens - 1, at_s, place, each.prompt_tokens, each.answer_tokens)
        )
        worker.kv_tokens += each.prompt_tokens
        return True

    def _decode(self, worker: SimWorker) -> None:
        """Advance a worker's sequences by one tick from `now_s`."""
        running = worker.running
        if not running:
            worker.kv_tokens = worker.fixed_tokens = 0.0
            return
        slow = 2.0 if worker.queue else 1.0
        worker.kv_tokens = worker.fixed_tokens + len(running) * worker.steps
        step_s = worker.step_s = self.machine.step_s(len(running), worker.kv_tokens) * slow
        before, worker.steps = worker.steps, worker.steps + TICK_S / step_s
        while running and running[0][0] <= worker.steps:
            end, begun_s, place, prompt, answer = heapq.heappop(running)
            worker.fixed_tokens -= prompt - (end - answer + 1)
            self._end(place, begun_s, self.now_s + (end - before) * step_s, answer)

    def _end(self, place: int, begun_s: float, ended_s: float, answer_tokens: int) -> None:
        itl_s = max(0.0, ended_s - begun_s) / max(1, answer_tokens - 1)
        self.outcome.itl_s.append(itl_s)
        is_met = place in self._ttft_met
        self._ttft_met.discard(place)
        self.outcome.both += is_met and itl_s <= self._targets_s[1]


_free_s = attrgetter("free_s")
_kv_tokens = attrgetter("kv_tokens")
