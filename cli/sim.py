"""`twostroke sim`: commands of the simulator."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="Run the production machines under a virtual clock.", no_args_is_help=True)


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
    list_bugs: Annotated[
        bool, typer.Option("--list-bugs", help="List the planted bugs that measure the simulator; play nothing.")
    ] = False,
) -> None:
    """Hand-overs, schedulers, policies, pools and router under faults; every invariant after every event.

    Exit code 1 and the seed where one does not hold. A seed replays byte for byte.
    """
    # Imported here: the command line must start without numpy and the engine.
    from ..sim.faults import Outcome, run_campaign, run_schedule, seeds_of

    def heard(outcome: Outcome) -> None:
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


def _list_bugs() -> None:
    """Print each planted bug with the files that it patches, the invariants that it breaks, its bound and bias."""
    from ..sim.planted import PLANTED

    rows = [("bug", "patches", "breaks", "within", "settings")]
    for bug in PLANTED:
        within = f"{bug.max_seeds} schedules"
        rows.append((bug.name, ", ".join(bug.files), ", ".join(bug.breaks), within, bug.vary.__name__))
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
