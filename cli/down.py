"""`twostroke down`: ends a cluster that `up` (or `serve`) runs on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path

import typer

from ..cluster.deployment.keeper import end_leftovers, may_live
from ..cluster.launch.launchers import traces_of
from ..cluster.operations.control import command
from ..cluster.operations.run_folder import RunFolder, State
from ..core.errors import ConfigError, TwostrokeError
from .status import Grpc
from .supervised import folder_of

ASK_S = 5.0
STOP_S = 30.0  # beyond cluster.drain_timeout_s
KILL_S = 5.0
POLL_S = 0.05
DRAIN_S = 10.0  # where nobody says what cluster.drain_timeout_s was


def down(grpc: Grpc = "127.0.0.1:8001") -> None:
    """Drain and end the cluster at this address of its gRPC API; nothing of it is left. Without one it says so."""
    folder = folder_of(grpc)
    if folder is None:
        raise ConfigError(f"--grpc is {grpc!r}; `down` ends clusters of this machine alone: give 127.0.0.1:PORT")
    state = folder.state()
    if not folder.is_held:
        typer.echo("stopped" if _end_leftovers(folder, state) else f"no cluster runs at {grpc}")
        return
    if _end_supervisor(folder, state):
        _end_leftovers(folder, state)  # of a supervisor that was killed meanwhile
        typer.echo("stopped")
        return
    typer.echo(f"twostroke: the cluster at {grpc} does not end", err=True)
    raise typer.Exit(1)


def _end_supervisor(folder: RunFolder, state: State | None) -> bool:
    """Have the supervisor drain and end its cluster; returns True when it has ended."""
    _ask(folder, state)
    if _is_gone(folder, state, STOP_S + (state.drain_timeout_s if state else 0.0)):
        return True
    for number in (signal.SIGTERM, signal.SIGKILL):  # a second signal stops without waiting
        if state is not None:
            typer.echo(f"process {state.pid} does not end; it gets {number.name}", err=True)
            _send(folder, state, number)
        if _is_gone(folder, state, KILL_S):
            return True
    return False


def _end_leftovers(folder: RunFolder, state: State | None) -> bool:
    """End the members that no supervisor has, and remove the folder; returns True if there were some.

    Raises:
        ConfigError: a supervisor has come, or the Ray that they were started on cannot be joined.
    """
    if not folder.path.exists() and not may_live(folder.path):
        return False
    folder.hold()
    num_ended = end_leftovers(folder.path, state.drain_timeout_s if state else DRAIN_S, traces_of)
    folder.release()
    return num_ended > 0


def _ask(folder: RunFolder, state: State | None) -> None:
    """Have the cluster drain and end: by its socket, or by a signal while it takes no commands."""
    try:
        asyncio.run(command(folder.socket, {"verb": "stop"}, lambda _: None, ASK_S))
    except TwostrokeError:
        if state is not None:
            _send(folder, state, signal.SIGTERM)


def _send(folder: RunFolder, state: State, number: signal.Signals) -> None:
    if folder.is_held:  # else the process is gone, and its number may be another's
        with contextlib.suppress(ProcessLookupError):
            os.kill(state.pid, number)


def _is_gone(folder: RunFolder, state: State | None, within_s: float) -> bool:
    """Wait until nobody runs the cluster and its process has ended."""
    end_s = time.monotonic() + within_s
    while folder.is_held or (state is not None and _lives(state.pid)):
        if time.monotonic() >= end_s:
            return False
        time.sleep(POLL_S)
    return True


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
