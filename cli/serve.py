"""`twostroke serve`: starts a cluster on this machine and serves until Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from ..cli import options as o
from ..cluster.config import Config
from ..cluster.deployment.adoption import serves_on
from ..cluster.deployment.keeper import Deployment, claim, outlives
from ..cluster.launch.launchers import traces_of
from ..cluster.operations.run_folder import RunFolder
from ..cluster.placement import Plan
from ..cluster.prepare import prepare
from ..cluster.supervisor import Supervisor
from ..core.errors import TwostrokeError
from ..core.foreground import Stop, Stopped, leave, run, unless
from .doors import Doors, check_nobody_lives
from .failure import fail
from .greeting import commands
from .plans import DryRun, Machine, settings_remarks, shows_plan

LEFT_EXIT = 1  # of a supervisor whose members serve on
TICK_S = 1.0  # between two looks at what a start waits for
FIRST_TOLD_S, TOLD_AGAIN_S = 3.0, 10.0  # of a wait, in a log

console = Console(stderr=True, log_path=False, soft_wrap=True)


@o.starts_a_cluster
def serve(
    settings: Config,
    dry_run: DryRun = False,
    machine: Machine = None,
    detached: Annotated[bool, typer.Option("--detached", help="Started by `up`.", hidden=True)] = False,
) -> None:
    """Start a cluster on this machine and serve until Ctrl-C.

    Every setting is also a key of --config and an environment variable TWOSTROKE__SECTION__KEY: docs/settings.md.
    """
    if shows_plan(settings, dry_run=dry_run, machine=machine):
        return
    raise typer.Exit(run(lambda stop: _serve(settings, stop, detached=detached)))


async def _serve(config: Config, stop: Stop, *, detached: bool) -> int:
    supervisor: Supervisor | None = None
    doors: Doors | None = None
    is_served = False
    held = _held(config) if detached else None
    deployment: Deployment | None = None
    try:
        with Progress() as progress:
            folder = held or RunFolder(config.router.grpc_port)
            if held is None and not folder.is_held:
                check_nobody_lives(folder)
            elif held is not None and outlives(config):
                deployment = await asyncio.to_thread(claim, held.path, config, traces_of)
            if deployment is not None and deployment.is_adopted:
                config, plan = deployment.again()
            else:
                config, plan = await unless(stop.asked, prepare(config, progress.show))
            supervisor = Supervisor(config, plan, say=_note, deployment=deployment)
            for remark in [*_remarks(plan), *settings_remarks(config), supervisor.tls_remark]:
                _note(remark)
            doors = Doors(supervisor, stop, held)
            await doors.open()
            num_living = len(deployment.living) if deployment is not None else 0
            what = f"adopting {num_living} processes" if num_living else f"starting {len(plan.members)} processes"
            progress.show(what)
            async with _telling(progress, what, supervisor):
                await unless(stop.asked, supervisor.start())
        is_served = True
        doors.ready()
        if not detached:
            _greet(supervisor, plan)
        await stop.asked.wait()
        grace_s = config.cluster.drain_timeout_s
        _note(
            f"draining: answers have {grace_s:g} s to end (cluster.drain_timeout_s); "
            "Ctrl-C once more stops without waiting"
        )
        await unless(stop.asked_again, supervisor.stop())
        _note("stopped")
        return 0
    except BaseException as error:
        is_asked = stop.asked.is_set()
        if deployment is not None and serves_on(
            is_adopted=deployment.is_adopted, is_served=is_served, is_asked=is_asked
        ):
            await _leave(supervisor, doors, error)
        if supervisor is not None:
            await supervisor.abort()
        if isinstance(error, TwostrokeError):
            if doors is not None:
                await doors.close()
            fail(error)
        raise
    finally:
        if doors is not None:
            await doors.close()


def _held(config: Config) -> RunFolder:
    """The folder of a detached cluster, held by this process.

    Raises:
        ConfigError: another process has it, or it cannot be made.
    """
    folder = RunFolder(config.router.grpc_port)
    folder.hold()
    folder.forget_process()
    return folder


async def _leave(supervisor: Supervisor | None, doors: Doors | None, error: BaseException) -> NoReturn:
    """End this process, and nothing else."""
    if supervisor is not None:
        await supervisor.leave()
    if doors is not None:
        await doors.close(keeps_folder=True)
    if not isinstance(error, (TwostrokeError, Stopped)):
        console.print_exception()
    _note("the members serve on without a supervisor; `twostroke up` starts another one")
    if isinstance(error, TwostrokeError):
        fail(error)
    leave(LEFT_EXIT)


def _note(line: str) -> None:
    """Log a line with its time. In a file it is as long as it is: rich would pad it to the width of a screen."""
    if console.is_terminal:
        console.log(line, markup=False)
    else:
        console.print(f"[{datetime.now():%H:%M:%S}] {line}", markup=False, highlight=False)


class Progress:
    """Progress line of the start-up. Without a terminal, each kind of work is logged once."""

    def __init__(self) -> None:
        self._status = console.status("")
        self._said = ""
        self._told_s = FIRST_TOLD_S

    def __enter__(self) -> Progress:
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def show(self, line: str) -> None:
        """Replace the progress line."""
        self._status.update(line)
        work = line.partition(" … ")[0]
        if not console.is_terminal and work != self._said:
            _note(work)
        self._said = work

    def wait(self, what: str, awaited: str, waited_s: float, most_s: float) -> None:
        """Say what the start waits for and how long: on a terminal always, in a log from time to time."""
        line = f"waiting for {awaited}: {waited_s:.0f} s of at most {most_s:g} s"
        self._status.update(f"{what} … {line}")
        if not console.is_terminal and waited_s >= self._told_s:
            _note(line)
            self._told_s = waited_s + TOLD_AGAIN_S


@contextlib.asynccontextmanager
async def _telling(progress: Progress, what: str, supervisor: Supervisor) -> AsyncIterator[None]:
    """Within this block, say what the supervisor's start waits for."""

    async def tell() -> None:
        began_s, most_s = time.monotonic(), supervisor.config.cluster.ready_timeout_s
        while True:
            await asyncio.sleep(TICK_S)
            if supervisor.awaited:
                progress.wait(what, supervisor.awaited, time.monotonic() - began_s, most_s)

    telling = asyncio.create_task(tell())
    try:
        yield
    finally:
        telling.cancel()


def _remarks(plan: Plan) -> list[str]:
    """Notes on properties of the model that a user may not expect."""
    remarks = [f"note: {remark}" for remark in plan.model.remarks]
    if plan.model.sampling:
        remarks.append(
            f"where a request says nothing: {plan.model.sampling}, as the checkpoint recommends; "
            "--generation-config none turns it off"
        )
    shortened = [d for d in plan.decisions if d.setting == "model.max_model_len" and "pool" in d.reason]
    return remarks + [f"{d.setting} is {d.value}: {d.reason}" for d in shortened]


def _shown(program: str) -> str:
    """Path of a program, relative to the current folder if it is inside."""
    path = Path(program)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else program


def _greet(supervisor: Supervisor, plan: Plan) -> None:
    out = Console()
    url, name = supervisor.http_url, plan.model.name
    out.print(f"\n[bold]{name}[/bold] is served at [bold]{url}/v1[/bold] (OpenAI API)\n")
    programs = _shown(sys.argv[0]), _shown(sys.executable)
    for line in commands(supervisor.config.router, url, supervisor.grpc_address, name, *programs):
        print(f"  {line}")
    print()
    print("Ctrl-C drains and stops.", flush=True)
