"""`twostroke down`: ends a cluster that `up` (or `serve`) runs on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path

import typer

from ..cluster.operations.control import command
from ..cluster.operations.run_folder import RunFolder, State
from ..core.errors import ConfigError, TwostrokeError
from .status import Grpc
from .supervised import folder_of

ASK_S = 5.0
STOP_S = 30.0  # beyond cluster.drain_timeout_s
KILL_S = 5.0
POLL_S = 0.05


def down(grpc: Grpc = "127.0.0.1:8001") -> None:
    """Drain and end the cluster at this address of its gRPC API; nothing of it is left. Without one it says so."""
    folder = folder_of(grpc)
    if folder is None:
        raise ConfigError(f"--grpc is {grpc!r}; `down` ends clusters of this machine alone: give 127.0.0.1:PORT")
    if not folder.is_held:
        folder.release()  # what a killed process left
        typer.echo(f"no cluster runs at {grpc}")
        return
    state = folder.state()
    _ask(folder, state)
    if _is_gone(folder, state, STOP_S + (state.drain_timeout_s if state else 0.0)):
        typer.echo("stopped")
        return
    for number in (signal.SIGTERM, signal.SIGKILL):  # a second signal stops without waiting
        if state is not None:
            typer.echo(f"process {state.pid} does not end; it gets {number.name}", err=True)
            _send(folder, state, number)
        if _is_gone(folder, state, KILL_S):
            folder.release()
            typer.echo("stopped")
            return
    typer.echo(f"twostroke: the cluster at {grpc} does not end", err=True)
    raise typer.Exit(1)


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
