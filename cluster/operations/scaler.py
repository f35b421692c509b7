"""Driver of the planner: gives it what the router reports, carries out its decisions, reports them. Decides nothing.

The supervisor's process is the only one that plans: `run_folder.py` lets one supervisor run per router's address.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from ...core.clock import Clock
from ...core.errors import TwostrokeError
from ...core.request import Role
from ...protos import worker_pb2
from ..planner.config import PlannerConfig
from ..planner.decision import Action, ChangeRole, Decision, Drain, Hold, Start, Stop
from ..planner.law import Planner
from ..planner.observation import Observation
from .changes import Changes
from .room import NoRoom

log = logging.getLogger(__name__)

MAX_EVENTS = 32
LOOK_S = 5.0  # between two looks for machines that came

Observe = Callable[[], Observation | None]


class Scaler:
    """One planner and its cluster."""

    def __init__(
        self, config: PlannerConfig, changes: Changes, num_configured: int, clock: Clock, say: Callable[[str], None]
    ) -> None:
        """`num_configured`: workers at the start."""
        self.planner = Planner(config, num_configured)
        self.observe: Observe = changes.observation
        self.events: deque[str] = deque(maxlen=MAX_EVENTS)
        self.last: Decision | None = None
        self._config, self._changes = config, changes
        self._clock, self._say = clock, say
        self._incarnation = time.time_ns()
        self._starting: dict[str, float] = {}  # workers that we started and that have not served yet
        self._awaiting: list[tuple[Role, float]] = []  # workers that wait for a machine, and since when
        self._looked_at_s = float("-inf")  # for machines that came
        self._asked = ""

    async def run(self) -> None:
        """Decide and act once per interval, until cancelled."""
        while True:
            began_s = self._clock.now_s()
            try:
                await self.turn()
            except Exception:  # a planner that fails must not end the supervisor
                log.exception("the planner's turn failed")
            await asyncio.sleep(max(0.0, began_s + self._config.interval_s - self._clock.now_s()))

    async def turn(self) -> None:
        """One decision, its action, and a report."""
        now_s = self._clock.now_s()
        if self._changes.rolling:
            decision = self.planner.decide(None, now_s)  # the cool-down begins again
        else:
            await self._give_up_late(now_s)
            await self._start_awaiting(now_s)
            decision = self.planner.decide(self.observe(), now_s, self._changes.num_owned)
            if not isinstance(decision.action, Hold):
                self._tell(f"planner: {decision.action.name}: {decision.reason}")
                log.info("planner: %s", json.dumps(decision.facts()))
                await self._carry_out(decision.action, now_s)
        await self._ask_for_machines()
        waiting = Counter(role.value for role, _ in self._awaiting)
        words = [f"{count} {role} worker(s) wait for a machine: {self._asked}" for role, count in waiting.items()]
        self.last = replace(decision, pending=(*decision.pending, *words))
        await self._report(self.last)

    async def _carry_out(self, action: Action, now_s: float) -> None:
        try:
            if isinstance(action, Start):
                await self._start(action.roles, now_s)
            elif isinstance(action, ChangeRole):
                await self._changes.set_role(action.worker, action.role)
            elif isinstance(action, Drain):
                for name in action.workers:
                    self._changes.let_go(name)
                    self._changes.later(self._drain(name))
            elif isinstance(action, Stop):
                await self._changes.end(action.worker)
        except TwostrokeError as error:
            self._tell(f"planner: {action.name} failed: {error}")

    async def _start(self, roles: tuple[Role, ...], now_s: float) -> None:
        for place, role in enumerate(roles):
            found = await self._changes.add(role)
            if isinstance(found, NoRoom):
                self._wait_or_refuse(roles[place:], found, now_s)
                return
            self._starting[found.name] = now_s

    def _wait_or_refuse(self, roles: tuple[Role, ...], found: NoRoom, now_s: float) -> None:
        """Workers that find no room: as many as machines may come for wait for them, the others are given up."""
        num_waiting = min(len(roles), max(0, found.num_to_come - len(self._awaiting)))
        self._awaiting += [(role, now_s) for role in roles[:num_waiting]]
        if num_waiting:
            self._looked_at_s = now_s
            self._tell(f"planner: {num_waiting} worker(s) wait for a machine: {found.reason}")
        if num_waiting < len(roles):
            self.planner.refused(len(roles) - num_waiting, found.reason, now_s)
            self._tell(f"planner: no worker is started: {found.reason}")

    async def _start_awaiting(self, now_s: float) -> None:
        """Start workers that wait on machines that came; give up those that waited too long."""
        for role, since_s in [each for each in self._awaiting if now_s - each[1] > self._config.start_timeout_s]:
            self._awaiting.remove((role, since_s))
            reason = f"no machine came for a {role.value} worker within {self._config.start_timeout_s:g} s"
            self.planner.refused(1, reason, now_s)
            self._tell(f"planner: {reason}")
        if now_s - self._looked_at_s < LOOK_S:
            return
        while self._awaiting:
            self._looked_at_s = now_s
            role, since_s = self._awaiting[0]
            found = await self._changes.add(role)
            if isinstance(found, NoRoom):
                return
            del self._awaiting[0]
            self._starting[found.name] = now_s
            self._tell(f"planner: {found.name} starts on {found.host}, after {now_s - since_s:.0f} s")

    async def _ask_for_machines(self) -> None:
        """State all that is wanted of machines, where workers come and go and somebody can be asked."""
        if self._config.max_workers is None:
            return
        asked = await self._changes.want(len(self._awaiting))
        if asked and asked != self._asked:
            self._tell(f"planner: {asked}")
        self._asked = asked

    async def _give_up_late(self, now_s: float) -> None:
        """Take back started workers that do not serve by the timeout."""
        for name, since_s in list(self._starting.items()):
            if self._changes.is_serving(name):
                del self._starting[name]
            elif now_s - since_s > self._config.start_timeout_s:
                del self._starting[name]
                reason = f"{name} did not serve within {self._config.start_timeout_s:g} s"
                self.planner.refused(1, reason, now_s)
                self._tell(f"planner: {reason}; it is taken back")
                await self._changes.withdraw(name)

    async def _drain(self, name: str) -> None:
        """Drain a worker. The planner sees when it is empty, and stops it; one that cannot drain is ended here."""
        retired = await self._changes.drain(name, self._config.drain_timeout_s)
        if retired.error:
            self._tell(f"planner: {name} does not drain and is ended: {retired.error}")
            await self._changes.end(name)
        elif retired.num_moved:
            self._tell(f"planner: {retired.num_moved} streams of {name} go on at other workers")

    async def _report(self, decision: Decision) -> None:
        actual = self._changes.serving_by_role()
        report = report_of(self._incarnation, decision, actual, self.events)
        try:
            await self._changes.report(report)
        except TwostrokeError as error:
            log.debug("the router did not take the planner's report: %s", error)

    def _tell(self, event: str) -> None:
        self.events.append(event)
        self._say(event)


def report_of(
    incarnation: int, decision: Decision, actual: Mapping[str, int], events: Iterable[str]
) -> worker_pb2.SupervisorReport:
    """What the routers are told of a decision. `actual`: workers that serve, by role; `events`: the last ones."""
    return worker_pb2.SupervisorReport(
        incarnation=incarnation,
        desired={role: max(0, count) for role, count in decision.desired.items()},
        actual=actual,
        action=decision.action.name,
        reason=decision.reason,
        decision=json.dumps(decision.facts(), default=str),
        events=events,
    )
