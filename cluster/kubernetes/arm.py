"""Driver of the planner in Kubernetes: asks the routers, carries decisions out, tells the routers. Decides nothing.

A worker that starts is one pod more of its role, by the scale subresource of a Deployment or of a role scaler. One that
goes drains first: then it is not ready, which a Deployment takes first; a set takes the highest ordinal (pods.py).
A change of a role is `SetRole`: the pod stays where it is counted. Whoever does not hold the Lease does nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from ...core.clock import Clock
from ...core.errors import TwostrokeError, Unavailable
from ...core.request import Role
from ...router.peers.joined import joined_report
from ..operations.scaler import MAX_EVENTS, report_of
from ..planner.config import PlannerConfig
from ..planner.decision import HOLD, Action, ChangeRole, Decision, Drain, Hold, Start, Stop
from ..planner.law import Planner
from ..planner.observation import Observation, observed
from .connection import ApiAway, ApiRefused
from .lease import Renew, Wait
from .objects import Deployed
from .owed import Owed
from .surroundings import Inside, Kubernetes

log = logging.getLogger(__name__)

READ_INTERVAL_S = 5.0  # between two looks at the Deployments
_FAILURES = (ApiAway, ApiRefused)


class PodScaler:
    """One planner, what scales its roles, and its Lease."""

    def __init__(
        self,
        config: PlannerConfig,
        inside: Inside,
        kubernetes: Kubernetes,
        clock: Clock,
        make_planner: Callable[[PlannerConfig, int], Planner] = Planner,
    ) -> None:
        """`make_planner`: called with the number of pods whenever we get the Lease."""
        self._config, self._clock, self._make_planner = config, clock, make_planner
        self._routers, self._operator = inside
        self._scales, self._pods, self._leases, self._tenure = kubernetes
        self._names = dict(self._pods.names)
        self.beat_s = clock.now_s()  # of the last turn's beginning
        self._incarnation = time.time_ns()
        self.events: deque[str] = deque(maxlen=MAX_EVENTS)
        self.last: Decision | None = None
        self._planner: Planner | None = None  # while we hold the Lease
        self._owed = Owed()
        self._present: dict[Role, Deployed] = {}
        self._read_at_s = self._looked_at_s = float("-inf")
        self._workers: dict[str, dict[str, Any]] = {}  # by name, of the last reports
        self._problems: dict[str, str] = {}  # by what does not work: said once
        self._left: tuple[str, ...] = ()  # workers that the Lease says are drained, for a successor
        self._ended: set[str] = set()  # workers that we end, or have ended
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of what is scaled."""
        return tuple(self._names.values())

    async def run(self) -> None:
        """Decide and act once per interval, until cancelled."""
        while True:
            began_s = self._clock.now_s()
            try:
                await self.turn()
            except Exception:  # a planner that ended would leave the cluster as it is for ever
                log.exception("the planner's turn failed")
            await asyncio.sleep(max(0.0, began_s + self._config.interval_s - self._clock.now_s()))

    async def close(self, within_s: float) -> None:
        """Let go of the Lease, so that a successor begins at once; where that takes longer, it waits for its end."""
        for task in self._tasks:
            task.cancel()
        if not self._tenure.holds(self._clock.now_s()):
            return
        try:
            async with asyncio.timeout(within_s):
                await self._look(release=True)
        except TimeoutError:
            log.warning("planner: the Lease is not let go: the API server did not answer within %g s", within_s)

    async def turn(self) -> None:
        """One look at the Lease, one decision, its action, and a report."""
        self.beat_s = self._clock.now_s()
        if self._clock.now_s() - self._looked_at_s >= self._tenure.timing.interval_s:
            await self._look()
        now_s = self._clock.now_s()
        if not self._holds():
            self._forget()
            return
        await self._read(now_s)
        observation = await self._observe()
        if self._planner is None and len(self._present) == len(self._names):
            self._begin(now_s)
        if self._planner is None:
            decision = Decision(now_s, HOLD, self._problems.get("read", "what scales the roles is not known yet"))
        else:
            decision = await self._decide(self._planner, observation, now_s)
        self.last = replace(decision, pending=(*decision.pending, *self._owed.words(self._names)))
        await self._report(self.last, observation)

    async def _decide(self, planner: Planner, observation: Observation | None, now_s: float) -> Decision:
        rolling = [self._names[role] for role, each in self._present.items() if each.is_rolling]
        if rolling:
            return replace(planner.decide(None, now_s), reason=f"{' and '.join(rolling)}: its pods roll out")
        num_owned = sum(each.replicas for each in self._present.values())
        decision = planner.decide(observation, now_s, num_owned)
        if not isinstance(decision.action, Hold):
            self._tell(f"planner: {decision.action.name}: {decision.reason}")
            log.info("planner: %s", json.dumps(decision.facts(), default=str))
        await self._carry_out(planner, decision.action, now_s)
        await self._settle(planner, now_s)
        return decision

    # ------------------------------------------------------------------ what is there

    async def _look(self, *, release: bool = False) -> None:
        """Read the Lease, and write it if it is ours or free."""
        began_s = self._looked_at_s = self._clock.now_s()
        try:
            record, drained = await asyncio.to_thread(self._leases.read)
            step = self._tenure.look(record, self._clock.now_s())
            if isinstance(step, Wait):
                return
            if not isinstance(step, Renew):
                self._forget()  # what we knew is of an earlier tenure
            if self._planner is not None:
                drained = self._planner.draining
            me = "" if release else self._tenure.me
            duration_s = self._tenure.timing.duration_s
            is_ours = await asyncio.to_thread(self._leases.write, step, me, duration_s, drained)
        except _FAILURES as error:
            self._problem("lease", f"the Lease cannot be kept: {error}")
            return
        self._works("lease")
        if not is_ours or release:
            self._tenure.refused()
            return
        self._tenure.written(began_s)
        self._left = drained

    def _forget(self) -> None:
        """We do not hold the Lease, or hold it anew."""
        self._planner, self._owed, self._present, self._ended = None, Owed(), {}, set()

    def _begin(self, now_s: float) -> None:
        """We hold the Lease, and know what is there."""
        self._planner = self._make_planner(self._config, sum(each.replicas for each in self._present.values()))
        self._planner.adopt(self._left, now_s)
        self._tell(f"planner: {self._tenure.me} holds the Lease")
        for name in self._left:
            self._later(self._drain(name))

    async def _read(self, now_s: float) -> None:
        if self._present and now_s - self._read_at_s < READ_INTERVAL_S:
            return
        try:
            found = {role: await asyncio.to_thread(self._scales.read, name) for role, name in self._names.items()}
        except _FAILURES as error:
            self._problem("read", f"what scales the roles cannot be read: {error}")
            return
        self._present, self._read_at_s = found, now_s
        self._works("read")

    async def _observe(self) -> Observation | None:
        """What the routers report now; None: none answers, or they are of another release."""
        at_s = self._clock.now_s()
        reports = sorted(await self._routers.reports(), key=lambda each: str(each.get("router", {}).get("incarnation")))
        if not reports:
            return None
        try:
            whole = joined_report(reports[0], reports[1:])
            self._workers = {str(worker["worker_id"]): worker for worker in whole["workers"]}
            return self._in_order(observed(whole, at_s))
        except (KeyError, TypeError, ValueError):
            return None

    def _in_order(self, observation: Observation) -> Observation:
        """With the order in which workers can go."""
        replicas = {role: each.replicas for role, each in self._present.items()}
        after = self._pods.order([worker.name for worker in observation.workers], replicas)
        workers = tuple(replace(worker, goes_after=after.get(worker.name, "")) for worker in observation.workers)
        return replace(observation, workers=workers)

    # ------------------------------------------------------------------ what is done

    async def _carry_out(self, planner: Planner, action: Action, now_s: float) -> None:
        if isinstance(action, Start):
            for role, count in Counter(action.roles).items():
                self._owed.add(role, count, now_s)
        elif isinstance(action, ChangeRole):
            name, role = action.worker, action.role
            await self._try(lambda: self._operator.set_role(self._address(name), role), f"{name} keeps its role")
        elif isinstance(action, Drain):
            for name in action.workers:
                self._later(self._drain(name))
        elif isinstance(action, Stop):
            owner = self._pods.owner_of(action.worker)
            if owner is None:
                names = " or ".join(self._names.values())
                self._tell(f"planner: {action.worker} is no pod of {names}: it is not ended")
                return
            self._ended.add(action.worker)
            self._owed.add(owner, -1, now_s)
            await self._look()

    async def _settle(self, planner: Planner, now_s: float) -> None:
        """Ask for the numbers of pods that are owed, one call for each Deployment."""
        for role, count in self._owed.due(now_s).items():
            if not self._holds():
                return
            if count < 0 and self._ended.intersection(self._left):
                continue  # the Lease still names a worker that is ended: a successor would end another one for it
            name = self._names[role]
            try:
                replicas = await asyncio.to_thread(self._scales.change, name, count)
            except _FAILURES as error:
                problem = f"the scale of {name} is not changed: {self._told(error)}"
                self._problem("scale", problem)
                if given_up := self._owed.refused(role, self._told(error), self._clock.now_s()):
                    planner.refused(given_up, problem, self._clock.now_s())
                continue
            self._owed.taken(role)
            self._works("scale")
            self._present[role] = self._present[role]._replace(replicas=replicas)
            self._tell(f"planner: {name} has {replicas} replicas now")

    async def _drain(self, name: str) -> None:
        timeout_s = self._config.drain_timeout_s
        await self._try(lambda: self._operator.drain(self._address(name), timeout_s), f"{name} does not drain")

    async def _try(self, call: Callable[[], Awaitable[Any]], otherwise: str) -> None:
        try:
            await call()
        except TwostrokeError as error:
            self._tell(f"planner: {otherwise}: {error}")

    async def _report(self, decision: Decision, observation: Observation | None) -> None:
        live = [worker for worker in observation.workers if worker.is_live] if observation is not None else []
        actual = Counter(worker.role.value for worker in live)
        report = report_of(self._incarnation, decision, actual, self.events)
        told = [self._operator.report(address, report) for address in self._routers.addresses]
        for answer in await asyncio.gather(*told, return_exceptions=True):
            if isinstance(answer, BaseException):
                log.debug("a router did not take the planner's report: %s", answer)

    # ------------------------------------------------------------------ inside

    def _holds(self) -> bool:
        return self._tenure.holds(self._clock.now_s())

    def _address(self, name: str) -> str:
        """The address of a worker.

        Raises:
            Unavailable: no router knows it.
        """
        worker = self._workers.get(name)
        if worker is None:
            raise Unavailable(f"no router knows {name}")
        return str(worker["address"])

    def _later(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _tell(self, event: str) -> None:
        self.events.append(event)
        log.info("%s", event)

    def _problem(self, what: str, problem: str) -> None:
        """Say what does not work, once until it works again."""
        if self._problems.get(what) != problem:
            self._problems[what] = problem
            self.events.append(f"planner: {problem}")
            log.warning("planner: %s", problem)

    def _works(self, what: str) -> None:
        if self._problems.pop(what, None) is not None:
            self._tell(f"planner: {what} works again")

    def _told(self, error: ApiAway | ApiRefused) -> str:
        """A refusal with its remedy."""
        if isinstance(error, ApiRefused) and error.status == 403:
            return f"{error}; the planner's account needs get and patch of {self._pods.resource} there"
        return str(error)
