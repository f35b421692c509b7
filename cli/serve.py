"""`twostroke serve`: starts a cluster on this machine and serves until Ctrl-C."""

from __future__ import annotations

import asyncio
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from ..cli import options as o
from ..cluster.catalogue import MachineShape, parse_machine
from ..cluster.config import Config
from ..cluster.deployment.adoption import serves_on
from ..cluster.deployment.keeper import Deployment, claim, outlives
from ..cluster.fit import machine_of
from ..cluster.launch.launchers import traces_of
from ..cluster.model_facts import model_facts
from ..cluster.operations.run_folder import RunFolder
from ..cluster.placement import Plan, bytes_beside_workers, place
from ..cluster.prepare import check_files, prepare
from ..cluster.supervisor import Supervisor
from ..core.errors import ConfigError, TwostrokeError
from ..core.foreground import Stop, Stopped, leave, run, unless
from ..core.hosts import is_loopback_name
from ..core.ports import numeric_host
from ..router.config import GOOD_KEY_CHARS
from ..worker.machine import machine_facts
from .doors import Doors, check_nobody_lives
from .failure import fail
from .fits import mib, show_fits
from .greeting import commands

LEFT_EXIT = 1  # of a supervisor whose members serve on

console = Console(stderr=True, log_path=False, soft_wrap=True)


@o.starts_a_cluster
def serve(
    settings: Config,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    machine: Annotated[
        str | None,
        typer.Option(help="With --dry-run: plan for GPUs that are not here, e.g. 8xH100, or 2x4xA100-80GB on 2 nodes."),
    ] = None,
    detached: Annotated[bool, typer.Option("--detached", help="Started by `up`.", hidden=True)] = False,
) -> None:
    """Start a cluster on this machine and serve until Ctrl-C.

    Every setting is also a key of --config and an environment variable TWOSTROKE__SECTION__KEY.
    """
    if machine is not None:
        if not dry_run:
            raise ConfigError(
                f"--machine is {machine!r}, which is only for plans: give --dry-run with it, or leave it out"
            )
        shape = parse_machine(machine)
        show_fits(settings, shape, Console())
        show_plan(settings, place(settings, machine_of(shape), model_facts(settings, shape.num_gpus)), Console(), shape)
        return
    if dry_run:
        check_files(settings)
        show_plan(settings, place(settings, machine_facts(), model_facts(settings)), Console())
        return
    raise typer.Exit(run(lambda stop: _serve(settings, stop, detached=detached)))


def show_plan(config: Config, plan: Plan, out: Console, shape: MachineShape | None = None) -> None:
    """Print workers, threads, memory and ports, as tables and calculations. `shape`: of a machine that is not here."""
    table = Table(title=f"{plan.model.name} — launcher {config.cluster.launcher}", title_justify="left")
    for heading in ("member", "role", "ranks", "threads each", "memory at most", "KV pool"):
        table.add_column(heading)
    for member in plan.members:
        if member.kind == "router":
            table.add_row(member.name, "router", "", "", "", "")
        else:
            pool = f"{plan.pool.num_blocks:,} × {plan.pool.block_tokens} = {plan.pool.num_tokens:,} tokens"
            where = f"GPU {member.gpu}" if shape is None else shape.name_of(member.gpu)
            memory = f"{f'{where}: ' if member.device == 'cuda' else ''}{mib(member.memory_bytes)}"
            ranks, threads = str(member.num_ranks), str(member.num_threads)
            table.add_row(member.name, str(member.role), ranks, threads, memory, pool)
    out.print(table)
    if plan.spare_gpus:
        out.print(f"{len(plan.spare_gpus)} GPUs have no worker; --prefill and --decode ask for more workers")
    taken = (plan.model.weight_bytes + plan.pool.pool_bytes) / 2**20
    out.print(
        f"each worker takes {taken:,.0f} MiB for weights and KV pool, as requests fill it; at most: its share of what "
        "is free now"
    )
    out.print(f"computes in {plan.model.arithmetic}")
    out.print(f"pool of each worker: {plan.pool.arithmetic}")
    if plan.free_places:
        out.print(
            f"places for {len(plan.free_places)} further workers, which the planner may start (planner.max_workers): "
            "each has its share of this machine already"
        )
    beside = bytes_beside_workers(config) / 2**20
    out.print(f"beside the workers: {beside:,.0f} MiB for the router, the launcher and a Ray that is started for them")
    if plan.pool.num_swap_blocks:
        swap_tokens = plan.pool.num_swap_blocks * plan.pool.block_tokens
        out.print(
            f"swap space of each worker: {config.cache.swap_space:g} GiB = {plan.pool.num_swap_blocks:,} blocks "
            f"= {swap_tokens:,} tokens of preempted sequences"
        )
    out.print(
        f"weights {plan.model.weight_bytes / 2**20:,.1f} MiB per worker · context {plan.model.max_model_len:,} · "
        f"KV {plan.model.kv_spec.bytes_per_token:,} bytes/token"
        + (f" · recurrent state {plan.model.state_bytes:,} bytes/sequence" if plan.model.state_bytes else "")
    )
    if config.speculation.method is not None:
        most = config.speculation.num_speculative_tokens
        out.print(f"speculation: {config.speculation.method}, at most {most} guessed tokens per sequence and step")
    if plan.model.draft:
        out.print(f"draft model, part of the above: {plan.model.draft}")
    out.print(f"where a request says nothing: {plan.model.sampling or 'temperature 1.0, no filters'}")
    for remark in [*(f"note: {remark}" for remark in plan.model.remarks), *settings_remarks(config)]:
        out.print(remark)
    out.print(
        f"ports: HTTP {config.router.host}:{config.router.port} · gRPC {config.router.grpc_port} · "
        f"workers: any · their metrics: {_metrics_ports(plan)}"
    )
    reasons = Table(title="settings that this machine decides, unless given", title_justify="left")
    for heading in ("setting", "value", "why"):
        reasons.add_column(heading)
    flags = {setting: f"--{flag.replace('_', '-')}" for flag, setting in o.SETTING_BY_FLAG.items()}
    for decision in plan.decisions:
        name = f"{decision.setting} ({flags[decision.setting]})" if decision.setting in flags else decision.setting
        reasons.add_row(name, decision.value, decision.reason)
    out.print(reasons)


def _metrics_ports(plan: Plan) -> str:
    ports = [worker.metrics_port for worker in plan.workers]
    if ports[0] is None:
        return "none"
    return f"{ports[0]} to {ports[-1]}" if ports[0] else "any"


async def _serve(config: Config, stop: Stop, *, detached: bool) -> int:
    supervisor: Supervisor | None = None
    doors: Doors | None = None
    is_served = False
    held = _held(config) if detached else None
    deployment: Deployment | None = None
    try:
        with _Progress() as progress:
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


class _Progress:
    """Progress line of the start-up. Without a terminal, each kind of work is logged once."""

    def __init__(self) -> None:
        self._status = console.status("")
        self._said = ""

    def __enter__(self) -> _Progress:
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


def settings_remarks(config: Config) -> list[str]:
    """Notes on settings that are accepted but could be better."""
    remarks = []
    weak = config.router.num_weak_keys
    if weak:
        have = "has" if weak == 1 else "have"
        remarks.append(f"note: {weak} of router.api_keys {have} fewer than {GOOD_KEY_CHARS} characters")
    if not is_loopback_name(numeric_host(config.router.host)) and not config.router.has_keys:
        remarks.append(
            f"note: whoever reaches {config.router.host} may use this, for there are no router.api_keys "
            "(TWOSTROKE__ROUTER__API_KEYS)"
        )
    return remarks


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
