"""Plants one small bug after another into a copy of the tree and asks tests and simulator whether they see it.

    python tests/mutants/campaign.py [--only WORDS] [--ask both] [--jobs 2] [--timeout 120]

For each: the quick tests of its file first, then 400 schedules of the simulator, if it plays that file. Found: one of
them fails. Exit status 1: a bug was seen by nobody and is not explained, or an explained one was seen.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from mutant import ROOT, Mutant
from planted import MUTANTS, TESTS

SCHEDULES = ("-P", "-m", "twostroke.cli.main", "sim", "faults", "--schedules", "400", "--seed", "910001")


@dataclass(frozen=True)
class Verdict:
    """Who saw a mutant, and after how long."""

    mutant: Mutant
    seen_by: str  # empty: nobody
    seconds: float

    @property
    def is_right(self) -> bool:
        """Seen, or explained."""
        return bool(self.seen_by) != bool(self.mutant.survives)


class Copies:
    """Copies of the tree, one for each job."""

    def __init__(self, folder: Path, jobs: int, asked: str, timeout_s: float) -> None:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout
        names = [name for name in listed.decode().split("\0") if name]
        self._asked = asked
        self._timeout_s = timeout_s
        self._free = [folder / str(job) for job in range(jobs)]
        for copy in self._free:
            for name in names:
                place = copy / name
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, place, follow_symlinks=False)

        self._played = _played(self._free[0]) if asked != "tests" else frozenset()

    def judge(self, mutant: Mutant) -> Verdict:
        """Plant, ask, take out again."""
        copy = self._free.pop()
        place, began_s = copy / mutant.file, time.monotonic()
        text = place.read_text()
        place.write_text(mutant.planted(text))
        try:
            return Verdict(mutant, self._seen_by(mutant, copy), time.monotonic() - began_s)
        finally:
            place.write_text(text)
            self._free.append(copy)

    def _seen_by(self, mutant: Mutant, copy: Path) -> str:
        asked: dict[str, tuple[str, ...]] = {}
        if self._asked != "simulator":
            tests = mutant.found_by or next(words for part, words in TESTS.items() if mutant.file.startswith(part))
            asked["tests"] = ("-P", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests)
        if mutant.file in self._played:
            asked["simulator"] = SCHEDULES
        for who, words in asked.items():
            failure = _fails([sys.executable, *words], copy, self._timeout_s)
            if failure:
                return f"{who} ({failure})"
        return ""


def _played(copy: Path) -> frozenset[str]:
    """The files that the simulator runs."""
    tell = "import sys, twostroke.sim.faults; print(*(module.__file__ or '' for module in sys.modules.values() if "
    tell += "module.__name__.startswith('twostroke.')), sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-P", "-c", tell], env=_environment(copy), check=True, capture_output=True, text=True
    )
    source = copy / "src" / "twostroke"
    return frozenset(line.removeprefix(f"{source}/") for line in done.stdout.splitlines())


def _environment(copy: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1"}


def _fails(command: list[str], copy: Path, timeout_s: float) -> str:
    try:
        done = subprocess.run(
            command, cwd=copy, env=_environment(copy), capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return f"not at its end after {timeout_s:g} s"
    if done.returncode == 0:
        return ""
    said = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR")) or "violated" in line]
    return said[0][:140] if said else f"exit status {done.returncode}"


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutants whose name has this (a regular expression)")
    parser.add_argument("--ask", choices=("both", "tests", "simulator"), default="both")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for the tests, and for the simulator")
    given = parser.parse_args()
    mutants = [mutant for mutant in MUTANTS if re.search(given.only, mutant.name)]
    verdicts: list[Verdict] = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(given.jobs) as pool:
        copies = Copies(Path(folder), given.jobs, given.ask, given.timeout)
        for verdict in pool.map(copies.judge, mutants):
            verdicts.append(verdict)
            told = verdict.seen_by or f"SURVIVES {verdict.mutant.survives}"
            print(f"{verdict.seconds:6.1f} s  {verdict.mutant.name}: {told}", flush=True)
    wrong = [verdict for verdict in verdicts if not verdict.is_right]
    print(f"{len(verdicts)} mutants, {sum(bool(v.seen_by) for v in verdicts)} seen, {len(wrong)} not as they should be")
    for verdict in wrong:
        print(f"  {verdict.mutant.name}\n    {verdict.mutant.old!r}\n    {verdict.mutant.new!r}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
