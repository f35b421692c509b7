"""This tree beside another one: the engine, the hand-over and a served load, in alternating runs on the same cores.

    git worktree add /tmp/before COMMIT && git worktree add --detach /tmp/after
    python bench/beside.py /tmp/before /tmp/after [--rounds 5] [--only engine handover serve]

Each round runs each benchmark of both trees, one after the other, the order turned from round to round. A ratio is the
median over the rounds of after / before (before / after for times), so above 1 is better. The trees' own files under
`bench/results` are overwritten; use trees that may be thrown away.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import report

TIMEOUT_S = 900.0
ENGINE_LINE = re.compile(r"round 1, (.+), (twostroke .+): ([0-9.]+) tokens/s")
# The campaign without what it measures of the machine, which takes minutes and is the same for both.
# It keeps PYTHONPATH from its contestants, so ours gets its tree's by the program that starts it.
ENGINE = """
import pathlib, sys
sys.path[:0] = ["bench/engine", "bench"]
import campaign
campaign.Campaign._install = lambda self, entry: "not asked" if entry is campaign.LIMITS else None
starter = pathlib.Path("build/python")
starter.parent.mkdir(exist_ok=True)
starter.write_text(f'#!/bin/sh\\nPYTHONPATH="{pathlib.Path.cwd()}/src" exec {sys.executable} "$@"\\n')
starter.chmod(0o755)
campaign.python_of = lambda *_: starter.resolve()
sys.argv = ["campaign", "--only", "twostroke bf16", "--rounds", "1", *sys.argv[1:]]
campaign.main()
"""
Figures = dict[str, float]


def run(tree: Path, *command: str) -> str:
    """The output of a Python program of a tree.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    environment = os.environ | {"PYTHONPATH": str(tree / "src")}
    call = [sys.executable, *command]
    done = subprocess.run(
        call, cwd=tree, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{tree}: {' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def saved(tree: Path, name: str) -> dict[str, Any]:
    """What a benchmark wrote for scripts."""
    found: dict[str, Any] = json.loads((tree / "bench" / "results" / f"{name}.json").read_text())
    return found


def engine(tree: Path, measures: Sequence[str] = ()) -> Figures:
    """Tokens per second of the engine alone, by measure; all measures, or those named."""
    output = run(tree, "-c", ENGINE, *(["--measures", *measures] if measures else []))
    return {f"{name}, {measure}, tokens/s": float(value) for measure, name, value in ENGINE_LINE.findall(output)}


def handover(tree: Path) -> Figures:
    """GB/s of a hand-over between two worker processes."""
    run(tree, "bench/handover.py", "--rounds", "3", "--frames-kib", "1024")
    cases = saved(tree, "handover")["cases"]
    return {f"{case['codec']}, 1 MiB frames, GB/s": statistics.median(case["handover"]) for case in cases}


def serve(tree: Path) -> Figures:
    """Open-loop load over the whole cluster."""
    run(tree, "bench/serve.py", "--requests", "20", "--rate", "1", "--rounds", "1")
    rounds = saved(tree, "serve")["rounds"]
    names = ("ttft_p50_ms", "itl_p50_ms", "tokens_per_s")
    return {f"{topology}, {name}": runs[0][name] for topology, runs in rounds.items() for name in names}


BENCHMARKS: dict[str, Callable[[Path], Figures]] = {"engine": engine, "handover": handover, "serve": serve}


def ratio(name: str, before: list[float], after: list[float]) -> float:
    """Above 1: the second is better."""
    is_time = name.endswith("_ms")
    return statistics.median(b / a if is_time else a / b for b, a in zip(before, after, strict=True))


def main() -> None:
    """Run and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=tuple(BENCHMARKS), default=list(BENCHMARKS))
    parser.add_argument("--measures", nargs="+", default=[], help="of the engine, e.g. 'decode 1'; default: all")
    given = parser.parse_args()
    trees = (given.before.resolve(), given.after.resolve())
    facts = report.machine()
    benchmarks = BENCHMARKS | {"engine": partial(engine, measures=given.measures)}
    found: dict[str, tuple[list[float], list[float]]] = {}
    for number in range(given.rounds):
        for benchmark in given.only:
            for side in (0, 1) if number % 2 == 0 else (1, 0):
                for name, value in benchmarks[benchmark](trees[side]).items():
                    found.setdefault(f"{benchmark}: {name}", ([], []))[side].append(value)
                    print(
                        f"round {number + 1}, {('before', 'after')[side]}, {benchmark}: {name}: {value:.4g}", flush=True
                    )
    ratios = {name: ratio(name, before, after) for name, (before, after) in found.items()}
    rows = [
        (name, report.spread(before), report.spread(after), f"{ratios[name]:.3f}")
        for name, (before, after) in found.items()
    ]
    commits = [run_git(tree) for tree in trees]
    headings = ("figure", f"{commits[0]}, median (range)", f"{commits[1]}, median (range)", "ratio, above 1 is better")
    words = f"{given.rounds} rounds; the median of all ratios is {statistics.median(ratios.values()):.3f}."
    body = f"{words}\n\n{report.table(headings, rows)}"
    print(report.save("beside", "This tree beside an earlier one", body, {"commits": commits, "found": found}, facts))
    print(body)


def run_git(tree: Path) -> str:
    """The short name of the commit of a tree."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=tree, capture_output=True, text=True, check=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
