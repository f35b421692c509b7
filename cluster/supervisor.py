"""Supervisor: starts a plan, restarts its members, stops it. Only it restarts processes; restarts.py decides when."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..core.clock import Clock, MonotonicClock
from ..core.errors import TwostrokeError, Unavailable
from ..core.ports import target
from ..core.tls.callers import Caller
from ..kv.keys import supervisor_key
from .certificates import certificates_of, face_tls
from .config import Config
from .deployment.keeper import Deployment
from .deployment.record import Changing, MemberRecord, Ports
from .devices import Devices
from .launch.last_words import DeviceEnd, ProcessEnd, end_of_typed
from .launch.launcher import Site
from .launch.launchers import launcher_class
from .lives import Seen, lives_of, looks
from .operations.changes import Changes
from .operations.operator import Operator
from .operations.room import Room
from .operations.scaler import Scaler
from .placement import Plan, ProcessPlan
from .restarts import Patience, RestartBook, Standing, Use
from .settled import reachable, with_fixed_ports, with_operator, with_ports

log = logging.getLogger(__name__)

Say = Callable[[str], None]

_POLL_S = 0.1  # while a member is starting
_WATCH_S = 1.0  # otherwise
_STOPPED_S = 0.1  # between two looks at the processes themselves
_START_TRIES = 3
_SILENT_LOOKS = 4  # per router: so many looks in a row without an answer count against all routers
_END_S = 3.0  # from the end of a process until its launcher has reported it


class Supervisor:
    """One cluster on this machine, from `start` to `stop`."""

    def __init__(
        self,
        config: Config,
        plan: Plan,
        clock: Clock | None = None,
        say: Say | None = None,
        deployment: Deployment | None = None,
    ) -> None:
        """`deployment`: the members outlive this process, or have outlived another one. None: they end with it."""
        self._plan, self._deployment = plan, deployment
        self._clock = clock or MonotonicClock()
        self._say = say or log.info
        self._operator_key = supervisor_key(config.cluster.key)  # to ask the routers, which keep only digests of keys
        settled = with_operator(plan.settle(config), self._operator_key)
        if deployment is not None and deployment.is_adopted:
            self.config, internal_ports = with_ports(settled, deployment.record.ports)
            certificates = certificates_of(self.config, deployment.tls)
        else:
            self.config, internal_ports = with_fixed_ports(settled)
            certificates = certificates_of(self.config)
        face_tls(self.config.router)  # raises now, if its files cannot be used
        self.tls_remark = certificates.remark  # for the operator
        router_host = next(member.host for member in plan.members if member.kind == "router")
        site = Site(
            *(self.config, plan.model.directory, plan.model.name, internal_ports, certificates.by_role),
            router_host,
            *(() if deployment is None else (deployment.name, deployment.namespace, deployment.logs)),
        )
        self.internal_addresses = site.internal_addresses  # of the routers
        self._launcher = launcher_class(self.config)(site)
        cluster = self.config.cluster
        draining_s = max(cluster.replace_after_s, cluster.drain_timeout_s)
        self._membership = RestartBook(patience=Patience(cluster.replace_after_s, draining_s, cluster.ready_timeout_s))
        self._life: dict[str, str] = {}  # incarnation of each member that serves or served
        self._ended_life: dict[str, str] = {}  # incarnation whose process has ended; the router may not know yet
        self._changed = asyncio.Event()
        self._started = asyncio.Event()  # a member is starting
        self._settled = asyncio.Event()  # every member serves, or the start has failed
        self._replaced: set[str] = set()  # members that we killed and whose end is not reported yet
        self._startup_error = ""
        self._tasks: list[asyncio.Task[None]] = []
        self._members = {member.name: member for member in plan.members}
        self._devices = Devices(plan.spare_gpus)
        self._cordons: dict[str, str] = {}  # members whose present life reports a cordoned GPU, with the reason
        self._going: dict[str, bool] = {}  # members that leave for good; True: their place is free then
        self._processes: set[str] = set()  # members whose process was started and has not ended
        self._news = asyncio.Event()  # replaced whenever a member changed
        self._num_silent = 0  # looks in a row that no router answered
        self.seen: Seen | None = None  # the router's last report
        self.room = Room(plan)
        operator = Operator(self.config.cluster.key, site.tls_of(Caller.OPERATOR))
        self.changes = Changes(self, operator)
        if deployment is not None and deployment.is_adopted:
            self._restore(deployment.record.now)
        elif deployment is not None:
            ports = Ports(self.config.router.port, self.config.router.grpc_port, internal_ports)
            made = None if config.cluster.tls is not None else certificates.by_role
            deployment.begin(config, plan, ports, self._present(), made)
        self.scaler: Scaler | None = None
        if self.config.planner.enabled:
            num_configured = len(plan.workers)
            self.scaler = Scaler(self.config.planner, self.changes, num_configured, self._clock, self._say)

    @property
    def http_url(self) -> str:
        """URL of the OpenAI API."""
        scheme = "https" if self.config.router.ssl_certfile else "http"
        return f"{scheme}://{target(reachable(self.config.router.host), self.config.router.port)}"

    @property
    def grpc_address(self) -> str:
        """host:port of the gRPC API, for the SDK."""
        return target(reachable(self.config.router.host), self.config.router.grpc_port)

    @property
    def model_name(self) -> str:
        """Name that clients call the model."""
        return self._plan.model.name

    async def start(self) -> None:
        """Start every member and wait until all of them serve.

        Raises:
            Unavailable: a member cannot start, or readiness took longer than `cluster.ready_timeout_s`.
        """
        for name in self._members:
            self._membership.want(name, self._clock.now_s())
        patience_s = self.config.cluster.ready_timeout_s
        if self._deployment is not None and self._deployment.is_adopted:
            await self._adopt(self._deployment.living, patience_s)
            return
        try:
            async with asyncio.timeout(patience_s):
                await self._start_due()  # before this process uses gRPC, because a launcher may fork
                self._tasks = self._watches()
                await self._settled.wait()
        except TimeoutError:
            raise Unavailable(self._lateness(patience_s), retry_after_s=5.0) from None
        if self._startup_error:
            raise Unavailable(self._startup_error, retry_after_s=30.0)
        self._plan_from_now()

    def _plan_from_now(self) -> None:
        if self.scaler is not None:
            self._tasks.append(asyncio.create_task(self.scaler.run()))

    async def stop(self) -> None:
        """Stop routers first (they refuse new requests and let streams end), then workers; remove all files."""
        for name in self._members:
            self._membership.stop(name)
        for task in self._tasks:
            task.cancel()
        self.changes.close()
        grace_s = self.config.cluster.drain_timeout_s
        routers = [m.name for m in self._members.values() if m.kind == "router"]
        workers = [m.name for m in self._members.values() if m.kind == "worker"]
        await asyncio.gather(*(self._launcher.stop(name, grace_s) for name in routers))
        await asyncio.gather(*(self._launcher.stop(name, grace_s) for name in workers))
        await self._launcher.close()

    async def abort(self) -> None:
        """End all members at once, without a drain, and remove all files."""
        for name in self._members:
            self._membership.stop(name)
        for task in self._tasks:
            task.cancel()
        self.changes.close()
        await self._launcher.abort()

    async def leave(self) -> None:
        """Let go of the members of a deployment, which serve on. This process must end next, by `leave`."""
        for task in self._tasks:
            task.cancel()
        self.changes.close()
        await self._launcher.leave()

    # ------------------------------------------------------------------ a deployment (deployment/)

    async def _adopt(self, living: dict[str, str], patience_s: float) -> None:
        """Supervise the living members, and start the others. Waits until all serve, or for `patience_s`."""
        self._settled.set()  # a member that does not come back ends no cluster that serves
        for name, handle in living.items():
            self._membership.started(name, self._clock.now_s())
            self._processes.add(name)
            if await self._launcher.adopt(self._members[name], handle, self._ended):
                number, _, actor = handle.partition(" ")
                self._say(f"{name} lives and is adopted ({f'process {number}' if number.isdecimal() else actor})")
            else:
                self._ended(name, ProcessEnd("it ended before it was adopted"))
        for name in [name for name in self._going if name not in living]:
            self._forget(name)
        self._tasks = self._watches()
        for name in self._going:
            self._membership.stop(name)
            self._say(f"{name} was going; its drain begins anew")
            self.changes.later(self.remove(name, self.config.cluster.drain_timeout_s))
        end_s = self._clock.now_s() + patience_s
        while self._membership.starting() and self._clock.now_s() < end_s:
            await self.news(end_s - self._clock.now_s())
        for name in self._membership.starting():
            self._say(f"{name} does not serve yet; it is started again and again")
        self._plan_from_now()

    def _restore(self, now: Changing) -> None:
        """Take the members as another supervisor had them."""
        self._members = {name: member.plan for name, member in now.members.items()}
        self._going = {name: member.frees_place for name, member in now.members.items() if member.is_going}
        self._devices = Devices(now.spare_gpus)
        self.room.restore(now.free_places, now.next_numbers)

    def _present(self) -> Changing:
        members = {
            name: MemberRecord(member, self._launcher.handle(name), name in self._going, self._going.get(name, True))
            for name, member in self._members.items()
        }
        return Changing(members, self._devices.spare, self.room.free, self.room.next_numbers)

    def _record(self) -> None:
        """Write down what another supervisor must know, if there can be one."""
        if self._deployment is not None:
            self._deployment.note(self._present())

    # ------------------------------------------------------------------ changes of the members (operations/)

    @property
    def members(self) -> dict[str, ProcessPlan]:
        """All members, by name."""
        return dict(self._members)

    @property
    def cordoned_gpus(self) -> dict[int, str]:
        """GPUs that no worker may use, with the reason."""
        return self._devices.cordoned

    def standing(self, name: str) -> Standing | None:
        """State of a member; None: there is none of this name."""
        return self._membership.standing(name) if name in self._members else None

    @property
    def num_owned(self) -> int:
        """Number of workers that run or will be restarted."""
        return sum(1 for m in self._members.values() if m.kind == "worker" and self._membership.owned(m.name))

    async def news(self, timeout_s: float) -> None:
        """Wait until a member may have changed, or for `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), max(0.0, timeout_s))

    def add(self, member: ProcessPlan) -> None:
        """Start a further member, and restart it from now on."""
        self._members[member.name] = member
        if member.device == "cuda":
            self._devices.take(member.gpu)
        self._membership.want(member.name, self._clock.now_s())
        self._record()
        self._changed.set()

    def let_go(self, name: str, *, frees_place: bool = True) -> None:
        """Restart a member never again. Its end, whenever it comes, is its last."""
        self._membership.stop(name)
        self._going[name] = frees_place
        self._record()

    async def remove(self, name: str, grace_s: float) -> None:
        """End a member that was let go, and forget it. Its process drains for `grace_s`."""
        await self._launcher.stop(name, grace_s)
        await self._end_of(name)
        self._forget(name)  # a member that waited for its restart had no process, so nobody reported an end

    async def again(self, name: str, grace_s: float) -> None:
        """End a member's process, and start the member again when it has ended."""
        self._membership.stop(name)
        await self._launcher.stop(name, grace_s)
        await self._end_of(name)
        self._membership.want(name, self._clock.now_s())
        self._changed.set()

    def keep_stopped(self, name: str) -> None:
        """Restart a member no more, until `again`."""
        self._membership.stop(name)

    def settle_in(self, name: str, metrics_port: int | None) -> None:
        """The member that had this port is gone: the next process of this one has it."""
        self._members[name] = replace(self._members[name], metrics_port=metrics_port)

    async def _end_of(self, name: str) -> None:
        """Wait until the launcher has reported the end of a member's process."""
        end_s = self._clock.now_s() + _END_S
        while name in self._processes and self._clock.now_s() < end_s:
            await self.news(end_s - self._clock.now_s())

    def _forget(self, name: str) -> None:
        if name not in self._members:
            return
        member, frees_place = self._members.pop(name), self._going.pop(name, True)
        self._membership.forget(name)
        for told in (self._life, self._ended_life, self._cordons):
            told.pop(name, None)
        if frees_place:
            self.room.give_back(member)
        if member.device == "cuda":
            self._devices.give_back(member.gpu)
        self._tell()

    def _tell(self) -> None:
        self._record()
        self._news.set()
        self._news = asyncio.Event()

    def _lateness(self, patience_s: float) -> str:
        """Message about members that are not ready: the last line of each one's log, and the remedy."""
        late = [name for name in self._members if self._membership.standing(name) is not Standing.READY]
        said = [f"{name} (its last line: {line})" if (line := self._launcher.said(name)) else name for name in late]
        return (
            f"not ready within {patience_s:g} s: {', '.join(said)}; a large model or a slow disk needs more: "
            "raise cluster.ready_timeout_s (TWOSTROKE__CLUSTER__READY_TIMEOUT_S)"
        )

    def _watches(self) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(watch()) for watch in (self._keep, self._observe, self._replace_stopped)]

    async def _replace_stopped(self) -> None:
        """End processes that a signal has stopped: they hold connections and serve none of them."""
        while True:
            for name in list(self._processes):
                is_stopped = self._launcher.is_stopped(name)
                if name in self._members and self._membership.stands_still(name, is_stopped=is_stopped):
                    await self._replace(name, "was stopped by a signal (SIGSTOP)")
            await asyncio.sleep(_STOPPED_S)

    async def _replace(self, name: str, why: str) -> None:
        """End a member's process; its end is reported, and it is started again."""
        self._say(f"{name} {why}; replacing it")
        self._replaced.add(name)
        await self._launcher.kill(name)

    async def _keep(self) -> None:
        """Start due members; wait until a member ends or a back-off is over; repeat."""
        while True:
            self._changed.clear()
            await self._start_due()
            due_s = self._membership.next_due_s()
            wait_s = None if due_s is None else max(0.0, due_s - self._clock.now_s())
            try:
                await asyncio.wait_for(self._changed.wait(), wait_s)
            except TimeoutError:
                continue

    async def _start_due(self) -> None:
        for name in self._membership.due(self._clock.now_s()):
            if name not in self._members or self._membership.standing(name) is not Standing.WAITING:
                continue  # let go while another was started
            self._membership.started(name, self._clock.now_s())
            self._started.set()
            self._processes.add(name)
            try:
                await self._launcher.start(self._members[name], self._ended)
            except TwostrokeError as error:
                self._ended(name, end_of_typed(error))
            self._record()

    def _ended(self, name: str, end: ProcessEnd) -> None:
        self._processes.discard(name)
        if name not in self._members:
            return
        if name in self._going:
            self._forget(name)
            return
        if name in self._replaced:
            self._replaced.remove(name)
            end = ProcessEnd("killed, to be replaced")
        self._ended_life[name] = self._life.get(name, "")
        cordon = self._cordons.pop(name, None)
        if cordon is not None:  # whatever ended it in the end
            end = ProcessEnd(cordon, device=DeviceEnd.CORDONED)
        if end.device is not DeviceEnd.NONE and not self._find_device(name, end):
            return
        due_s = self._membership.ended(name, end.cause, self._clock.now_s())
        self._tell()
        if due_s is not None:
            self._note_end(name, end, max(0.0, due_s - self._clock.now_s()))
        self._changed.set()

    def _find_device(self, name: str, end: ProcessEnd) -> bool:
        """After a fault of a member's GPU: False, and the member is not started again, if it has no usable one."""
        gpu, now_s, cause = self._members[name].gpu, self._clock.now_s(), end.cause
        if end.device is DeviceEnd.FAULT:
            if not self._devices.faulted(gpu, now_s):
                return True
            cause = f"{cause}; the last of too many faults of this GPU"
        spare = self._devices.cordon(gpu, cause)
        if spare is not None:
            self._say(f"{name} moves from GPU {gpu} to GPU {spare}: {cause}")
            self._members[name] = replace(self._members[name], gpu=spare)
            return True
        self._membership.withhold(name, cause, now_s)
        self._say(f"{name} is not started again, because no other GPU is free: {cause}")
        if not self._settled.is_set():
            self._startup_error = f"{name} cannot start: {cause}"
            self._settled.set()
        self._changed.set()
        return False

    def _note_end(self, name: str, end: ProcessEnd, wait_s: float) -> None:
        """Report the end of a member. During the start, give up if another attempt would end the same way."""
        if not self._settled.is_set():
            if end.is_certain:
                self._startup_error = f"{name} cannot start: {end.cause}"
            elif self._membership.restarts(name) >= _START_TRIES:
                self._startup_error = f"{name} keeps dying on its way up: {end.cause}"
            if self._startup_error:
                self._settled.set()
                return
        self._say(f"{name} ended ({end.cause}); starting it again in {wait_s:.1f} s")

    async def _observe(self) -> None:
        """Follow what the routers report of all members, and replace those that are unavailable for too long."""
        key = self._operator_key if self.config.router.has_keys else None
        async with contextlib.aclosing(looks(self.config, self.grpc_address, key)) as reports:
            async for cluster in reports:
                self._started.clear()
                self._note(cluster)
                for name in self._membership.overdue(self._clock.now_s()):
                    is_draining = self._membership.use(name) is Use.DRAINS
                    what = "drains, and nobody here asked for it" if is_draining else "runs but cannot be used"
                    await self._replace(name, what)
                if not self._membership.starting():
                    self._settled.set()
                with contextlib.suppress(TimeoutError):
                    wait_s = _POLL_S if self._membership.starting() else _WATCH_S
                    await asyncio.wait_for(self._started.wait(), wait_s)

    def _note(self, cluster: dict[str, Any] | None) -> None:
        """Record the router's report on every member; without an answer the state of workers is unknown."""
        lives = lives_of(cluster)
        now_s = self._clock.now_s()
        self._membership.looked(now_s)
        self.seen = None if cluster is None else Seen(cluster, now_s)
        self._num_silent = self._num_silent + 1 if cluster is None else 0
        for name in self._members:
            is_new = name in lives and lives[name].incarnation != self._ended_life.get(name)
            if is_new and lives[name].use is Use.SERVES and name in self._membership.starting():
                self._life[name] = lives[name].incarnation
                self._membership.ready(name, now_s)
                arithmetic = lives[name].arithmetic
                self._say(f"{name} is ready" + (f": {arithmetic}" if arithmetic else ""))
            if is_new and lives[name].cordon:
                self._cordons[name] = lives[name].cordon
            if is_new and lives[name].role is not None:
                # `twostroke role` asks the worker itself. Its next process starts with the role of this one, unless the
                # process ends before the role is seen here.
                self._members[name] = replace(self._members[name], role=lives[name].role)
            is_heard = cluster is not None or (self._members[name].kind == "router" and self._are_silent())
            use = lives[name].use if is_new else Use.NONE
            self._membership.seen(name, use if is_heard else None, now_s)
        self._tell()

    def _are_silent(self) -> bool:
        """True if a look without an answer says something about every router.

        Of several, the kernel chose the one that did not answer; the next connection may lead to another, which says
        which of them is missing.
        """
        number = self.config.cluster.routers
        return number == 1 or self._num_silent >= _SILENT_LOOKS * number
