"""Steps of one model on one rank and on several: the cost of splitting and its gain, on the cores of this machine.

    python bench/ranks.py --checkpoint FOLDER [--ranks 2] [--steps 15] [--rounds 5]

FOLDER holds the reference model of bench/engine (`checkpoint.py` there writes it). Contestants take turns in every
round: one rank with one thread, one rank with as many threads as there are ranks, and the ranks with one thread each,
every one on its own core, by the processes, plans and sums that a worker uses. Medians over all rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

import report
import torch

from twostroke.checkpoint.config import ModelConfig
from twostroke.core.request import Role, SamplingParams, SequenceKey
from twostroke.engine.loop import StepRunner
from twostroke.engine.plan import SequenceStep, StepPlan
from twostroke.kernels.cpu.build import built_library
from twostroke.kv.block import BlockId
from twostroke.model.loader import RunnerOptions, load_runner
from twostroke.model.resolved import ResolvedModel, resolve
from twostroke.worker.machine import cores, cores_of_rank, pin_thread
from twostroke.worker.rank_order import RankOrder
from twostroke.worker.rank_work import Leader
from twostroke.worker.ranks import Ranks
from twostroke.worker.settings import WorkerSettings

BLOCK_TOKENS, CONTEXT, NUM_BLOCKS = 16, 256, 2048
GREEDY = SamplingParams(1000)
WORKS = {"decode, 1 row": (1, 1), "decode, 16 rows": (16, 1), "decode, 64 rows": (64, 1), "prompt of 256": (1, 256)}


class Steps:
    """Plans of a kind of work, one after the other; every sequence has CONTEXT tokens before it."""

    def __init__(self, num_sequences: int, num_tokens: int) -> None:
        self._number = 0
        self._num_tokens = num_tokens
        count = -(-(CONTEXT + num_tokens) // BLOCK_TOKENS)
        self._tables = [
            tuple(BlockId(sequence * count + block) for block in range(count)) for sequence in range(num_sequences)
        ]

    def next(self) -> StepPlan:
        """The same positions again, with other tokens: a step of constant size."""
        self._number += 1
        return StepPlan(
            self._number,
            tuple(
                SequenceStep(
                    *(SequenceKey(f"r{n}", 0), CONTEXT, (self._number * 7 % 1000,) * self._num_tokens, table),
                    *((1,) * len(table), True, GREEDY, self._number),
                )
                for n, table in enumerate(self._tables)
            ),
        )


def ranks_of(directory: Path, count: int) -> tuple[Leader, Ranks]:
    """A model over `count` ranks, as a worker builds it."""
    config = ModelConfig(path=str(directory), device="cpu")
    settings = WorkerSettings(
        worker_id="bench", role=Role.COMBINED, model_directory=str(directory), model_name="bench", model=config,
        cluster_key="a key of the bench", num_ranks=count,
    )  # fmt: skip
    mine = [cores_of_rank(cores(), 0, rank, 1) for rank in range(count)]
    orders = [
        RankOrder(
            settings=settings, rank=rank, size=count, num_blocks=NUM_BLOCKS, num_swap_blocks=0,
            slot_bytes=4 << 20, cores=mine[rank],
        )
        for rank in range(count)
    ]  # fmt: skip
    ranks = Ranks.start(orders, print)
    runner = load_runner(resolved(directory), RunnerOptions(NUM_BLOCKS), ranks.group)
    ranks.wait_ready(600)
    return Leader(runner, ranks.sender, ranks.group, mine[0]), ranks


def resolved(directory: Path) -> ResolvedModel:
    """The checkpoint as a worker resolves it."""
    return resolve(directory, ModelConfig(path=str(directory)), "auto", "cpu", built_library)


def timed(runner: StepRunner, steps: Steps, count: int) -> list[float]:
    """Milliseconds of each step."""
    found = []
    for _ in range(count):
        plan = steps.next()
        began = time.perf_counter()
        runner.run(plan)
        found.append((time.perf_counter() - began) * 1000)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    facts, every = report.machine(), os.sched_getaffinity(0)
    leader, ranks = ranks_of(given.checkpoint, given.ranks)
    model = resolved(given.checkpoint)
    contestants: dict[str, tuple[StepRunner, set[int]]] = {
        "1 rank, 1 thread": (load_runner(model, RunnerOptions(NUM_BLOCKS)), every),
        f"1 rank, {given.ranks} threads": (
            load_runner(model, RunnerOptions(NUM_BLOCKS, num_threads=given.ranks)),
            every,
        ),
        f"{given.ranks} ranks, 1 thread each": (leader, set(cores_of_rank(cores(), 0, 0, 1)) or every),
    }
    times: dict[str, dict[str, list[float]]] = {work: {name: [] for name in contestants} for work in WORKS}
    for runner, processors in contestants.values():
        pin_thread(tuple(processors))
        runner.warm_up()
    for round_ in range(given.rounds + 1):
        for work, shape in WORKS.items():
            for name, (runner, processors) in contestants.items():
                pin_thread(tuple(processors))
                found = timed(runner, Steps(*shape), given.steps)
                if round_:  # the first round warms the caches
                    times[work][name] += found[2:]
    ranks.close()
    rows, data = [], {}
    for work, by_name in times.items():
        medians = {name: statistics.median(found) for name, found in by_name.items()}
        data[work] = medians
        rows.append([work, *(f"{ms:.2f}" for ms in medians.values())])
    table = report.table(("milliseconds of a step, median", *contestants), rows)
    print(report.save("ranks", "One model over several ranks", table, data, facts))


if __name__ == "__main__":
    main()
