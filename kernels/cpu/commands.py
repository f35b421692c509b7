"""Runs compilers: several at once, with a deadline. All of them end when one fails or the build is stopped.

Knows no source, no flag and no library.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

POLL_S = 0.05


class CommandFailed(Exception):
    """A command failed, timed out or was stopped. The message names the cause."""


class CommandsStopped(CommandFailed):
    """`Commands.stop` was called."""


class CommandsLate(CommandFailed):
    """No command ended for too long, so the machine is too busy; others would take as long."""


@dataclass(frozen=True, slots=True)
class _Running:
    process: subprocess.Popen[bytes]
    output: IO[bytes]  # an unnamed file: a pipe that is not read could fill up


class Commands:
    """Commands of one build. `run` is for one thread; `stop` may come from any other."""

    def __init__(self, timeout_s: float) -> None:
        """`timeout_s`: longest time in which no command ends. A slow machine may take long for all of them."""
        self._timeout_s = timeout_s
        self._moved_s: float | None = None  # when the first command was started, or the last one ended
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Make `run` kill its commands and raise."""
        self._stopped.set()

    def check_wanted(self) -> None:
        """Check that the build may continue.

        Raises:
            CommandsStopped: `stop` was called.
            CommandsLate: no command has ended for too long.
        """
        if self._stopped.is_set():
            raise CommandsStopped("it was stopped")
        if self._moved_s is not None and time.monotonic() - self._moved_s > self._timeout_s:
            raise CommandsLate(
                f"no file of it was done for {self._timeout_s:g} s; try again when the machine is less busy"
            )

    def run(self, folder: Path, commands: Sequence[Sequence[str]], done: Callable[[int], None] | None = None) -> None:
        """Run all commands in `folder`, one per core at a time. `done` is called with the number that have succeeded.

        Raises:
            CommandFailed: all commands have ended. Temporary files may be left in `folder`, and nowhere else.
        """
        self._moved_s = time.monotonic()
        waiting, running, num_done = list(commands), list[_Running](), 0
        try:
            while waiting or running:
                self.check_wanted()
                while waiting and len(running) < _num_cores():
                    running.append(_start(waiting.pop(0), folder))
                for command in [command for command in running if command.process.poll() is not None]:
                    running.remove(command)
                    _check(command)
                    self._moved_s = time.monotonic()
                    num_done += 1
                    if done is not None:
                        done(num_done)
                if running:
                    time.sleep(POLL_S)
        finally:
            for command in running:
                _end(command.process)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(command: Sequence[str], folder: Path) -> _Running:
    output = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - `_check` closes it
    try:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | {"TMPDIR": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            process_group=0,  # Ctrl-C does not reach it; `_end` kills the compiler's children too
        )
    except OSError as error:
        raise CommandFailed(str(error)) from None
    return _Running(process, output)


def _check(command: _Running) -> None:
    code = command.process.returncode
    with command.output as output:
        if code:
            output.seek(0)
            lines = output.read().decode(errors="replace").strip().splitlines() or [f"status {code}"]
            raise CommandFailed(next((line for line in lines if "error" in line.lower()), lines[-1]))


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
