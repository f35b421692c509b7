"""Size and time of a step plan on its way to another rank: whole, as differences, and by pickle.

    python bench/plans.py [--sequences 128] [--tokens 2000] [--steps 300]

Decode steps as a scheduler makes them: every sequence computes one token, and every 16th step adds a block to its
table. The three ways are timed one after the other at each step, encode and decode together; medians of all steps.
"""

from __future__ import annotations

import argparse
import pickle
import statistics
import time
from collections.abc import Callable, Iterator

import report

from twostroke.core.request import SamplingParams, SequenceKey
from twostroke.engine.link.plan_stream import PlanReceiver, PlanSender
from twostroke.engine.link.wire import decode, encode
from twostroke.engine.plan import History, SequenceStep, StepPlan

BLOCK_TOKENS = 16


def plans(num_sequences: int, num_tokens: int, num_steps: int, params: SamplingParams) -> Iterator[StepPlan]:
    """Consecutive decode steps; tables that did not grow are the same objects, as the cache manager's are."""
    tables: list[tuple[int, ...]] = [()] * num_sequences
    outputs: list[tuple[int, ...]] = [()] * num_sequences
    prompt = tuple(range(num_tokens))  # one object for a sequence's life, as the engine has it
    for step in range(num_steps):
        steps = []
        for number in range(num_sequences):
            start = num_tokens + number % BLOCK_TOKENS + step
            count = start // BLOCK_TOKENS + 1
            if count != len(tables[number]):
                tables[number] = tuple(10_000 + number * 300 + n for n in range(count))
            token_id = (start * 7 + number) % 128_000
            history = None
            if params.needs_history:
                outputs[number] += (token_id,)
                history = History(prompt, outputs[number])
            steps.append(
                SequenceStep(
                    *(SequenceKey(f"cmpl-{number:032d}", 0), start, (token_id,)),
                    *(tables[number], tables[number], True, params, step + 1),
                    history=history,
                )
            )
        yield StepPlan(step, tuple(steps))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args()
    facts, bodies, data = report.machine(), [], {}
    for name, params in (
        ("plain sampling", SamplingParams(256, 0.7)),
        ("with a repetition penalty", SamplingParams(256, 0.7, repetition_penalty=1.1)),
    ):
        sender, receiver = PlanSender(), PlanReceiver()
        ways: dict[str, tuple[Callable[[StepPlan], bytes], Callable[[bytes], StepPlan]]] = {
            "differences": (sender.encode, receiver.decode),
            "whole": (encode, decode),
            "pickle, whole": (pickle.dumps, pickle.loads),
        }
        sizes: dict[str, list[int]] = {way: [] for way in ways}
        encode_us: dict[str, list[float]] = {way: [] for way in ways}
        decode_us: dict[str, list[float]] = {way: [] for way in ways}
        for plan in plans(given.sequences, given.tokens, given.steps, params):
            for way, (put, get) in ways.items():
                began = time.perf_counter()
                sent = put(plan)
                there = time.perf_counter()
                arrived = get(sent)
                ended = time.perf_counter()
                assert arrived == plan
                sizes[way].append(len(sent))
                encode_us[way].append((there - began) * 1e6)
                decode_us[way].append((ended - there) * 1e6)
        rows = []
        for way in ways:
            later = slice(1, None)  # the first plan is whole in every way
            size, puts, gets = (statistics.median(found[way][later]) for found in (sizes, encode_us, decode_us))
            data[f"{name}: {way}"] = {"bytes": size, "encode_us": puts, "decode_us": gets}
            rows.append([way, f"{size:,.0f}", f"{max(sizes[way][later]):,}", f"{puts:,.0f}", f"{gets:,.0f}"])
        words = f"{given.sequences} sequences of {given.tokens} tokens and more, {name}, {given.steps} steps"
        headings = ("way", "bytes, median", "bytes, most", "encode, us, median", "decode, us, median")
        bodies.append(f"{words}\n\n{report.table(headings, rows)}")
    title = "A step plan on its way to another rank"
    print(report.save("plans", title, "\n\n".join(bodies), data, facts))


if __name__ == "__main__":
    main()
