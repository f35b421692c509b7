"""`twostroke sim`: commands of the simulator."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from .replay import replay as replay_traces

TELL_S = 10.0  # between two lines that tell how far a campaign is

app = typer.Typer(help="Run the production machines under a virtual clock.", no_args_is_help=True)
app.command(name="replay")(replay_traces)


@app.callback()
def _simulators() -> None:
    pass


@app.command()
def faults(
    schedules: Annotated[int, typer.Option(min=1, help="How many random schedules to play.")] = 500,
    seed: Annotated[
        int, typer.Option(min=0, help="Which campaign: its schedules have seeds from 1,000,000 times it on.")
    ] = 0,
    replay: Annotated[int | None, typer.Option(min=0, help="Play this one schedule again instead.")] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Print how each schedule ended; with --replay, every event.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, with --journal.")] = 1,
    journal: Annotated[
        Path | None, typer.Option(help="File of what is done: a stopped campaign goes on there, with progress.")
    ] = None,
    list_bugs: Annotated[
        bool, typer.Option("--list-bugs", help="List the planted bugs that measure the simulator; play nothing.")
    ] = False,
) -> None:
    """Hand-overs, schedulers, policies, pools and router under faults; every invariant after every event.

    Exit code 1 and the seed where one does not hold. A seed replays byte for byte.
    """
    # Imported here: the command line must start without numpy and the engine.
    from ...sim.faults import Outcome, run_campaign, run_schedule, seeds_of

    num_played, told_s = 0, time.monotonic()

    def heard(outcome: Outcome) -> None:
        nonlocal num_played, told_s
        num_played += 1
        if not verbose and time.monotonic() - told_s > TELL_S:
            told_s = time.monotonic()
            typer.echo(f"{num_played} of {schedules} schedules", err=True)
        if verbose:
            ends = ", ".join(f"{count} {end}" for end, count in sorted(outcome.ends.items()))
            typer.echo(
                f"{outcome.seed}: {outcome.num_events} events, {outcome.lasted_s:.2f} s, {outcome.digest}: {ends}"
            )

    if list_bugs:
        _list_bugs()
        return

    if replay is not None:
        outcome = run_schedule(replay, keep_all=verbose)
        for line in outcome.lines:
            typer.echo(line)
        typer.echo(f"seed {replay}: {outcome.num_events} events, transcript {outcome.digest}")
        typer.echo(str(outcome.violation or "every invariant held"))
        raise typer.Exit(1 if outcome.violation else 0)

    if journal is not None:
        _continue(journal, seed, schedules, jobs)
        return

    campaign = run_campaign(seeds_of(seed, schedules), heard=heard)
    for outcome in campaign.failed:
        typer.echo("\n".join(outcome.lines))
        typer.echo(f"violated {outcome.violation}")
        typer.echo(f"replay it: twostroke sim faults --replay {outcome.seed} --verbose")
    ends = ", ".join(f"{count} {end}" for end, count in campaign.ends.most_common())
    typer.echo(f"requests: {ends}")
    typer.echo(
        f"{campaign.num_schedules} schedules, {campaign.num_events} events, {campaign.virtual_s:.0f} virtual seconds "
        f"in {campaign.real_s:.1f} s: {campaign.schedules_per_s:.0f} schedules/s"
    )
    bad = len(campaign.failed)
    typer.echo(
        f"FAILED: {bad} schedules broke an invariant"
        if bad
        else "passed: every invariant held (requests may fail in this weather; what they got may not be wrong)"
    )
    raise typer.Exit(1 if campaign.failed else 0)


def _continue(path: Path, campaign: int, schedules: int, jobs: int) -> None:
    """Play what a campaign's journal does not have yet, on several cores."""
    from ...sim.campaigns.journal import Journal, Sums, code_digest
    from ...sim.campaigns.runner import run_ranges

    journal = Journal(path, campaign, code_digest())
    known = sum(done.count for done in journal.done)
    if known:
        typer.echo(f"{known} schedules are done already, by {path}")
    began_s = time.perf_counter()

    def heard(sums: Sums) -> None:
        per_s = (sums.num_schedules - known) / (time.perf_counter() - began_s)
        left_min = max(0, schedules - sums.num_schedules) / per_s / 60 if per_s > 0 else 0.0
        typer.echo(
            f"\r{sums.num_schedules} of {schedules} schedules, {per_s:.0f}/s, {left_min:.0f} min left   ",
            nl=False,
            err=True,
        )

    sums = run_ranges(campaign, schedules, journal, jobs, heard)
    typer.echo("", err=True)
    ends = ", ".join(f"{count} {end}" for end, count in sums.ends.most_common())
    typer.echo(f"requests: {ends}")
    typer.echo(
        f"{sums.num_schedules} schedules, {sums.num_events} events, {sums.virtual_s:.0f} virtual seconds, "
        f"{time.perf_counter() - began_s:.1f} s in this run"
    )
    for seed in sums.failed:
        typer.echo(f"FAILED: replay it: twostroke sim faults --replay {seed} --verbose")
    if not sums.failed:
        typer.echo("passed: every invariant held (requests may fail in this weather; what they got may not be wrong)")
    raise typer.Exit(1 if sums.failed else 0)


def _list_bugs() -> None:
    """Print each planted bug with the files that it patches, the invariants that it breaks, its bound and bias."""
    from ...sim.planted import PLANTED

    rows = [("bug", "patches", "breaks", "within", "settings")]
    for bug in PLANTED:
        within = f"{bug.max_seeds} schedules"
        rows.append((bug.name, ", ".join(bug.files), ", ".join(bug.breaks), within, bug.vary.__name__))
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@app.command()
def exhaustive(
    scope: Annotated[
        str, typer.Option(help="requests x prefill workers x decode workers x faults; + at the end: crowded workers.")
    ] = "1x1x1x1+",
    max_states: Annotated[
        int, typer.Option(min=1, help="Stop there; about 300 bytes of memory per state.")
    ] = 20_000_000,
    max_minutes: Annotated[float, typer.Option(min=0.0, help="Stop then.")] = 60.0,
    edges: Annotated[
        bool, typer.Option("--edges", help="Print the edges of both hand-over machines, as in docs/handover.md.")
    ] = False,
) -> None:
    """Every schedule of a small cluster: all orders of all events, with up to so many faults, and that every run ends.

    Exit code 1 and a shortest trace where an invariant does not hold; 2 where a bound came first.
    """
    # Imported here: the command line must start without numpy and the engine.
    import logging

    from ...sim.exhaustive.edges import tables
    from ...sim.exhaustive.search import Found, search
    from ...sim.exhaustive.state import Scope

    logging.disable(logging.CRITICAL)  # faults would make production code log thousands of warnings
    if edges:
        typer.echo("\n\n".join(tables()))
        return

    def heard(found: Found) -> None:
        line = f"{found.num_states} states, depth {found.depth}, {found.num_states / found.real_s:.0f}/s"
        typer.echo(f"\r{line}   ", nl=False, err=True)

    try:
        wanted = Scope.parse(scope)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--scope") from None
    found = search(wanted, max_states=max_states, max_s=max_minutes * 60, heard=heard)
    typer.echo("", err=True)
    typer.echo(
        f"{found.scope}: {found.num_states} states, {found.num_moves} moves, {found.num_ends} ends, "
        f"depth {found.depth}, {found.decided} decisions of production code, {found.real_s:.1f} s"
    )
    ends = ", ".join(f"{count} {outcome}" for outcome, count in found.outcomes.most_common())
    typer.echo(f"outcomes over the ends: {ends}")
    if found.violation is not None:
        typer.echo("\n".join(found.trace))
        typer.echo(f"violated {found.violation}")
        raise typer.Exit(1)
    if not found.is_closed:
        typer.echo("a bound was reached before every state was visited; those visited hold every invariant")
        raise typer.Exit(2)
    typer.echo(
        f"closed: every invariant holds, and every run ends within {found.longest_run} moves after its last fault"
    )


@app.command()
def scale(
    trace: Annotated[
        str,
        typer.Argument(help="A trace file (.jsonl as Mooncake's, .csv as Azure's), or the made ones: bursts, drift."),
    ],
    copies: Annotated[int, typer.Option(min=1, help="Every request of a file so many times, seconds apart.")] = 1,
    ttft_ms: Annotated[float, typer.Option(min=1.0, help="Target of the first token.")] = 2000.0,
    itl_ms: Annotated[float, typer.Option(min=0.1, help="Target between tokens, as the mean of a request.")] = 20.0,
    start_up_s: Annotated[float, typer.Option(min=1.0, max=140.0, help="Until a started worker serves.")] = 60.0,
    most: Annotated[int, typer.Option(min=2, max=256, help="Most workers of each role.")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="Of copies and made traces.")] = 1,
) -> None:
    """The planner on a trace, beside the best static split, KEDA's rule and an oracle: attainment and GPU-hours.

    A queue-level model with step times measured on an H200 (sim/scale/machine.py). Takes minutes.
    """
    from ...sim.scale.cluster import Times
    from ...sim.scale.compare import Case, Comparison
    from ...sim.scale.demand import bursts, copied, drift, read_trace

    made = {"bursts": bursts, "drift": drift}
    demands = made[trace](seed) if trace in made else copied(read_trace(Path(trace)), copies, seed)
    case = Case(demands, ttft_ms / 1e3, itl_ms / 1e3, times=Times(start_up_s), most=most)
    comparison = Comparison(case, lambda line: typer.echo(line, err=True))
    best = comparison.best_static()
    split = next(split for split, row in comparison.played if row is best)
    rows = [best, comparison.planner(split), *comparison.keda(split), comparison.oracle(best)]
    heads = f"{'control':<42}{'attained':>9}{'TTFT':>9}{'ITL':>9}"
    typer.echo(heads + f"{'GPU-hours':>11}{'of static':>11}{'roles':>7}{'starts':>8}")
    for row in rows:
        typer.echo(
            f"{row.control:<42}{row.attainment:>9.2%}{row.ttft_attainment:>9.2%}{row.itl_attainment:>9.2%}"
            f"{row.gpu_hours:>11.2f}{row.gpu_hours / best.gpu_hours:>11.2f}{row.role_changes:>7}{row.starts:>8}"
        )
