"""Supervisor: starts a plan, restarts its members, stops it. Only it restarts processes.

members.py knows the members and what their ends and the routers' reports change, restarts.py when one is started again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

from ..core.clock import Clock, MonotonicClock
from ..core.errors import TwostrokeError, Unavailable
from ..core.ports import target
from ..core.tls.callers import Caller
from ..kv.keys import supervisor_key
from .certificates import certificates_of, face_tls
from .config import Config
from .deployment.keeper import Deployment
from .deployment.record import Ports
from .launch.last_words import ProcessEnd, end_of_typed
from .launch.launcher import Site
from .launch.launchers import launcher_class
from .lives import Seen, lives_of, looks
from .members import Members
from .nodes import Node
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
_SHOWN_MEMBERS = 4  # of those that a start waits for
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
        patience = Patience(cluster.replace_after_s, draining_s, cluster.ready_timeout_s)
        self._members = Members(plan, RestartBook(patience=patience))
        self._changed = asyncio.Event()
        self._started = asyncio.Event()  # a member is starting
        self._settled = asyncio.Event()  # every member serves, or the start has failed
        self._startup_error = ""
        self._tasks: list[asyncio.Task[None]] = []
        self._news = asyncio.Event()  # replaced whenever a member changed
        self._num_silent = 0  # looks in a row that no router answered
        self.seen: Seen | None = None  # the router's last report
        operator = Operator(self.config.cluster.key, site.tls_of(Caller.OPERATOR))
        self.changes = Changes(self, operator)
        if deployment is not None and deployment.is_adopted:
            self._members.restore(deployment.record.now)
        elif deployment is not None:
            ports = Ports(self.config.router.port, self.config.router.grpc_port, internal_ports)
            made = None if config.cluster.tls is not None else certificates.by_role
            deployment.begin(config, plan, ports, self._members.present(self._launcher.handle), made)
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

    @property
    def awaited(self) -> str:
        """What a start waits for now, for people: the launcher's own start, or members that do not serve yet."""
        late = self._late()
        shown = [*late[:_SHOWN_MEMBERS], *([f"{len(late) - _SHOWN_MEMBERS} more"] if late[_SHOWN_MEMBERS:] else [])]
        return self._launcher.opening() or ", ".join(shown)

    async def start(self) -> None:
        """Start every member and wait until all of them serve.

        Raises:
            Unavailable: a member cannot start, or readiness took longer than `cluster.ready_timeout_s`.
        """
        for name in self._members.plans:
            self._members.book.want(name, self._clock.now_s())
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
        for name in self._members.plans:
            self._members.book.stop(name)
        for task in self._tasks:
            task.cancel()
        self.changes.close()
        grace_s = self.config.cluster.drain_timeout_s
        for kind in ("router", "worker"):
            names = self._members.of_kind(kind)
            await asyncio.gather(*(self._launcher.stop(name, grace_s) for name in names))
        await self._launcher.close()

    async def abort(self) -> None:
        """End all members at once, without a drain, and remove all files."""
        for name in self._members.plans:
            self._members.book.stop(name)
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
            self._members.started(name, self._clock.now_s())
            if await self._launcher.adopt(self._members.plans[name], handle, self._ended):
                number, _, actor = handle.partition(" ")
                self._say(f"{name} lives and is adopted ({f'process {number}' if number.isdecimal() else actor})")
            else:
                self._ended(name, ProcessEnd("it ended before it was adopted"))
        for name in [name for name in self._members.going if name not in living]:
            self._forget(name)
        self._tasks = self._watches()
        for name in self._members.going:
            self._members.book.stop(name)
            self._say(f"{name} was going; its drain begins anew")
            self.changes.later(self.remove(name, self.config.cluster.drain_timeout_s))
        end_s = self._clock.now_s() + patience_s
        while self._members.book.starting() and self._clock.now_s() < end_s:
            await self.news(end_s - self._clock.now_s())
        for name in self._members.book.starting():
            self._say(f"{name} does not serve yet; it is started again and again")
        self._plan_from_now()

    def _record(self) -> None:
        """Write down what another supervisor must know, if there can be one."""
        if self._deployment is not None:
            self._deployment.note(self._members.present(self._launcher.handle))

    # ------------------------------------------------------------------ changes of the members (operations/)

    @property
    def members(self) -> dict[str, ProcessPlan]:
        """All members, by name."""
        return dict(self._members.plans)

    @property
    def room(self) -> Room:
        """Places for further workers."""
        return self._members.room

    @property
    def cordoned_gpus(self) -> dict[int, str]:
        """GPUs that no worker may use, with the reason."""
        return self._members.cordoned_gpus

    async def machines(self) -> list[Node]:
        """All machines that answer now. Empty: this one only."""
        return await self._launcher.machines()

    async def want(self, workers: list[ProcessPlan]) -> str:
        """Ask for machines for these workers and no others; returns what was asked."""
        return await self._launcher.want(workers)

    def owns(self, name: str) -> bool:
        """True if a member runs or will be restarted."""
        return self._members.book.owned(name)

    def standing(self, name: str) -> Standing | None:
        """State of a member; None: there is none of this name."""
        return self._members.standing(name)

    @property
    def num_owned(self) -> int:
        """Number of workers that run or will be restarted."""
        return self._members.num_owned

    async def news(self, timeout_s: float) -> None:
        """Wait until a member may have changed, or for `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, timeout_s)):
                await self._news.wait()

    def add(self, member: ProcessPlan) -> None:
        """Start a further member, and restart it from now on."""
        self._members.add(member, self._clock.now_s())
        self._record()
        self._changed.set()

    def let_go(self, name: str, *, frees_place: bool = True) -> None:
        """Restart a member never again. Its end, whenever it comes, is its last."""
        self._members.let_go(name, frees_place=frees_place)
        self._record()

    def keep(self, name: str) -> None:
        """Restart a member again that was let go and has not ended."""
        self._members.keep(name, self._clock.now_s())
        self._record()

    async def remove(self, name: str, grace_s: float) -> None:
        """End a member that was let go, and forget it. Its process drains for `grace_s`."""
        await self._launcher.stop(name, grace_s)
        await self._end_of(name)
        self._forget(name)  # a member that waited for its restart had no process, so nobody reported an end

    async def again(self, name: str, grace_s: float) -> None:
        """End a member's process, and start the member again when it has ended."""
        self._members.book.stop(name)
        await self._launcher.stop(name, grace_s)
        await self._end_of(name)
        self._members.book.want(name, self._clock.now_s())
        self._changed.set()

    def keep_stopped(self, name: str) -> None:
        """Restart a member no more, until `again`."""
        self._members.book.stop(name)

    def settle_in(self, name: str, metrics_port: int | None) -> None:
        """The member that had this port is gone: the next process of this one has it."""
        self._members.set_metrics_port(name, metrics_port)

    async def _end_of(self, name: str) -> None:
        """Wait until the launcher has reported the end of a member's process."""
        end_s = self._clock.now_s() + _END_S
        while name in self._members.running and self._clock.now_s() < end_s:
            await self.news(end_s - self._clock.now_s())

    def _forget(self, name: str) -> None:
        if self._members.forget(name):
            self._tell()

    def _tell(self) -> None:
        self._record()
        self._news.set()
        self._news = asyncio.Event()

    def _late(self) -> list[str]:
        return [name for name in self._members.plans if self._members.standing(name) is not Standing.READY]

    def _lateness(self, patience_s: float) -> str:
        """Message about members that are not ready: the last line of each one's log, and the remedy."""
        said = [
            f"{name} (its last line: {line})" if (line := self._launcher.said(name)) else name for name in self._late()
        ]
        return (
            f"not ready within {patience_s:g} s: {', '.join(said)}; a large model or a slow disk needs more: "
            "raise cluster.ready_timeout_s (TWOSTROKE__CLUSTER__READY_TIMEOUT_S)"
        )

    def _watches(self) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(watch()) for watch in (self._keep, self._observe, self._replace_stopped)]

    async def _replace_stopped(self) -> None:
        """End processes that a signal has stopped: they hold connections and serve none of them."""
        while True:
            for name in list(self._members.running):
                is_stopped = self._launcher.is_stopped(name)
                if name in self._members.plans and self._members.book.stands_still(name, is_stopped=is_stopped):
                    await self._replace(name, "was stopped by a signal (SIGSTOP)")
            await asyncio.sleep(_STOPPED_S)

    async def _replace(self, name: str, why: str) -> None:
        """End a member's process; its end is reported, and it is started again."""
        self._say(f"{name} {why}; replacing it")
        self._members.replaced(name)
        await self._launcher.kill(name)

    async def _keep(self) -> None:
        """Start due members; wait until a member ends or a back-off is over; repeat."""
        while True:
            self._changed.clear()
            await self._start_due()
            due_s = self._members.book.next_due_s()
            wait_s = None if due_s is None else max(0.0, due_s - self._clock.now_s())
            try:
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def _start_due(self) -> None:
        for name in self._members.book.due(self._clock.now_s()):
            if not self._members.is_due(name):
                continue  # let go while another was started
            self._members.started(name, self._clock.now_s())
            self._started.set()
            try:
                await self._launcher.start(self._members.plans[name], self._ended)
            except TwostrokeError as error:
                self._ended(name, end_of_typed(error))
            self._record()

    def _ended(self, name: str, end: ProcessEnd) -> None:
        now_s = self._clock.now_s()
        ended = self._members.ended(name, end, now_s)
        if ended is not None and ended.moved:
            self._say(f"{name} {ended.moved}")
        if ended is not None and ended.is_withheld:
            self._say(f"{name} is not started again, because no other GPU is free: {ended.end.cause}")
            if not self._settled.is_set():
                self._startup_error = f"{name} cannot start: {ended.end.cause}"
                self._settled.set()
        self._tell()
        if ended is not None and ended.due_s is not None:
            self._note_end(name, ended.end, max(0.0, ended.due_s - now_s))
        self._changed.set()

    def _note_end(self, name: str, end: ProcessEnd, wait_s: float) -> None:
        """Report the end of a member. During the start, give up if another attempt would end the same way."""
        if not self._settled.is_set():
            if end.is_certain:
                self._startup_error = f"{name} cannot start: {end.cause}"
            elif self._members.book.restarts(name) >= _START_TRIES:
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
                for name in self._members.book.overdue(self._clock.now_s()):
                    is_draining = self._members.book.use(name) is Use.DRAINS
                    what = "drains, and nobody here asked for it" if is_draining else "runs but cannot be used"
                    await self._replace(name, what)
                if not self._members.book.starting():
                    self._settled.set()
                with contextlib.suppress(TimeoutError):
                    wait_s = _POLL_S if self._members.book.starting() else _WATCH_S
                    async with asyncio.timeout(wait_s):
                        await self._started.wait()

    def _note(self, cluster: dict[str, Any] | None) -> None:
        """Record the router's report on every member; without an answer the state of workers is unknown."""
        lives = lives_of(cluster)
        now_s = self._clock.now_s()
        self.seen = None if cluster is None else Seen(cluster, now_s)
        self._num_silent = self._num_silent + 1 if cluster is None else 0
        is_heard = cluster is not None
        for name in self._members.reported(
            lives, now_s, hears_workers=is_heard, hears_routers=is_heard or self._are_silent()
        ):
            arithmetic = lives[name].arithmetic
            self._say(f"{name} is ready" + (f": {arithmetic}" if arithmetic else ""))
        self._tell()

    def _are_silent(self) -> bool:
        """True if a look without an answer says something about every router.

        Of several, the kernel chose the one that did not answer; the next connection may lead to another, which says
        which of them is missing.
        """
        number = self.config.cluster.routers
        return number == 1 or self._num_silent >= _SILENT_LOOKS * number
