"""`twostroke up`: `serve` as a process of its own, which stays when this command has ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import typer
import yaml

from ..cli import options as o
from ..cluster.config import Config
from ..cluster.deployment.keeper import may_live, read_record
from ..cluster.deployment.record import Unreadable
from ..cluster.launch.environment import member_environment
from ..cluster.launch.member_log import MemberLog
from ..cluster.operations.control import command
from ..cluster.operations.run_folder import LOG_NAME, RunFolder
from ..core.errors import ConfigError, TwostrokeError, Unavailable
from ..core.ports import free_ports
from .plans import DryRun, Machine, shows_plan

POLL_S = 0.2
ASK_S = 5.0
_REFUSED = 2  # exit code of a command that names its reason
END_S = 10.0  # for a start that is given up


@o.starts_a_cluster
def up(settings: Config, dry_run: DryRun = False, machine: Machine = None) -> None:
    """Start a cluster on this machine and return when it serves; `twostroke down` ends it.

    One cluster runs per gRPC port. Its folder
    ($XDG_RUNTIME_DIR/twostroke/PORT, else twostroke-run-UID/PORT in the folder for temporary files) has its log.

    Its members outlive the process that supervises them: if that is killed, they serve on, and `up` with the same
    settings supervises them again and starts those that have died. (Not so on a Ray that is started for them.)
    """
    if shows_plan(settings, dry_run=dry_run, machine=machine):
        return
    settings = _with_fixed_ports(settings)
    folder = RunFolder(settings.router.grpc_port)
    if folder.is_held:
        raise ConfigError(folder.occupied())
    folder.make()  # what a killed process left there, the new one reads, adopts or removes
    with MemberLog(folder.path, LOG_NAME).open() as out, _Listener(Path(out.name)) as told:
        process = _spawn(settings, out)
        try:
            _wait(process, folder, told)
        except BaseException as error:
            _give_up(process)
            told.news()
            _tidy(folder)
            if isinstance(error, TwostrokeError):
                if process.returncode == _REFUSED and told.last:
                    raise Unavailable(f"the cluster did not start: {told.last.removeprefix('twostroke: ')}") from None
                raise Unavailable(": ".join(filter(None, [str(error), told.last]))) from None
            raise
    state = folder.state()
    assert state is not None
    typer.echo(f"{state.model} is served at {state.http_url}/v1 (OpenAI API) and {state.grpc_address} (gRPC)")
    typer.echo(f"its log: {folder.path / LOG_NAME}.log; `twostroke down --grpc {state.grpc_address}` ends it")


def _with_fixed_ports(config: Config) -> Config:
    """Replace ports of 0: the folder is found by the gRPC port. The other one stays, if a cluster is left there."""
    if config.router.port == 0 and config.router.grpc_port:
        with contextlib.suppress(Unreadable):
            record = read_record(RunFolder(config.router.grpc_port).path)
            port = record.ports.http if record else 0
            config = config.model_copy(update={"router": config.router.model_copy(update={"port": port})})
    names = [name for name in ("port", "grpc_port") if getattr(config.router, name) == 0]
    free = dict(zip(names, free_ports(config.router.host, len(names)), strict=True))
    return config.model_copy(update={"router": config.router.model_copy(update=free)})


def _spawn(settings: Config, out: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start `serve` in a session of its own. Its configuration holds keys, so it goes through standard input."""
    given = settings.model_dump(mode="json", exclude_unset=True)
    given.setdefault("router", {}).update(port=settings.router.port, grpc_port=settings.router.grpc_port)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "twostroke.cli.main", "serve", "--config", "-", "--detached"],
        stdin=subprocess.PIPE,
        stdout=out,
        stderr=out,
        start_new_session=True,
        env=member_environment(),
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it ended already; its log says why
        process.stdin.write(yaml.safe_dump(given).encode())
        process.stdin.close()
    return process


class _Listener:
    """Reads what the cluster logs; also when it has removed its folder, which it does when its start fails."""

    def __init__(self, file: Path) -> None:
        self._file = file.open("rb")
        self._file.seek(0, os.SEEK_END)  # behind what earlier processes of the cluster logged
        self._cut = b""  # a line without its end
        self.last = ""  # of the lines read: the reason of an end may be shown before the end is seen

    def __enter__(self) -> _Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def news(self) -> list[str]:
        """Whole lines that came since the last call."""
        *whole, self._cut = (self._cut + self._file.read()).split(b"\n")
        lines = (line.decode(errors="replace").strip() for line in whole)
        news = [line for line in lines if line]
        self.last = news[-1] if news else self.last
        return news


def _wait(process: subprocess.Popen[bytes], folder: RunFolder, told: _Listener) -> None:
    """Wait until the cluster serves. Its own deadlines bound the wait; what it logs is shown.

    Raises:
        Unavailable: its process ended.
    """
    while True:
        if process.poll() is not None:
            raise Unavailable(f"the cluster ended on its way up, with exit code {process.returncode}")
        for line in told.news():
            typer.echo(line, err=True)
        with contextlib.suppress(TwostrokeError):
            is_served = asyncio.run(command(folder.socket, {"verb": "state"}, lambda _: None, ASK_S)).said == "serves"
            state = folder.state()
            if is_served and state is not None and state.pid == process.pid:  # not one that was quicker than ours
                return
        time.sleep(POLL_S)


def _tidy(folder: RunFolder) -> None:
    """Remove the folder, unless somebody of a cluster lives there."""
    with contextlib.suppress(ConfigError):
        folder.hold()
        if may_live(folder.path):
            folder.let_go()
        else:
            folder.release()


def _give_up(process: subprocess.Popen[bytes]) -> None:
    """End a start: once politely, then at once; its members end with it."""
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.kill(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_S)
