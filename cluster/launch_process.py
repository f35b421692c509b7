"""Members as child processes of this one: what a machine without Ray uses, and what each pod runs one of."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

import yaml

from .environment import member_environment
from .last_words import cause_of, end_of_process
from .launch import Ended, Site
from .placement import Member
from .scratch import Scratch

_LAST_WORDS_BYTES = 8000
_ABORT_S = 0.5


class ProcessLauncher:
    """Starts `twostroke worker` and `twostroke router` with one configuration file, readable by us alone."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._scratch = Scratch("twostroke-")
        self._directory = self._scratch.path
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._watchers: set[asyncio.Task[None]] = set()
        self._config_file = self._directory / "config.yaml"
        values = site.config.model_dump(mode="json")
        values["model"]["path"], values["model"]["name"] = site.model_directory, site.model_name
        values["router"]["internal_port"] = site.internal_port
        self._config_file.touch(mode=0o600)  # it holds the cluster's key
        self._config_file.write_text(yaml.safe_dump(values))

    async def start(self, member: Member, ended: Ended) -> None:
        """Start one child; its output goes to a log file whose end becomes its last words."""
        log = self._directory / f"{member.name}.log"
        with log.open("ab") as out:
            process = await asyncio.create_subprocess_exec(
                *self._command(member),
                stdout=out,
                stderr=out,
                stdin=asyncio.subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches the supervisor alone, which drains
                env=self._environment(member),
            )
        self._processes[member.name] = process
        watcher = asyncio.create_task(self._watch(member.name, process, log, ended))
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)

    async def stop(self, name: str, grace_s: float) -> None:
        """SIGTERM, wait, SIGKILL."""
        process = self._processes.get(name)
        if process is None or process.returncode is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), grace_s + 2.0)
        except TimeoutError:
            _end(process)
            await process.wait()

    async def kill(self, name: str) -> None:
        """SIGKILL, which a stopped process hears too."""
        process = self._processes.get(name)
        if process is not None:
            _end(process)

    async def close(self) -> None:
        """End what still runs and remove the files."""
        await asyncio.gather(*(self.stop(name, 0.0) for name in list(self._processes)))
        if self._watchers:
            await asyncio.wait(self._watchers, timeout=2.0)
        self._scratch.remove()

    async def abort(self) -> None:
        """SIGKILL for all, and remove the files."""
        for process in self._processes.values():
            _end(process)
        if self._watchers:
            await asyncio.wait(self._watchers, timeout=_ABORT_S)
        self._scratch.remove()

    def said(self, name: str) -> str:
        """The last line of its log."""
        return cause_of(_tail(self._directory / f"{name}.log"))

    def _command(self, member: Member) -> list[str]:
        command = [sys.executable, "-P", "-m", "twostroke.cli.main", member.kind, "--config", str(self._config_file)]
        if member.kind == "worker":
            command += ["--role", str(member.role), "--worker-id", member.name]
            command += ["--router", self._site.internal_address, "--memory-bytes", str(member.memory_bytes)]
            command += ["--metrics-port", "none" if member.metrics_port is None else str(member.metrics_port)]
        return [*command, "--parent-pid", str(os.getpid())]

    def _environment(self, member: Member) -> dict[str, str]:
        threads = str(member.num_threads)
        kept = member_environment()
        given = {"OMP_NUM_THREADS": threads, "TWOSTROKE__STEP__NUM_THREADS": threads}
        if member.kind == "worker":
            given["TWOSTROKE__MODEL__DEVICE"] = member.device
        if member.device == "cuda":
            visible = kept.get("CUDA_VISIBLE_DEVICES", "").split(",")
            given["CUDA_VISIBLE_DEVICES"] = visible[member.gpu] if visible[0] else str(member.gpu)
        return kept | given

    async def _watch(self, name: str, process: asyncio.subprocess.Process, log: Path, ended: Ended) -> None:
        code = await process.wait()
        if self._processes.get(name) is process:
            del self._processes[name]
        ended(name, end_of_process(code, _tail(log)))


def _end(process: asyncio.subprocess.Process) -> None:
    """SIGKILL, for whatever it started too: each member leads a group of its own."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _tail(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _LAST_WORDS_BYTES))
            return file.read().decode(errors="replace").strip()
    except OSError:
        return ""
