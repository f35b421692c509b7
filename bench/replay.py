"""Routing policies beside each other on real traces: goodput, latencies, hit rate and regret to an oracle, simulated.

    python bench/replay.py [--traces ../shared/traces] [--setup mooncake] [--runs FOLDER]

Writes bench/results/replay.md, .json and a plot for each setup.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import report

from twostroke.sim.replay.compare import Compared, capacity_per_s
from twostroke.sim.replay.figures import Interval, Row, Targets, row_of
from twostroke.sim.replay.play import ORACLE, OURS, POLICIES, Course, Played, play
from twostroke.sim.replay.plot import plot
from twostroke.sim.replay.spec import parse_cluster
from twostroke.sim.replay.trace import read_trace

LOADS = (0.3, 0.6, 0.9, 1.2)
BOUND = 0.02  # of the best peer's goodput
MOST_REGRET = 0.10


@dataclass(frozen=True)
class Setup:
    """One trace on one cluster."""

    title: str
    file: str
    cluster: str
    requests: int
    targets: Targets


SETUPS = {
    "mooncake": Setup(
        "Mooncake conversations, 16 combined workers",
        "mooncake_conversation.jsonl",
        "combined=16",
        2000,
        Targets(5.0, 0.075),
    ),
    "mooncake_pairs": Setup(
        "Mooncake conversations, 12 prefill and 4 decode workers",
        "mooncake_conversation.jsonl",
        "prefill=12,decode=4",
        1000,
        Targets(5.0, 0.075),
    ),
    "azure": Setup(
        "Azure 2023 conversations, 4 combined workers",
        "azure_conversation_2023.csv",
        "combined=4",
        3_000,
        Targets(0.5, 0.075),
    ),
}


def rows_of(found: dict[str, Any]) -> list[Row]:
    """Rows of stored values."""
    intervals = ("attained", "ttft_mean_s", "regret")
    return [
        Row(**{**row, **{name: Interval(*row[name]) if row[name] else None for name in intervals}})
        for row in found["rows"]
    ]


def summary(rows: Sequence[Row]) -> str:
    """Ours beside the best other policy at each load, and in sum."""
    lines, sums = [], dict.fromkeys([row.policy for row in rows], 0.0)
    for row in rows:
        sums[row.policy] += row.goodput_per_s
    for load in LOADS:
        by_name = {row.policy: row for row in rows if row.load == load}
        if OURS not in by_name:
            continue
        ours = by_name[OURS]
        best = max((row for name, row in by_name.items() if name not in (OURS, ORACLE)), key=lambda r: r.goodput_per_s)
        apart = ours.goodput_per_s / best.goodput_per_s - 1
        regret = ours.regret.value if ours.regret else 0.0
        verdict = "held" if apart >= -BOUND and regret < MOST_REGRET else "MISSED"
        lines.append(f"load {load:g}: {apart:+.1%} beside {best.policy}, regret {regret:.1%} ({verdict})")
    others = max((name for name in sums if name not in (OURS, ORACLE)), key=lambda name: sums[name])
    whole = sums[OURS] / sums[others] - 1
    return "; ".join(lines) + f". Sum over the loads: {whole:+.1%} beside the best other, {others}."


def section(name: str, found: dict[str, Any]) -> list[str]:
    """The text of one setup."""
    headings = ("load", "policy", "goodput/s", "attained (95 %)", "regret", "TTFT mean s (95 %)", "p50", "p90", "p99")
    cells = [
        (
            f"{row.load:g}",
            row.policy,
            f"{row.goodput_per_s:.2f}",
            f"{row.attained.value:.1%} ({row.attained.low:.1%}–{row.attained.high:.1%})",
            "" if row.regret is None or row.policy == ORACLE else f"{row.regret.value:.1%}",
            f"{row.ttft_mean_s.value:.2f} ({row.ttft_mean_s.low:.2f}–{row.ttft_mean_s.high:.2f})",
            f"{row.ttft_p50_s:.2f}",
            f"{row.ttft_p90_s:.2f}",
            f"{row.ttft_p99_s:.1f}",
            f"{row.itl_p50_ms:.1f}",
            f"{row.itl_p99_ms:.1f}",
            f"{row.hit_rate:.1%}",
            f"{row.imbalance:.2f}",
        )
        for row in rows_of(found)
    ]
    targets = found["targets"]
    return [
        f"## {found['title']}",
        f"{found['requests']:,} requests, capacity {found['capacity_per_s']:.2f} requests/s; targets: first token in "
        f"{targets['ttft_s']:g} s, then {targets['itl_s'] * 1e3:g} ms per token (a request's mean).",
        report.table((*headings, "ITL p50 ms", "p99", "hits", "imbalance"), cells),
        "Ours: " + summary(rows_of(found)),
        f"![goodput over load](replay_{name}.svg)",
    ]


def body_of(setups: dict[str, Any]) -> str:
    """The text of the result."""
    text = [
        "Simulated (`sim/replay`): the production router over workers that play steps with times measured on an H200 "
        "(`sim/scale/machine.py`), 2 ms per message. Every policy gets the same arrivals: the trace's, stretched to "
        "shares of the capacity, which is the rate at which the cluster completes requests while all wait, under the "
        "production policy. Compared policies send each request on at once, as their routers do, with better facts "
        "than those have (`sim/replay/peers.py`); ours and the oracle let requests wait while all workers are full. "
        "The oracle is the production policy with true times, lengths and caches: regret is the price of not knowing "
        "them. It is no optimum, so a negative regret is possible. Intervals: 95 %, bootstrap over 24 windows of "
        "arrivals. Aim: ours within 2 % of the best other at every load, best in sum, regret below 10 %.",
    ]
    for name in SETUPS:
        if name in setups:
            text += section(name, setups[name])
    return "\n\n".join(text)


def played(folder: Path, name: str, setup: Setup, traces: Path, most_s: float) -> dict[str, Any] | None:
    """All runs of one setup; those that are in the folder are not played again. None: `most_s` is over before."""
    began_s = time.perf_counter()
    trace, spec = read_trace(traces / setup.file).first(setup.requests), parse_cluster(setup.cluster)
    kept = folder / f"{name}.capacity"
    if not kept.exists():
        kept.write_text(str(capacity_per_s(trace, spec)))
    capacity, rows = float(kept.read_text()), []
    for load in LOADS:
        oracle: Played | None = None
        for policy in (ORACLE, *(each for each in POLICIES if each != ORACLE)):
            file = folder / f"{name}-{load:g}-{policy}.json"
            if not file.exists():
                if time.perf_counter() - began_s > most_s:
                    return None
                file.write_text(json.dumps(asdict(play(trace.at_rate(load * capacity), spec, policy))))
            run = _run_of(json.loads(file.read_text()))
            oracle = run if policy == ORACLE else oracle
            rows.append(row_of(run, load, setup.targets, oracle))
            print(f"{name} {load:g} {policy}: {rows[-1].attained.value:.2%}", flush=True)
    rows.sort(key=lambda row: (row.load, POLICIES.index(row.policy)))
    (report.RESULTS / f"replay_{name}.svg").write_text(plot(Compared(capacity, tuple(rows)), setup.title))
    return {
        "title": setup.title,
        "requests": len(trace.asks),
        "capacity_per_s": capacity,
        "targets": asdict(setup.targets),
        "rows": [asdict(row) for row in rows],
    }


def _run_of(told: dict[str, Any]) -> Played:
    courses = [Course(**course) for course in told["courses"]]
    gaps_ms = {int(gap): tokens for gap, tokens in told["gaps_ms"].items()}
    return Played(**{**told, "courses": courses, "gaps_ms": gaps_ms})


def main() -> None:
    """Play, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=Path("../shared/traces"), help="folder of the two real traces")
    parser.add_argument("--setup", choices=tuple(SETUPS), help="only this one; the figures of others stay")
    parser.add_argument("--runs", type=Path, help="folder in which runs are kept, so that a stopped bench goes on")
    parser.add_argument("--most-s", type=float, default=1e9, help="begin no run after so many seconds; exit status 3")
    arguments = parser.parse_args()
    facts, old = report.machine(), report.RESULTS / "replay.json"
    setups = json.loads(old.read_text())["setups"] if old.exists() else {}
    with tempfile.TemporaryDirectory() as fresh:
        folder = arguments.runs or Path(fresh)
        folder.mkdir(parents=True, exist_ok=True)
        for name, setup in SETUPS.items():
            if arguments.setup in (None, name):
                found = played(folder, name, setup, arguments.traces, arguments.most_s)
                if found is None:
                    sys.exit(3)
                setups[name] = found
                report.save("replay", "Routing policies on real traces", body_of(setups), {"setups": setups}, facts)
    print((report.RESULTS / "replay.md").read_text())


if __name__ == "__main__":
    main()
