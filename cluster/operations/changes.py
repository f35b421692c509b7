"""Changes of a running cluster: a worker is added, retired, restarted, or gets another role. Drives the supervisor.

A worker that goes is restarted no more from the first moment, then drains, then its process ends. What the planner or
an operator wants is decided elsewhere (planner/, rolling.py); here are the calls, the waits and their deadlines.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, NamedTuple

from ...core.errors import InvalidRequest, TwostrokeError, Unavailable
from ...core.request import Role
from ...protos import worker_pb2
from ...worker.machine import machine_facts
from ..placement import ProcessPlan
from ..planner.observation import Observation, observed
from ..restarts import Standing
from .operator import Operator
from .rolling import InPlace, Refused, Replace, how_to_restart, order_of, routers_of
from .room import NoRoom

if TYPE_CHECKING:
    from ..supervisor import Supervisor

Say = Callable[[str], None]

PROGRESS_S = 1.0
END_S = 8.0  # for the process of a worker without work to end by itself: its engine may need 5 s


class Retired(NamedTuple):
    """How a worker went."""

    num_moved: int  # streams that had not ended by the deadline; they go on at other workers
    error: str = ""  # it did not drain; its process was ended


class Changes:
    """Acts on one cluster's members. One rolling restart at a time; the planner waits for it."""

    def __init__(self, supervisor: Supervisor, operator: Operator) -> None:
        self._supervisor, self._operator = supervisor, operator
        self._tasks: set[asyncio.Task[Any]] = set()
        self.rolling = False  # a rolling restart is under way

    def close(self) -> None:
        """Cancel what is under way."""
        for task in self._tasks:
            task.cancel()

    def later(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run `work` beside the caller, until `close`."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ------------------------------------------------------------------ what is there

    def observation(self) -> Observation | None:
        """The planner's observation in the router's last report; None: there is none, or it is of another release."""
        seen = self._supervisor.seen
        try:
            return None if seen is None else observed(seen.cluster, seen.at_s)
        except (KeyError, TypeError, ValueError):
            return None

    @property
    def num_owned(self) -> int:
        """Number of workers that run or will be restarted."""
        return self._supervisor.num_owned

    def is_serving(self, name: str) -> bool:
        """True if a member serves, by the supervisor's last look."""
        return self._supervisor.standing(name) is Standing.READY

    def serving_by_role(self) -> dict[str, int]:
        """Number of workers that serve, by role."""
        workers = [m for m in self._supervisor.members.values() if m.kind == "worker" and self.is_serving(m.name)]
        return dict(Counter(str(worker.role) for worker in workers))

    # ------------------------------------------------------------------ more, and fewer

    async def add(self, role: Role) -> ProcessPlan | NoRoom:
        """Start a worker of this role, if there is a place for it. Returns before it serves."""
        supervisor = self._supervisor
        nodes = await supervisor.machines()
        here = [node.machine for node in nodes if node.is_here]
        machine = here[0] if here else await asyncio.to_thread(machine_facts)
        members = list(supervisor.members.values())
        loading = [m for m in members if m.kind == "worker" and supervisor.standing(m.name) is not Standing.READY]
        found = supervisor.room.take(role, machine, members, supervisor.cordoned_gpus, loading=loading, nodes=nodes)
        if isinstance(found, ProcessPlan):
            supervisor.add(found)
        return found

    async def want(self, num_more: int) -> str:
        """Ask for machines for all workers that run or will be restarted, and for so many more.

        Returns what was asked; empty: nobody can be asked.
        """
        supervisor = self._supervisor
        owned = [m for m in supervisor.members.values() if m.kind == "worker" and supervisor.owns(m.name)]
        return await supervisor.want([*owned, *supervisor.room.places_to_come(num_more)])

    async def serves(self, name: str, timeout_s: float) -> None:
        """Wait until a member serves.

        Raises:
            Unavailable: it does not within `timeout_s`, or cannot be started.
        """
        loop = asyncio.get_running_loop()
        end_s = loop.time() + timeout_s
        while (standing := self._supervisor.standing(name)) is not Standing.READY:
            if standing in (None, Standing.WITHHELD):
                raise Unavailable(f"{name} cannot be started; the log of its process has the reason")
            if loop.time() >= end_s:
                raise Unavailable(f"{name} does not serve after {timeout_s:g} s (cluster.ready_timeout_s)")
            await self._supervisor.news(end_s - loop.time())

    async def withdraw(self, name: str) -> None:
        """End a worker that never served, and forget it."""
        self._supervisor.let_go(name)
        await self._supervisor.remove(name, 0.0)

    async def retire(self, name: str, timeout_s: float, say: Say | None = None, *, frees_place: bool = True) -> Retired:
        """Let a worker drain for `timeout_s`, end it, and forget it. `say`: progress, about once a second.

        Raises:
            InvalidRequest: no worker of this cluster has this name, or it goes already.
        """
        self._check(name)
        self._supervisor.let_go(name, frees_place=frees_place)
        retired = await self.drain(name, timeout_s, say)
        await self.end(name)
        return retired

    async def drain(self, name: str, timeout_s: float, say: Say | None = None) -> Retired:
        """Have a worker take no new work and wait for what it has. It must have been let go before."""
        address = self._address(name)
        if address is None:
            return Retired(0, "the router does not know it")
        draining = asyncio.create_task(self._operator.drain(address, timeout_s))
        self._tasks.add(draining)
        draining.add_done_callback(self._tasks.discard)
        try:
            while not (await asyncio.wait({draining}, timeout=PROGRESS_S))[0]:
                if say is not None:
                    say(f"{name} drains: {self._work(name)}")
            return Retired(draining.result())
        except TwostrokeError as error:
            return Retired(0, str(error))
        finally:
            draining.cancel()

    async def undrain(self, name: str) -> None:
        """Have a worker that was let go and drains take new work again, and restart it again.

        Raises:
            Unavailable: the router does not know it, or it ends already.
        """
        address = self._address(name)
        if address is None:
            raise Unavailable(f"the router does not know {name}")
        await self._operator.undrain(address)
        self._supervisor.keep(name)

    async def end(self, name: str) -> None:
        """End the process of a worker that was let go and has no work."""
        await self._supervisor.remove(name, END_S)

    def let_go(self, name: str) -> None:
        """Restart a worker no more.

        Raises:
            InvalidRequest: no worker of this cluster has this name, or it goes already.
        """
        self._check(name)
        self._supervisor.let_go(name)

    async def set_role(self, name: str, role: Role) -> None:
        """Give a worker another role, also for its next process.

        Raises:
            Unavailable: it is not known, or did not answer.
        """
        address = self._address(name)
        if address is None:
            raise Unavailable(f"the router does not know {name}")
        await self._operator.set_role(address, role)

    async def report(self, report: worker_pb2.SupervisorReport) -> None:
        """Tell every router what is wanted.

        Raises:
            Unavailable: a router did not answer; the others have it.
        """
        addresses = self._supervisor.internal_addresses
        told = [self._operator.report(address, report) for address in addresses]
        for answer in await asyncio.gather(*told, return_exceptions=True):
            if isinstance(answer, BaseException):
                raise answer

    # ------------------------------------------------------------------ all of them, one after the other

    async def restart_all(self, say: Say, *, force: bool = False) -> int:
        """Restart every worker, one at a time; a new one serves before the old one goes, where both fit.

        Then the routers that share the ports, one at a time: the others take the connections. One alone is left out.

        Returns the number of streams that had to go on at another worker. After an error the rest is left as it is.

        Raises:
            InvalidRequest: a rolling restart is under way already.
            ConfigError: a worker has no stand-in, there is no room for one, and `force` is not set.
            Unavailable: a new worker does not serve.
        """
        if self.rolling:
            raise InvalidRequest("a rolling restart is under way already; wait for its end")
        self.rolling = True
        try:
            num_moved = 0
            names = order_of(self._supervisor.members.values())
            routers = routers_of(self._supervisor.members.values())

            def told(place: int) -> Say:
                return lambda line: say(f"[{place}/{len(names) + len(routers)}] {line}")

            for number, name in enumerate(names, 1):
                num_moved += await self._restart(name, told(number), force)
            for number, name in enumerate(routers, 1 + len(names)):
                await self._restart_router(name, told(number))
            if not routers:
                say("the router is left out: no other one takes its place (cluster.routers)")
            return num_moved
        finally:
            self.rolling = False

    async def _restart(self, name: str, say: Say, force: bool) -> int:
        supervisor, cluster = self._supervisor, self._supervisor.config.cluster
        if supervisor.standing(name) in (None, Standing.STOPPED):
            say(f"{name} has gone meanwhile")
            return 0
        members = supervisor.members
        machine = await asyncio.to_thread(machine_facts)
        beside = supervisor.room.beside(members[name], machine, members.values(), supervisor.cordoned_gpus)
        serving = [m for m in members.values() if m.kind == "worker" and supervisor.standing(m.name) is Standing.READY]
        how = how_to_restart(members[name], serving, beside, force=force)
        if isinstance(how, Refused):
            raise how.error
        if isinstance(how, InPlace):
            say(f"{name} restarts in its place: {how.reason}")
            supervisor.keep_stopped(name)
            retired = await self.drain(name, cluster.drain_timeout_s, say)
            await supervisor.again(name, END_S)
            await self.serves(name, cluster.ready_timeout_s)
            say(f"{name} serves again{_moved(retired)}")
            return retired.num_moved
        assert isinstance(how, Replace)
        new = how.member
        supervisor.add(new)
        say(f"{new.name} starts, in place of {name}")
        try:
            await self.serves(new.name, cluster.ready_timeout_s)
        except TwostrokeError:
            supervisor.let_go(new.name, frees_place=False)
            await supervisor.remove(new.name, 0.0)
            raise
        retired = await self.retire(name, cluster.drain_timeout_s, say, frees_place=False)
        supervisor.settle_in(new.name, members[name].metrics_port)
        say(f"{new.name} serves, {name} is gone{_moved(retired)}")
        return retired.num_moved

    async def _restart_router(self, name: str, say: Say) -> None:
        cluster = self._supervisor.config.cluster
        say(f"{name} drains; the other routers take new connections")
        await self._supervisor.again(name, cluster.drain_timeout_s)
        await self.serves(name, cluster.ready_timeout_s)
        say(f"{name} serves again")

    # ------------------------------------------------------------------ inside

    def _check(self, name: str) -> None:
        workers = [m.name for m in self._supervisor.members.values() if m.kind == "worker"]
        if name not in workers:
            raise InvalidRequest(f"no worker is called {name!r}; there are: {', '.join(workers) or 'none'}")
        if self._supervisor.standing(name) is Standing.STOPPED:
            raise InvalidRequest(f"{name} goes already")

    def _address(self, name: str) -> str | None:
        seen = self._supervisor.seen
        worker = None if seen is None else seen.worker(name)
        return None if worker is None else str(worker["address"])

    def _work(self, name: str) -> str:
        seen = self._supervisor.seen
        worker = None if seen is None else seen.worker(name)
        if worker is None:
            return "its load is not known"
        load = worker["load"]
        return f"{load['running']} sequences run, {load['waiting']} wait, {load['queued_prefill_tokens']} prompt tokens"


def _moved(retired: Retired) -> str:
    if retired.error:
        return f"; it did not drain ({retired.error}), its streams go on at other workers"
    return f"; {retired.num_moved} streams go on at other workers" if retired.num_moved else ""
