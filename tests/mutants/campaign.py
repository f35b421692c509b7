"""Plants one small bug after another into a copy of the tree and asks tests and simulator whether they see it.

    python tests/mutants/campaign.py [--only WORDS] [--ask both] [--jobs 2] [--timeout 120]

All of them must pass before anything is planted. For each bug: the quick tests of its file first, then 400 schedules of
the simulator, if it plays that file. Found: one of them fails. Exit status 1: a bug was seen by nobody and is not
explained, or an explained one was seen, or something failed without a bug.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from mutant import ROOT, Mutant
from planted import MUTANTS, TESTS

UNPLANTED = 5  # times the limit, for tests with nothing planted: on a busy machine some take longer than it
SLOWER = 3  # times what its tests took with nothing planted, before a mutant's count as hanging
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


class Copy:
    """A copy of the tree, compiled, and the process that runs its tests."""

    def __init__(self, place: Path) -> None:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout
        for name in listed.decode().strip("\0").split("\0"):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name, follow_symlinks=False)
        self.place = place
        by_content = ("-m", "compileall", "-q", "--invalidation-mode", "checked-hash", ".")
        subprocess.run([sys.executable, *by_content], cwd=place, check=False)
        nursery = [sys.executable, "-P", Path(__file__).with_name("nursery.py"), place]
        self._nursery = subprocess.Popen(
            nursery, env=environment(place), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def tests_fail(self, tests: Sequence[str], timeout_s: float) -> str:
        """What fails first; empty: nothing."""
        asks, answers = self._nursery.stdin, self._nursery.stdout
        assert asks is not None
        assert answers is not None
        print(json.dumps((["-x", "-v", "-p", "no:cacheprovider", *tests], timeout_s)), file=asks, flush=True)
        failed: str = json.loads(answers.readline())
        return failed

    def schedules_fail(self, timeout_s: float) -> str:
        """The simulator's first words of a violation; empty: there is none."""
        try:
            done = subprocess.run(
                [sys.executable, *SCHEDULES],
                cwd=self.place,
                env=environment(self.place),
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"not at its end after {timeout_s:g} s"
        said = [line for line in done.stdout.splitlines() if "violated" in line]
        return "" if done.returncode == 0 else said[0][:140] if said else f"exit status {done.returncode}"

    def close(self) -> None:
        """End its process."""
        self._nursery.terminate()
        self._nursery.wait()


class Judges:
    """Ask tests and simulator, each mutant in a copy that no other one has meanwhile."""

    def __init__(self, copies: Sequence[Copy], asked: str, timeout_s: float) -> None:
        self._free = list(copies)
        self._asks_tests = asked != "simulator"
        self._played = _played(copies[0].place) if asked != "tests" else frozenset()
        self._timeout_s = timeout_s
        self._took_s: dict[str, float] = {}  # each file of tests, with nothing planted

    def fail_unplanted(self, mutants: Sequence[Mutant]) -> list[str]:
        """What fails without a mutant, file by file: such a test sees nothing."""
        copy, failed = self._free[-1], []
        if self._asks_tests:
            for file in dict.fromkeys(file for mutant in mutants for file in _tests_of(mutant)):
                began_s = time.monotonic()
                failed.append(copy.tests_fail((file,), UNPLANTED * self._timeout_s))
                self._took_s[file] = time.monotonic() - began_s
        if any(mutant.file in self._played for mutant in mutants):
            failed.append(copy.schedules_fail(self._timeout_s))
        return [said for said in failed if said]

    def judge(self, mutant: Mutant) -> Verdict:
        """Plant, ask, take out again."""
        copy = self._free.pop()
        place, began_s = copy.place / mutant.file, time.monotonic()
        text = place.read_text()
        place.write_text(mutant.planted(text))
        try:
            return Verdict(mutant, self._seen_by(mutant, copy), time.monotonic() - began_s)
        finally:
            place.write_text(text)
            self._free.append(copy)

    def _seen_by(self, mutant: Mutant, copy: Copy) -> str:
        tests = _tests_of(mutant)
        limit_s = max(self._timeout_s, SLOWER * sum(self._took_s.get(file, 0.0) for file in tests))
        if self._asks_tests and (failed := copy.tests_fail(tests, limit_s)):
            return f"tests ({failed})"
        if mutant.file in self._played and (failed := copy.schedules_fail(self._timeout_s)):
            return f"simulator ({failed})"
        return ""


def _tests_of(mutant: Mutant) -> tuple[str, ...]:
    return next(files for part, files in TESTS.items() if mutant.file.startswith(part))


def _played(copy: Path) -> frozenset[str]:
    """The files that the simulator runs."""
    tell = "import sys, twostroke.sim.faults; print(*(module.__file__ or '' for module in sys.modules.values() if "
    tell += "module.__name__.startswith('twostroke.')), sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-P", "-c", tell], env=environment(copy), check=True, capture_output=True, text=True
    )
    source = copy / "src" / "twostroke"
    return frozenset(line.removeprefix(f"{source}/") for line in done.stdout.splitlines())


def _counted(verdicts: Sequence[Verdict]) -> str:
    seen = [verdict.seen_by for verdict in verdicts if verdict.seen_by]
    late = sum("not at its end" in said for said in seen)
    tests = sum(said.startswith("tests") for said in seen)
    words = f"{tests} seen by tests, {len(seen) - tests} by the simulator ({late} of all these by a time-out)"
    return f"{words}, {len(verdicts) - len(seen)} by nobody"


def environment(copy: Path) -> dict[str, str]:
    """In which Python runs a copy."""
    return os.environ | {"PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1"}


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutants whose name has this (a regular expression)")
    parser.add_argument("--ask", choices=("both", "tests", "simulator"), default="both")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--timeout", type=float, default=120.0, help="least seconds for the tests, and for the simulator"
    )
    given = parser.parse_args()
    mutants = [mutant for mutant in MUTANTS if re.search(given.only, mutant.name)]
    verdicts: list[Verdict] = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(given.jobs) as pool:
        copies = [Copy(Path(folder) / str(job)) for job in range(given.jobs)]
        judges = Judges(copies, given.ask, given.timeout)
        if failed := judges.fail_unplanted(mutants):
            print("fails before anything is planted:", *failed, sep="\n  ")
            return 1
        for verdict in pool.map(judges.judge, mutants):
            verdicts.append(verdict)
            told = verdict.seen_by or f"SURVIVES {verdict.mutant.survives}"
            print(f"{verdict.seconds:6.1f} s  {verdict.mutant.name}: {told}", flush=True)
        for copy in copies:
            copy.close()
    wrong = [verdict for verdict in verdicts if not verdict.is_right]
    print(f"{len(verdicts)} mutants: {_counted(verdicts)}; {len(wrong)} not as they should be")
    for verdict in wrong:
        print(f"  {verdict.mutant.name}\n    {verdict.mutant.old!r}\n    {verdict.mutant.new!r}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
