"""Launcher of members as child processes, for machines without Ray."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from ...core.tls.callers import Caller
from ..deployment.processes import NAME_OPTION, ProcessIdentity, identity_of, is_stopped
from ..nodes import Node
from ..placement import ProcessPlan
from ..scratch import Scratch
from .adopted import AdoptedProcess
from .environment import member_environment
from .last_words import ProcessEnd, cause_of, end_of_adopted, end_of_process
from .launcher import Ended, Site
from .member_log import MemberLog

_LOG_CHECK_S = 5.0
_ABORT_S = 0.5
_CALLERS = {"router": Caller.ROUTER, "worker": Caller.WORKER}  # by kind of member


class ProcessLauncher:
    """Starts `twostroke worker` and `twostroke router`.

    Each reads its configuration from standard input, because it holds keys and must be in no file and no argument.
    Those of a deployment carry its name and outlive this process; others end with it.
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        self._scratch = None if site.log_folder else Scratch("twostroke-")
        self._directory = site.log_folder or (self._scratch and self._scratch.path) or Path()
        self._processes: dict[str, asyncio.subprocess.Process | AdoptedProcess] = {}
        self._identities: dict[str, ProcessIdentity | None] = {}
        self._spawning: set[asyncio.Task[None]] = set()
        self._watchers: set[asyncio.Task[None]] = set()

    async def start(self, member: ProcessPlan, ended: Ended) -> None:
        """Start one child; its output goes to a log file, from whose end the cause of its end is read.

        If the caller is cancelled while the system creates the child, it is registered all the same: `abort` ends it.
        """
        spawning = asyncio.create_task(self._spawn(member, ended))
        self._spawning.add(spawning)
        spawning.add_done_callback(self._spawning.discard)
        await asyncio.shield(spawning)

    async def _spawn(self, member: ProcessPlan, ended: Ended) -> None:
        log = MemberLog(self._directory, member.name)
        with log.open() as out:
            process = await asyncio.create_subprocess_exec(
                *self._command(member),
                stdout=out,
                stderr=out,
                stdin=asyncio.subprocess.PIPE,
                start_new_session=True,  # Ctrl-C reaches only the supervisor, which drains
                env=self._environment(member),
            )
        assert process.stdin is not None
        self._processes[member.name] = process
        self._watch_from_now(member.name, process, ended)
        process.stdin.write(_config_text(self._site, member))  # buffered; the transport sends it as the child reads
        if self._site.member_name:  # nobody may adopt a member that has a part of its configuration
            process.stdin.transport.set_write_buffer_limits(0)
            with contextlib.suppress(ConnectionError):
                await process.stdin.drain()
        process.stdin.close()
        self._identities[member.name] = identity_of(process.pid)

    async def adopt(self, member: ProcessPlan, handle: str, ended: Ended) -> bool:
        """Watch a process that another supervisor started. False: it has ended."""
        identity = ProcessIdentity.of_handle(handle)
        process = identity and AdoptedProcess.adopt(identity)
        if identity is None or process is None:
            return False
        self._processes[member.name], self._identities[member.name] = process, identity
        self._watch_from_now(member.name, process, ended)
        return True

    def handle(self, name: str) -> str | None:
        """The process, so that another supervisor can find it. None: none runs, or its configuration is under way."""
        identity = self._identities.get(name)
        return identity.handle if identity else None

    def is_stopped(self, name: str) -> bool:
        """True if the member's process was stopped by a signal."""
        return name in self._processes and is_stopped(self._processes[name].pid)

    def _watch_from_now(self, name: str, process: asyncio.subprocess.Process | AdoptedProcess, ended: Ended) -> None:
        watcher = asyncio.create_task(self._watch(name, process, MemberLog(self._directory, name), ended))
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)

    async def stop(self, name: str, grace_s: float) -> None:
        """Send SIGTERM, wait, and send SIGKILL if the process still runs."""
        process = self._processes.get(name)
        if process is None or _has_ended(process):
            return
        process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace_s + 2.0):
                await process.wait()
        except TimeoutError:
            _end(process)
            await process.wait()

    async def kill(self, name: str) -> None:
        """Send SIGKILL, which also ends a stopped process."""
        process = self._processes.get(name)
        if process is not None:
            _end(process)

    async def machines(self) -> list[Node]:
        """Always empty: this machine only."""
        return []

    async def want(self, _workers: Sequence[ProcessPlan]) -> str:
        """Always empty: no other machine comes."""
        return ""

    async def close(self) -> None:
        """End all running children and remove the files."""
        await self._spawned()
        await asyncio.gather(*(self.stop(name, 0.0) for name in list(self._processes)))
        if self._watchers:
            await asyncio.wait(self._watchers, timeout=2.0)
        self._remove_files()

    async def abort(self) -> None:
        """Send SIGKILL to all children, and remove the files."""
        await self._spawned()
        for process in self._processes.values():
            _end(process)
        if self._watchers:
            await asyncio.wait(self._watchers, timeout=_ABORT_S)
        self._remove_files()

    async def leave(self) -> None:
        """Watch the members no more; they run on. The caller ends this process next, without asyncio's own tidying."""
        await self._spawned()
        for watcher in self._watchers:
            watcher.cancel()

    def _remove_files(self) -> None:
        if self._scratch is not None:  # a deployment's are in its run folder
            self._scratch.remove()

    async def _spawned(self) -> None:
        """Wait for children that are being created."""
        if self._spawning:
            await asyncio.wait(self._spawning, timeout=_ABORT_S)

    def opening(self) -> str:
        """Always empty: nothing comes before the members."""
        return ""

    def said(self, name: str) -> str:
        """The last error in a member's log, else its last line."""
        return cause_of(MemberLog(self._directory, name).tail())

    def _command(self, member: ProcessPlan) -> list[str]:
        command = [sys.executable, "-P", "-m", "twostroke.cli.main", member.kind, "--config", "-"]
        if member.kind == "worker":
            command += ["--role", str(member.role), "--worker-id", member.name]
            command += [word for address in self._site.internal_addresses for word in ("--router", address)]
            command += ["--memory-bytes", str(member.memory_bytes)]
            if member.first_core is not None:
                command += ["--first-core", str(member.first_core)]
            command += ["--metrics-port", "none" if member.metrics_port is None else str(member.metrics_port)]
        if self._site.member_name:
            return [*command, NAME_OPTION, self._site.member_name]
        return [*command, "--parent-pid", str(os.getpid())]

    def _environment(self, member: ProcessPlan) -> dict[str, str]:
        threads = str(member.num_threads)
        kept = member_environment()
        given = {"OMP_NUM_THREADS": threads, "TWOSTROKE__STEP__NUM_THREADS": threads}
        if member.kind == "worker":
            given["TWOSTROKE__MODEL__DEVICE"] = member.device
        if member.device == "cuda" or self._site.config.cluster.gpu_health == "on":
            visible = kept.get("CUDA_VISIBLE_DEVICES", "").split(",")
            given["CUDA_VISIBLE_DEVICES"] = visible[member.gpu] if visible[0] else str(member.gpu)
        return kept | given

    async def _watch(
        self, name: str, process: asyncio.subprocess.Process | AdoptedProcess, log: MemberLog, ended: Ended
    ) -> None:
        ending = asyncio.create_task(process.wait())
        while not (await asyncio.wait({ending}, timeout=_LOG_CHECK_S))[0]:
            await asyncio.to_thread(log.bound)
        if self._processes.get(name) is process:
            del self._processes[name]
            self._identities.pop(name, None)
        ended(name, _end_of(ending.result(), log))


def _config_text(site: Site, member: ProcessPlan) -> bytes:
    """The configuration of one member, for its standard input."""
    values = site.config_of(_CALLERS[member.kind]).model_dump(mode="json")
    values["model"]["path"], values["model"]["name"] = site.model_directory, site.model_name
    if member.kind == "router":
        values["router"] = site.router_settings(member).model_dump(mode="json")
    return yaml.safe_dump(values).encode()


def _end_of(code: int | None, log: MemberLog) -> ProcessEnd:
    return end_of_adopted(log.tail()) if code is None else end_of_process(code, log.tail())


def _has_ended(process: asyncio.subprocess.Process | AdoptedProcess) -> bool:
    return process.has_ended if isinstance(process, AdoptedProcess) else process.returncode is not None


def _end(process: asyncio.subprocess.Process | AdoptedProcess) -> None:
    """Send SIGKILL to a member's process group, which includes the processes that it started."""
    if isinstance(process, AdoptedProcess):
        process.end()
    elif process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
