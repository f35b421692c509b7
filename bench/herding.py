"""Do several routers herd? Imbalance of the workers under 1, 2, 4 and 8 routers. Pure simulation: no clock, no process.

    python bench/herding.py [--routers 1,2,4,8] [--workers 16] [--loads 0.5,0.8] [--requests 20000] [--seeds 5]

The production fleet and policy of each router choose among simulated workers. A worker computes prompts one after
the other and decodes all its sequences at once, each for its number of steps. Every worker reports its load to all
routers 10 times a second, and after each prompt while others wait, as real ones do after each step. A router counts
what it dispatched itself at once, and knows of the others' work by those reports alone. Requests come at random
(Poisson) and each goes to a random router, as the kernel deals connections out.

imbalance: the most sequences on a worker over the mean of all workers, over time, weighted by time. Exit status 1: that
of 4 routers exceeds 1.1 times that of one.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from twostroke.core.request import Role, SequenceKey
from twostroke.router.routing.candidates import PolicyLimits, RequestFacts
from twostroke.router.routing.facts import LoadFacts, ModelFacts, WorkerFacts
from twostroke.router.routing.fleet import Fleet, FleetLimits
from twostroke.router.routing.policy import choose
from twostroke.router.routing.views import count_work, views_of

REPORT_S = 0.1
PREFILL_MS_PER_TOKEN = 0.25
STEP_MS = 20.0
MAX_SEQS = 256
BOUND = 1.1
MODEL = ModelFacts("m", b"w" * 16, b"n" * 16, "", 8192, 1000, True, "/", 1024)
WARM_UP = 0.1  # share of the time that is not measured


class Setting(NamedTuple):
    """One simulated cluster and its load."""

    num_routers: int
    num_workers: int
    load: float  # of the workers' capacity to prefill
    mean_prompt: float  # tokens
    num_requests: int
    seed: int


class Outcome(NamedTuple):
    """How evenly the work was spread, and what it did to the time to first token."""

    imbalance: float
    ttft_mean_ms: float
    ttft_p99_ms: float


@dataclass(slots=True)
class SimulatedWorker:
    """A combined worker: a queue of prompts, and the sequences that decode."""

    facts: WorkerFacts
    queue: deque[int] = field(default_factory=deque)  # prompt tokens that are not computed yet, in order
    busy_until_s: float = 0.0
    num_decoding: int = 0
    context_tokens: int = 0

    @property
    def num_sequences(self) -> int:
        """Sequences that wait or run."""
        return len(self.queue) + self.num_decoding

    def report(self) -> LoadFacts:
        """What it tells every router."""
        used = -(-self.context_tokens // self.facts.block_tokens)
        return LoadFacts(
            waiting=len(self.queue),
            running=self.num_decoding,
            queued_prefill_tokens=sum(self.queue),
            free_blocks=self.facts.num_kv_blocks - used,
            total_blocks=self.facts.num_kv_blocks,
            phase="decode" if self.num_sequences else "idle",
            prefill_ms_per_token=PREFILL_MS_PER_TOKEN,
            prefill_ms_per_token_pair=1e-9,
            decode_step_ms=STEP_MS,
            handover_bytes_per_s=1e9,
        )


class Simulation:
    """Events in the order of their times."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._rng = random.Random(setting.seed)
        self._workers = [
            SimulatedWorker(
                WorkerFacts(f"w{n}", 1, Role.COMBINED, f"10.0.0.{n + 1}:1", MODEL, 40_000, 16, MAX_SEQS, 8192)
            )
            for n in range(setting.num_workers)
        ]
        self._fleets = [Fleet(FleetLimits(silent_after_s=1e9)) for _ in range(setting.num_routers)]
        self._by_id = {worker.facts.worker_id: worker for worker in self._workers}
        for fleet in self._fleets:
            for worker in self._workers:
                fleet.announced(worker.facts, 0.0)
                fleet.session_up(worker.facts.key, None, 0.0)
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._num_events = 0
        self._area = self._ratio_area = self._noted_s = 0.0
        self._ttfts_s: list[float] = []

    def run(self) -> Outcome:
        """Play all requests; returns what was measured after the warm-up."""
        arrivals = list(self._arrivals())
        end_s = arrivals[-1][0]
        for number, (at_s, prompt, output) in enumerate(arrivals):
            self._at(at_s, lambda now_s, n=number, p=prompt, o=output: self._arrive(n, p, o, now_s))
        for worker in self._workers:
            self._at(self._rng.uniform(0, REPORT_S), lambda now_s, w=worker: self._report(w, now_s, end_s))
        while self._events:
            now_s, _, act = heapq.heappop(self._events)
            if now_s > end_s:
                break
            if now_s > WARM_UP * end_s:
                self._measure(now_s)
            self._noted_s = now_s
            act(now_s)
        ttfts = sorted(self._ttfts_s)
        return Outcome(
            self._ratio_area / self._area, 1e3 * sum(ttfts) / len(ttfts), 1e3 * ttfts[int(0.99 * len(ttfts))]
        )

    def _arrivals(self) -> Iterator[tuple[float, int, int]]:
        """Time, prompt tokens and output tokens of each request; both lengths have long tails."""
        rng, now_s = self._rng, 0.0
        mean_prompt = self._setting.mean_prompt
        rate = self._setting.load * self._setting.num_workers / (mean_prompt * PREFILL_MS_PER_TOKEN / 1e3)
        for _ in range(self._setting.num_requests):
            now_s += rng.expovariate(rate)
            yield now_s, 1 + int(rng.expovariate(1 / mean_prompt)), 1 + int(rng.expovariate(6.7 / mean_prompt))

    def _arrive(self, number: int, prompt: int, output: int, now_s: float) -> None:
        fleet = self._rng.choice(self._fleets)
        request = RequestFacts(f"r{number}", prompt, 1024)
        choice = choose(request, views_of(fleet.serving("m")), {}, PolicyLimits())
        assert choice is not None
        count_work(fleet, request, 0, choice, now_s, is_leading=True)
        worker = self._by_id[choice.winner.decode.worker_id]
        worker.queue.append(prompt)
        worker.context_tokens += prompt + output
        worker.busy_until_s = max(worker.busy_until_s, now_s) + prompt * PREFILL_MS_PER_TOKEN / 1e3
        first_s = worker.busy_until_s
        self._ttfts_s.append(first_s - now_s)
        key = SequenceKey(request.request_id, 0)

        def prefilled(now_s: float) -> None:
            worker.queue.popleft()
            worker.num_decoding += 1
            fleet.first_token(key)
            if worker.queue:
                self._tell(worker, now_s)

        def ended(_: float) -> None:
            worker.num_decoding -= 1
            worker.context_tokens -= prompt + output
            fleet.ended(key)

        self._at(first_s, prefilled)
        self._at(first_s + output * STEP_MS / 1e3, ended)

    def _tell(self, worker: SimulatedWorker, now_s: float) -> None:
        load = worker.report()
        for fleet in self._fleets:
            fleet.loaded(worker.facts.key, load, Role.COMBINED, now_s)
            fleet.beat(worker.facts.key, now_s)

    def _report(self, worker: SimulatedWorker, now_s: float, end_s: float) -> None:
        self._tell(worker, now_s)
        if now_s < end_s:
            self._at(now_s + REPORT_S, lambda now_s: self._report(worker, now_s, end_s))

    def _measure(self, now_s: float) -> None:
        counts = [worker.num_sequences for worker in self._workers]
        if total := sum(counts):
            self._ratio_area += (now_s - self._noted_s) * max(counts) * len(counts) / total
            self._area += now_s - self._noted_s

    def _at(self, at_s: float, act: Callable[[float], None]) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (at_s, self._num_events, act))


def mean_outcome(setting: Setting, num_seeds: int) -> Outcome:
    """Means over several seeds."""
    outcomes = [Simulation(setting._replace(seed=seed)).run() for seed in range(num_seeds)]
    return Outcome(*(sum(values) / num_seeds for values in zip(*outcomes, strict=True)))


def main() -> int:
    """Print one line per load and number of routers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--routers", default="1,2,4,8")
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--loads", default="0.5,0.8")
    parser.add_argument(
        "--prompts", default="100,1000", help="mean tokens of the prompts; the shorter, the more per report"
    )
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    worst = 0.0
    print("| prompts | load | routers | imbalance | of one router's | TTFT mean ms | TTFT p99 ms |")
    print("|---|---|---|---|---|---|---|")
    for prompt, load in itertools.product(map(float, args.prompts.split(",")), map(float, args.loads.split(","))):
        alone = 0.0
        for number in map(int, args.routers.split(",")):
            found = mean_outcome(Setting(number, args.workers, load, prompt, args.requests, 0), args.seeds)
            alone = alone or found.imbalance
            ratio = found.imbalance / alone
            worst = max(worst, ratio if number == 4 else 0.0)
            times = f"{found.ttft_mean_ms:,.0f} | {found.ttft_p99_ms:,.0f}"
            print(f"| {prompt:g} | {load:g} | {number} | {found.imbalance:.3f} | {ratio:.3f} | {times} |", flush=True)
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())
