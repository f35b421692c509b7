"""Our engine beside its peers on the reference work: one interleaved run, everybody asked the same in every round.

    python bench/engine/campaign.py [--rounds 5] [--only NAME ...] [--measures NAME ...] [--isa x86-64-v3] [--quick]

For every round, for every measure, one contestant after the other computes while all others are stopped; who begins
changes from round to round. Peers are installed first where they are missing (environments.py); one that cannot be had
is reported with the reason. `--isa x86-64-v3` keeps everybody to AVX2 on a machine that has more. `--quick` is a smoke
check: one round, transformers and us, nothing is written.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import environments
from figures import MEASURES, Measure, decode_window, outside_share, prefill_tokens_per_s
from protocol import NEW_TOKENS, PROMPT_TOKENS
from seats import AVX2, LIMITS, PREPARE_TIMEOUT_S, ContestantFailed, Entry, Seat, Work, chosen, python_of
from tables import body, to_json

import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import report

QUICK = ("twostroke", "transformers")
WARM_UP_SEED = 1
SHARE_MEASURE = "decode 16"


@dataclass
class Results:
    """All that a campaign learns; lists are per round, None where a contestant had failed."""

    rounds: int
    threads: int
    isa: str | None = None  # instruction set that everybody is kept to; None: all that this machine has
    measures: tuple[Measure, ...] = MEASURES
    figures: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)  # by measure, by contestant
    outside: dict[str, list[float]] = field(default_factory=dict)  # ours: share of a step that is not the decoder
    limits: dict[str, list[float]] = field(default_factory=dict)
    foreign_cpu: list[float] = field(default_factory=list)  # cores that others kept busy, per answer
    first_ids: dict[str, list[int | None]] = field(default_factory=dict)  # of the same prompts
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)  # contestant: why
    versions: dict[str, dict[str, str]] = field(default_factory=dict)


class Campaign:
    """The seats, and the order in which they are asked."""

    def __init__(self, entries: list[Entry], results: Results, folder: Path) -> None:
        self.entries = entries
        self.results = results
        self.folder = folder
        self.seats: dict[str, Seat] = {}

    def run(self) -> None:
        """Install, prepare, measure, close."""
        try:
            self._prepare_all()
            for number in range(self.results.rounds):
                for measure in self.results.measures:
                    self._ask_all(number, measure)
                self._measure_limits()
            self._close_peers()
        finally:
            for seat in self.seats.values():
                seat.close()

    # ------------------------------------------------------------------ before

    def _prepare_all(self) -> None:
        for entry in [*self.entries, LIMITS]:
            reason = self._install(entry)
            if reason is not None:
                self._drop(entry.name, reason)
                continue
            log = self.folder / "logs" / (entry.name.replace(" ", "_").replace(",", "") + ".log")
            python = python_of(entry, sys.executable)
            work = Work(self.folder / "checkpoint", self.results.threads, self.results.isa)
            seat = self.seats[entry.name] = Seat(entry, python, work, log)
            try:
                answer = seat.ask({"do": "prepare"}, PREPARE_TIMEOUT_S)
                self.results.facts[entry.name] = answer["facts"] | {"prepare_s": answer["prepare_s"]}
                if entry is not LIMITS:
                    self._warm_up(entry, seat)
            except ContestantFailed as error:
                self._drop(entry.name, f"did not start: {error}")
            else:
                print(f"{entry.name}: ready after {answer['prepare_s']:.1f} s", flush=True)

    def _install(self, entry: Entry) -> str | None:
        if entry.environment is None:
            return None
        environment = environments.BY_NAME[entry.environment]
        reason = environments.ensure(environment)
        if reason is None and environment.name not in self.results.versions:
            self.results.versions[environment.name] = environments.versions(environment)
        return reason

    def _warm_up(self, entry: Entry, seat: Seat) -> None:
        """Every shape that will be measured, once; the first tokens show whether all compute the same model."""
        for measure in self.results.measures:
            answer = seat.ask({"do": measure.kind, "batch": measure.batch, "seed": WARM_UP_SEED, "repeats": 1}, 900.0)
        self.results.first_ids[entry.name] = answer["traces"][0]["first_ids"]

    def _drop(self, name: str, reason: str) -> None:
        print(f"{name}: absent: {reason}", flush=True)
        self.results.absent[name] = reason
        seat = self.seats.pop(name, None)
        if seat is not None:
            seat.close()

    # ------------------------------------------------------------------ measuring

    def _ask_all(self, number: int, measure: Measure) -> None:
        """One measure of one round: everybody, with the same prompts."""
        by_name = self.results.figures.setdefault(measure.name, {entry.name: [] for entry in self.entries})
        turn = number % len(self.entries)
        seed = 100 + number * len(MEASURES) + MEASURES.index(measure)
        for entry in self.entries[turn:] + self.entries[:turn]:
            value = None
            if entry.name in self.seats:
                try:
                    value = self._ask(entry, measure, seed)
                except (ContestantFailed, ValueError) as error:
                    self._drop(entry.name, f"failed in round {number + 1}, {measure.name}: {error}")
            by_name[entry.name].append(value)
            if value is not None:
                print(f"round {number + 1}, {measure.name}, {entry.name}: {value:.1f} tokens/s", flush=True)

    def _ask(self, entry: Entry, measure: Measure, seed: int) -> float:
        command = {"do": measure.kind, "batch": measure.batch, "seed": seed, "repeats": measure.repeats}
        answer = self.seats[entry.name].ask(command)
        self.results.foreign_cpu.append(answer["foreign_cpu"])
        values = []
        for trace in answer["traces"]:
            if measure.kind == "prefill":
                values.append(prefill_tokens_per_s(trace["events"], measure.batch, PROMPT_TOKENS))
                continue
            window = decode_window(trace["events"], measure.batch, NEW_TOKENS)
            values.append(window.tokens_per_s)
            if entry.is_ours and measure.name == SHARE_MEASURE:
                share = outside_share(window, answer["extra"]["decoder_spans"])
                self.results.outside.setdefault(entry.name, []).append(share)
        return sorted(values)[len(values) // 2]

    def _measure_limits(self) -> None:
        if LIMITS.name not in self.seats:
            return
        try:
            answer = self.seats[LIMITS.name].ask({"do": "prefill", "batch": 1, "seed": 0, "repeats": 1})
        except ContestantFailed as error:
            self._drop(LIMITS.name, str(error))
            return
        for name, value in answer["extra"].items():
            self.results.limits.setdefault(name, []).append(value)

    # ------------------------------------------------------------------ after

    def _close_peers(self) -> None:
        """Ours are measured when the others are gone, one after the other: nobody else holds a page of a library."""
        ours = [entry.name for entry in self.entries if entry.is_ours]
        for name in [name for name in self.seats if name not in ours]:
            self.seats.pop(name).close()
        for name in [name for name in ours if name in self.seats]:
            answer = self.seats[name].ask({"do": "memory"})
            self.results.memory[name] = {key: answer[key] for key in ("uss_bytes", "pss_bytes", "rss_bytes")}
            self.seats.pop(name).close()


def ensure_checkpoint(folder: Path) -> None:
    """The reference weights, and as GGUF; without the `gguf` package those who need it will say so."""
    checkpoint.ensure(folder)
    environment = environments.BY_NAME["gguf"]
    if environments.ensure(environment) is None:
        script = Path(__file__).resolve().parent / "to_gguf.py"
        subprocess.run([str(environment.python), str(script), str(folder)], check=True)


def main() -> None:
    """Run and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="contestants whose names begin so")
    parser.add_argument("--measures", nargs="+", default=[], choices=[m.name for m in MEASURES], metavar="NAME")
    parser.add_argument("--isa", choices=[AVX2], help="instruction set that everybody is kept to")
    parser.add_argument("--quick", action="store_true", help="one round, transformers and us; writes nothing")
    given = parser.parse_args()
    entries = chosen(QUICK if given.quick else given.only, given.isa)
    folder = environments.ENVIRONMENTS
    folder.mkdir(exist_ok=True)
    ensure_checkpoint(folder / "checkpoint")
    facts = report.machine()  # before: the load that is reported is not our own
    measures = tuple(m for m in MEASURES if not given.measures or m.name in given.measures)
    results = Results(1 if given.quick else given.rounds, given.threads, given.isa, measures)
    Campaign(entries, results, folder).run()
    text = body(entries, results)
    print(text)
    if given.quick or given.only or given.measures:
        print("not the whole campaign: nothing is written")
        return
    name, which = ("avx2", ", kept to AVX2") if given.isa else ("reference", "")
    title = f"The engine beside its peers, on the reference work{which}"
    print(report.save(f"engine/{name}", title, text, to_json(entries, results), facts))


if __name__ == "__main__":
    main()
