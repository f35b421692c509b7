"""Size and time of a step plan on its way to another rank: whole, as differences, and by pickle.

    python bench/plans.py [--sequences 128] [--tokens 2000] [--steps 300] [--step-ms 2]

Decode steps as a scheduler makes them: every sequence computes one token, and every 16th step adds a block to its
table. The three ways are timed one after the other at each step, encode and decode together; medians of all steps.
The last line is between two processes, by the rank link: from the plan at the first rank to the equal plan at the
other, which has waited for it for `--step-ms`, as a rank does while the first one samples and schedules.
"""

from __future__ import annotations

import argparse
import pickle
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import report

from twostroke.core.request import SamplingParams, SequenceKey
from twostroke.engine.link.plan_stream import PlanReceiver, PlanSender
from twostroke.engine.link.rank_link import LinkEnded, RankReceiver, RankSender
from twostroke.engine.link.wire import decode, encode
from twostroke.engine.plan import History, SequenceStep, StepPlan

BLOCK_TOKENS = 16


def plans(num_sequences: int, num_tokens: int, num_steps: int, params: SamplingParams) -> Iterator[StepPlan]:
    """Consecutive decode steps; tables that did not grow are the same objects, as the cache manager's are."""
    tables: list[tuple[int, ...]] = [()] * num_sequences
    outputs: list[tuple[int, ...]] = [()] * num_sequences
    keys = [SequenceKey(f"cmpl-{number:032d}", 0) for number in range(num_sequences)]
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
                    *(keys[number], start, (token_id,)),
                    *(tables[number], tables[number], True, params, step + 1),
                    history=history,
                )
            )
        yield StepPlan(step, tuple(steps))


def receive_plans(sock: socket.socket) -> None:
    """The other rank: print the time of each plan's arrival, decoded."""
    receiver, arrivals = RankReceiver(sock), []
    try:
        while True:
            plan = receiver.receive(lambda: None)
            arrivals.append(time.monotonic_ns())
            del plan
    except LinkEnded:
        print(*arrivals)


def between_processes(steps: Iterator[StepPlan], step_ms: float) -> list[float]:
    """Microseconds of each plan from this process to another one."""
    here, there = socket.socketpair()
    command = [sys.executable, __file__, "--receive", str(there.fileno())]
    rank = subprocess.Popen(command, pass_fds=(there.fileno(),), stdout=subprocess.PIPE, text=True)
    there.close()
    sender, sent = RankSender([here]), []
    time.sleep(2.0)
    for plan in steps:
        until_s = time.perf_counter() + step_ms / 1000
        while time.perf_counter() < until_s:  # the first rank computes meanwhile
            pass
        sent.append(time.monotonic_ns())
        sender.send_plan(plan)
    sender.close()
    arrived = map(int, rank.communicate()[0].split())
    return [(then - now) / 1000 for now, then in zip(sent, arrived, strict=True)]


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--receive"]:
        receive_plans(socket.socket(fileno=int(sys.argv[2])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--step-ms", type=float, default=2.0)
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
        steps = plans(given.sequences, given.tokens, given.steps, params)
        link_us = between_processes(steps, given.step_ms)[1:]
        data[f"{name}: rank link"] = {"us": statistics.median(link_us), "p90_us": report.percentile(link_us, 90)}
        late = f"90th percentile {data[f'{name}: rank link']['p90_us']:.0f} us"
        link = f"Rank link, plan to plan: {report.spread(link_us)} us, {late}"
        words = f"{given.sequences} sequences of {given.tokens} tokens and more, {name}, {given.steps} steps"
        headings = ("way", "bytes, median", "bytes, most", "encode, us, median", "decode, us, median")
        bodies.append(f"{words}\n\n{report.table(headings, rows)}\n\n{link}.")
    title = "A step plan on its way to another rank"
    print(report.save("plans", title, "\n\n".join(bodies), data, facts))


if __name__ == "__main__":
    main()
