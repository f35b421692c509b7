"""Launcher of members as objects on this event loop, each worker with an engine thread; for tests and notebooks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from ...core.tls.callers import Caller
from ...kernels.cpu.build import stop_building
from ...router.process import RouterProcess
from ...worker.process import WorkerProcess
from ..nodes import Node
from ..placement import ProcessPlan
from .last_words import ProcessEnd, end_of_typed
from .launcher import Ended, Site, worker_settings

ABORT_S = 0.5


class InProcessLauncher:
    """Runs every member in this process. The sockets between them are real."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._running: dict[str, tuple[WorkerProcess | RouterProcess, Ended]] = {}
        self._watchers: set[asyncio.Task[None]] = set()

    async def start(self, member: ProcessPlan, ended: Ended) -> None:
        """Build and start the member's object."""
        process: WorkerProcess | RouterProcess
        if member.kind == "router":
            config = self._site.config
            settings = self._site.router_settings(member)
            reads_defaults = config.model.generation_config == "auto"
            tls = self._site.tls_of(Caller.ROUTER)
            process = RouterProcess(settings, config.cluster.key, reads_defaults=reads_defaults, tls=tls)
        else:
            process = WorkerProcess(worker_settings(self._site, member))
        try:
            await process.start()
        except BaseException:
            await process.stop(0.0)  # a failed start must free its ports and threads in this process
            raise
        self._running[member.name] = (process, ended)
        watcher = asyncio.create_task(self._watch(member.name, process))
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)

    async def adopt(self, _member: ProcessPlan, _handle: str, _ended: Ended) -> bool:
        """Always False: members end with their process."""
        return False

    def handle(self, _: str) -> str | None:
        """Always None, for the same reason."""
        return None

    def is_stopped(self, _: str) -> bool:
        """Always False: who asks would stand still too."""
        return False

    async def stop(self, name: str, grace_s: float) -> None:
        """Drain and stop a member."""
        if name in self._running:
            process, ended = self._running.pop(name)
            await process.stop(grace_s)
            ended(name, ProcessEnd("stopped"))

    async def kill(self, name: str) -> None:
        """Stop a member without a drain."""
        await self.stop(name, 0.0)

    async def machines(self) -> list[Node]:
        """Always empty: this machine only."""
        return []

    async def want(self, _workers: Sequence[ProcessPlan]) -> str:
        """Always empty: no other machine comes."""
        return ""

    async def close(self) -> None:
        """Stop all running members."""
        await asyncio.gather(*(self.stop(name, 0.0) for name in list(self._running)))
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)

    async def abort(self) -> None:
        """Stop all running members. A thread that builds an engine cannot be ended, only the kernels' compilers."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ABORT_S):
                await self.close()
        await asyncio.to_thread(stop_building, ABORT_S)

    async def leave(self) -> None:
        """Let go of all members, which end with this process."""
        for watcher in self._watchers:
            watcher.cancel()

    def opening(self) -> str:
        """Always empty: nothing comes before the members."""
        return ""

    def said(self, _: str) -> str:
        """Always empty: members log to this process's log."""
        return ""

    async def _watch(self, name: str, process: WorkerProcess | RouterProcess) -> None:
        """Report a member that ended by its own fault."""
        await process.ended.wait()
        if self._running.get(name, (None,))[0] is process:
            _, ended = self._running.pop(name)
            await process.stop(0.0)
            unknown = ProcessEnd("it ended by its own fault; the log has more")
            ended(name, unknown if process.fault is None else end_of_typed(process.fault))
