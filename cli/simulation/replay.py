"""`twostroke sim replay`: routing policies beside each other on a real trace, under a virtual clock."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from ...core.errors import ConfigError

if TYPE_CHECKING:
    from ...sim.replay.compare import Compared
    from ...sim.replay.figures import Row

_POLICY_HELP = (
    "all, or names separated by commas: ours, round-robin, least-loaded, power-of-two, prefix-only, sglang, dynamo, "
    "llm-d, oracle; NAME+queue: behind our router's queue."
)


def replay(
    context: typer.Context,
    trace: Annotated[Path | None, typer.Option(help="A trace file: .jsonl as Mooncake's, .csv as Azure's.")] = None,
    decisions: Annotated[
        Path | None,
        typer.Option(help="A router's decision log instead: make each of its decisions again, and compare."),
    ] = None,
    policy: Annotated[str, typer.Option(help=_POLICY_HELP)] = "all",
    cluster: Annotated[
        str, typer.Option(help="combined=N, or prefill=N,decode=N; ,machine=FILE: another machine than the H200.")
    ] = "combined=16",
    load: Annotated[str, typer.Option(help="Arrivals as shares of the cluster's capacity.")] = "0.3,0.6,0.9,1.2",
    capacity: Annotated[
        float | None, typer.Option(min=0.001, help="Requests per second; default: measured in the simulation first.")
    ] = None,
    requests: Annotated[int | None, typer.Option(min=10, help="Only the first requests of the trace.")] = None,
    ttft_ms: Annotated[float, typer.Option(min=1.0, help="Target of the first token.")] = 5000.0,
    itl_ms: Annotated[float, typer.Option(min=0.1, help="Target between tokens, as the mean of a request.")] = 75.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the policies that draw lots.")] = 1,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Write goodput over load to this SVG file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as one document.")] = False,
) -> None:
    """Replay a trace through the production router and simulated workers, once per policy and load.

    Prints goodput under both targets with 95 % intervals, regret to an oracle, times to the first token and between
    tokens, hit rate and imbalance. About a minute per policy and load for 12,000 requests on 16 workers, so all
    policies at all loads take more than half an hour: --requests 1000 is a first look.
    """
    if (trace is None) == (decisions is None):
        raise ConfigError("give either --trace FILE or --decisions LOG")
    if decisions is not None:
        _refuse_others(context)
        _again(decisions)
    assert trace is not None
    # Imported here: the command line must start without numpy and the engine.
    from ...sim.replay.compare import compare, parse_loads, parse_policies
    from ...sim.replay.figures import Targets
    from ...sim.replay.plot import plot
    from ...sim.replay.spec import parse_cluster
    from ...sim.replay.trace import read_trace

    policies, loads, spec = parse_policies(policy), parse_loads(load), parse_cluster(cluster)
    if plot_file is not None and plot_file.suffix != ".svg":
        raise ConfigError(f"--plot is {plot_file}; must end in .svg, the only form that is written")
    read = read_trace(trace)
    asks = read if requests is None else read.first(requests)
    targets = Targets(ttft_ms / 1e3, itl_ms / 1e3)
    found = compare(
        asks, spec, policies, loads, targets, capacity=capacity, seed=seed, said=lambda line: typer.echo(line, err=True)
    )
    title = f"{trace.name}: {len(asks.asks):,} requests on {spec}"
    if plot_file is not None:
        plot_file.write_text(plot(found, title), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(document(found, title, targets), indent=2))
        return
    console = Console(width=120)
    console.print(
        f"{title}; capacity {found.capacity_per_s:.2f} requests/s; "
        f"targets: first token in {ttft_ms:g} ms, then {itl_ms:g} ms per token",
        highlight=False,
    )
    for each in loads:
        console.print(table(found.at(each), each))


def _refuse_others(context: typer.Context) -> None:
    """Refuse flags of a comparison beside a decision log: they would change nothing."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if name != "decisions" and source is not None and source.name == "COMMANDLINE":
            raise ConfigError(
                f"--{name.removesuffix('_file').replace('_', '-')} has no meaning with --decisions; leave it out"
            )


def _again(path: Path) -> NoReturn:
    """Make the decisions of a log again. Exit code 1: one differs, or the log has none."""
    from ...sim.replay.decisions import replay_decisions

    found = replay_decisions(path)
    without = f", {found.num_without} requests without recorded decisions" if found.num_without else ""
    typer.echo(f"{found.num_decisions} decisions of {found.num_requests} requests{without}")
    if found.difference is not None:
        typer.echo(f"differs: {found.difference}")
    else:
        typer.echo("each came out the same" if found.num_decisions else "there is nothing to compare")
    raise typer.Exit(0 if found.num_decisions and found.difference is None else 1)


def document(found: Compared, title: str, targets: Any) -> dict[str, Any]:
    """All figures as JSON-able values."""
    rows = [{**asdict(row), **{name: _interval(getattr(row, name)) for name in INTERVALS}} for row in found.rows]
    return {"title": title, "targets": asdict(targets), "capacity_per_s": found.capacity_per_s, "rows": rows}


INTERVALS = ("attained", "ttft_mean_s", "regret")


def _interval(value: Any) -> dict[str, float] | None:
    return None if value is None else value._asdict()


def table(rows: list[Row], load: float) -> Table:
    """One load: a line per policy."""
    shown = Table(title=f"load {load:g} of capacity", title_justify="left", box=None, pad_edge=False)
    shown.add_column("policy", no_wrap=True)
    headings = ("goodput/s", "attained (95 %)", "regret", "TTFT mean", "p50", "p90", "p99 s")
    for heading in (*headings, "ITL p50", "p99 ms", "hits", "imbalance"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(
            row.policy,
            f"{row.goodput_per_s:.2f}",
            f"{row.attained.value:.1%} ({row.attained.low:.1%}-{row.attained.high:.1%})",
            "" if row.regret is None else f"{row.regret.value:.1%}",
            f"{row.ttft_mean_s.value:.2f}",
            f"{row.ttft_p50_s:.2f}",
            f"{row.ttft_p90_s:.2f}",
            f"{row.ttft_p99_s:.2f}",
            f"{row.itl_p50_ms:.1f}",
            f"{row.itl_p99_ms:.1f}",
            f"{row.hit_rate:.1%}",
            f"{row.imbalance:.2f}",
        )
    return shown
