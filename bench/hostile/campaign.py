"""Hostile inputs beside running streams: the longest gap of any stream, the router's memory, who was killed.

    python bench/hostile/campaign.py [--fuzz 100] [--seed 1] [--only PATTERN] [--times 4] [--known | --no-known]

A cluster of `twostroke serve --launcher process` with two API keys; 24 streams over HTTP and gRPC run all the time
under one of them, and who attacks with a key has the other. Every input is sent `--times` at once. Before each, a quiet
window of the same streams tells what the machine itself does.
An input beside which a gap exceeds the bound is sent in four more windows after all others, since a virtual machine
stands still at times without any attack, often several times in a minute: the median of the five counts, and the table
shows all.
Right is: that gap is at most 100 ms, the router's memory grows by at most 64 MiB, every process lives on, and no stream
breaks. Exit status 1: something was not right.
"""

from __future__ import annotations

import argparse
import re
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "load_generators"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import report
from attack import Attack, Input
from fuzz import fuzzed
from known import KNOWN
from neighbours import Neighbours, Seen, Served
from server import served

from twostroke.core.ports import free_ports

NUM_HTTP, NUM_GRPC = 18, 6
MOST_GAP_MS = 100.0
MOST_GROWTH_MIB = 64.0
QUIET_S, AFTER_S, WARM_UP_S = 1.5, 0.7, 8.0
MORE_WINDOWS = 4  # for an input whose first one exceeds the bound


@dataclass(frozen=True)
class Outcome:
    """One input and what it did to the others."""

    name: str
    answers: str
    seconds: float
    quiet_ms: float
    gaps_ms: tuple[float, ...]  # of one window, or of five
    growth_mib: float  # the router's peak during the attack over what it held before
    broken: int
    errors: tuple[str, ...]
    died: int

    @property
    def gap_ms(self) -> float:
        """The median of the windows."""
        return statistics.median(self.gaps_ms)

    def gaps_text(self) -> str:
        """Every window's gap."""
        return ", ".join(f"{gap:.0f}" for gap in self.gaps_ms)

    def wrong(self) -> list[str]:
        """What is not right."""
        wrong = []
        if self.gap_ms > MOST_GAP_MS:
            wrong.append("gap")
        if self.growth_mib > MOST_GROWTH_MIB:
            wrong.append("memory")
        if self.broken:
            wrong.append("streams broke")
        if self.died:
            wrong.append("killed")
        return wrong


class Cluster:
    """The processes of one serve, by their command lines."""

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self.members = self._find()
        self.router = next(pid for pid, words in self.members.items() if " router" in words)

    def died(self) -> int:
        """How many members are not there any more; those that replaced them count from now on."""
        now = self._find()
        died = len(set(self.members) - set(now))
        if died:
            self.members = now
            self.router = next((pid for pid, words in now.items() if " router" in words), self.router)
        return died

    def _find(self) -> dict[int, str]:
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if self._mark.encode() in (entry / "environ").read_bytes():
                    words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if " serve " not in words:
                        found[int(entry.name)] = words
            except OSError:
                continue
        return found

    def memory_mib(self, which: str = "VmRSS") -> float:
        """The router's, now or at its peak since `forget_peak`."""
        try:
            status = Path(f"/proc/{self.router}/status").read_text()
        except OSError:
            return 0.0
        found = re.search(rf"{which}:\s+(\d+) kB", status)
        return int(found[1]) / 1024 if found else 0.0

    def forget_peak(self) -> None:
        """VmHWM counts from here."""
        Path(f"/proc/{self.router}/clear_refs").write_text("5")


@contextmanager
def cluster(folder: Path) -> Iterator[tuple[Served, Served, Cluster]]:
    """A cluster with two keys, the neighbours' and the attacker's, and a mark in its environment."""
    key, other, mark = (f"{name}{secrets.token_hex(16)}" for name in ("key-", "other-", "HOSTILE_CAMPAIGN="))
    ports = Served(*free_ports("127.0.0.1", 2), key)
    environment = {"TWOSTROKE__ROUTER__API_KEYS": f'["{key}", "{other}"]', "HOSTILE_CAMPAIGN": mark.partition("=")[2]}
    flags = ("--prefill", "0", "--decode", "1", "--grpc-port", str(ports.grpc_port))
    with served(folder / "serve.log", *flags, port=ports.port, environment=environment):
        yield ports, replace(ports, key=other), Cluster(mark)


def joined(windows: Sequence[Outcome]) -> Outcome:
    """One input's windows together."""
    return replace(
        windows[0],
        gaps_ms=tuple(gap for one in windows for gap in one.gaps_ms),
        growth_mib=max(one.growth_mib for one in windows),
        broken=sum(one.broken for one in windows),
        errors=tuple(error for one in windows for error in one.errors),
        died=sum(one.died for one in windows),
    )


def attacked(attack: Attack, near: Neighbours, members: Cluster) -> Outcome:
    """One quiet window, one attack."""
    near.window()
    time.sleep(QUIET_S)
    quiet = near.window()
    members.forget_peak()
    before_mib = members.memory_mib()
    began_s = time.monotonic()
    answers = attack.send()
    seconds = time.monotonic() - began_s
    time.sleep(AFTER_S)
    seen: Seen = near.window()
    growth_mib = members.memory_mib("VmHWM") - before_mib
    return Outcome(
        attack.name,
        answers,
        seconds,
        quiet.gap_ms,
        (seen.gap_ms,),
        growth_mib,
        seen.broken,
        seen.errors,
        members.died(),
    )


def find(fuzz: int, seed: int, name: str) -> Input:
    """An input by its name, in whichever process."""
    return next(one for one in [*KNOWN, *fuzzed(fuzz, seed)] if one.name == name)


def body(outcomes: list[Outcome], grown_mib: float) -> str:
    """The table and what it amounts to."""
    gaps, quiet = [one.gap_ms for one in outcomes], [one.quiet_ms for one in outcomes]
    peak_mib, died = max(one.growth_mib for one in outcomes), sum(one.died for one in outcomes)
    wrong = [one for one in outcomes if one.wrong()]
    windows = [gap for one in outcomes for gap in one.gaps_ms]
    within = sum(gap <= MOST_GAP_MS for gap in windows)
    rows = [
        [
            one.name,
            one.answers,
            f"{one.seconds:.1f}",
            f"{one.quiet_ms:.0f}",
            one.gaps_text(),
            f"{one.growth_mib:.0f}",
            one.broken or "",
            ", ".join(one.wrong()) or "right",
        ]
        for one in outcomes
    ]
    head = ("input", "answers", "s", "quiet gap ms", "gap ms", "router + MiB", "streams broken", "verdict")
    return "\n\n".join(
        [
            f"{NUM_HTTP} HTTP and {NUM_GRPC} gRPC streams beside every input; gaps are between two pieces of one "
            f"stream as its client sees them. Quiet: the same streams just before, with the attacker built and silent.",
            f"- inputs: {len(outcomes)}, right: {len(outcomes) - len(wrong)}\n"
            f"- windows: {len(windows)}, with a gap of at most {MOST_GAP_MS:.0f} ms: {within}; "
            f"of the quiet ones {sum(one <= MOST_GAP_MS for one in quiet)} of {len(quiet)}\n"
            f"- longest gap: median {statistics.median(gaps):.0f} ms, largest {max(gaps):.0f} ms\n"
            f"- longest quiet gap: median {statistics.median(quiet):.0f} ms, largest {max(quiet):.0f} ms\n"
            f"- the router's memory: + {peak_mib:.0f} MiB at most by one input, + {grown_mib:.0f} MiB at the end\n"
            f"- members that died: {died}, streams that broke: {sum(one.broken for one in outcomes)}",
            report.table(head, rows),
        ]
    )


def main() -> int:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fuzz", type=int, default=100, help="how many inputs are drawn")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--times", type=int, default=4, help="of each input at once")
    parser.add_argument("--only", default="", help="inputs whose name has this pattern")
    parser.add_argument("--known", action=argparse.BooleanOptionalAction, default=True, help="those written by hand")
    given = parser.parse_args()
    facts = report.machine()
    inputs = [*(KNOWN if given.known else ()), *fuzzed(given.fuzz, given.seed)]
    inputs = [one for one in inputs if re.search(given.only, one.name)]
    lookup = partial(find, given.fuzz, given.seed)
    outcomes: dict[str, list[Outcome]] = {}  # by input, one per window
    with tempfile.TemporaryDirectory() as temporary, cluster(Path(temporary)) as (where, attacked_at, members):
        near = Neighbours(where, NUM_HTTP, NUM_GRPC)
        try:
            time.sleep(WARM_UP_S)
            near.window()
            base_mib = members.memory_mib()
            for place in range(1 + MORE_WINDOWS):
                again = {name for name, one in outcomes.items() if one[0].gap_ms > MOST_GAP_MS}
                for one in inputs:
                    if place and one.name not in again:
                        continue
                    attack = Attack(lookup, one.name, attacked_at, given.times)
                    last = attacked(attack, near, members)
                    outcomes.setdefault(one.name, []).append(last)
                    print(
                        f"{last.name}: {last.answers}; quiet {last.quiet_ms:.0f} ms, gap {last.gaps_text()} ms, "
                        f"+{last.growth_mib:.0f} MiB, broken {last.broken} {last.errors[:1]}, died {last.died}",
                        flush=True,
                    )
            grown_mib = members.memory_mib() - base_mib
        finally:
            near.close()
    judged = [joined(windows) for windows in outcomes.values()]
    text = body(judged, grown_mib)
    print(text)
    if not given.only:
        title = "Hostile inputs beside 24 running streams"
        print(report.save("hostile", title, text, {"outcomes": [asdict(one) for one in judged]}, facts))
    return 1 if any(one.wrong() for one in judged) else 0


if __name__ == "__main__":
    sys.exit(main())
