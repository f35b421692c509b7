"""How soon a dead or frozen worker is noticed under load, and whether a starved machine makes healthy ones look frozen.

    python bench/detection.py [--how kill|freeze|none] [--role decode|prefill] [--rounds 20] [--burn 0] [--seconds 60]

One prefill and two decode workers of the bundled model, as processes, with streams on them all the time. Each round
kills (SIGKILL) or freezes (SIGSTOP) a worker at a random moment and takes the times, from the signal on, until

    avoided    the router's report no longer shows it as live: it gets no new work
    resumed    the last stream that ran then has its next piece: the longest pause of any stream around the moment
    replaced   the supervisor has ended or missed its process, and its next one is due
    serving    a new process serves under its name

`--beat-alone`: the supervisor does not look at the processes themselves, as where they are on another machine, and
replaces silent ones after 5 s: what is left is the beat. `--how none` harms nobody for `--seconds` and counts how often
a worker was not live or was replaced. `--burn N`: beside N processes that compute without a pause at ordinary priority.
Times have the resolution of the looks, 20 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from twostroke.client.async_client import AsyncClient
from twostroke.cluster.config import load_config
from twostroke.cluster.launch.process import ProcessLauncher
from twostroke.cluster.model_facts import model_facts
from twostroke.cluster.placement import place
from twostroke.cluster.supervisor import Supervisor
from twostroke.core.errors import TwostrokeError
from twostroke.worker.machine import machine_facts

LOOK_S = 0.02
PATIENCE_S = 180.0
SETTLE_S = 3.0  # between a whole cluster and the next round: streams are on all workers again
PROMPT = "class Connection:\n    def __init__(self, host, port):\n        "
NAMES = ("prefill-0", "decode-0", "decode-1")


class Load:
    """Streams without an end, and when each had its last pieces."""

    def __init__(self, client: AsyncClient, num_streams: int) -> None:
        self._client = client
        self._tasks = [asyncio.create_task(self._ask(number)) for number in range(num_streams)]
        self.gaps: list[tuple[float, float]] = []  # begin and end of each pause above LOOK_S
        self.num_failed = self.num_ended = 0

    async def _ask(self, number: int) -> None:
        turn = 0
        while True:
            turn += 1
            last_s = time.monotonic()
            try:
                stream = self._client.generate_stream(
                    f"{PROMPT}{number} {turn}", max_tokens=300, temperature=0, ignore_eos=True
                )
                async for _ in stream:
                    now_s = time.monotonic()
                    if now_s - last_s > LOOK_S:
                        self.gaps.append((last_s, now_s))
                    last_s = now_s
                self.num_ended += 1
            except TwostrokeError as error:
                self.num_failed += 1
                print(f"a stream failed: {error}", file=sys.stderr, flush=True)
                await asyncio.sleep(0.1)

    def pause_at(self, at_s: float) -> float:
        """Seconds from `at_s` to the end of the longest pause that holds it; 0: no stream paused."""
        return max(
            (end_s - at_s for begin_s, end_s in self.gaps if begin_s <= at_s + LOOK_S and end_s > at_s), default=0.0
        )

    async def end(self) -> None:
        """Stop asking."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class Told:
    """What the supervisor says, with the time."""

    def __init__(self) -> None:
        self.lines: list[tuple[float, str]] = []

    def __call__(self, line: str) -> None:
        """Take a line."""
        self.lines.append((time.monotonic(), line))

    def first(self, since_s: float, *words: str) -> float | None:
        """Time of the first line since then that has all these words."""
        return next((at_s for at_s, line in self.lines if at_s >= since_s and all(w in line for w in words)), None)


async def reports(client: AsyncClient) -> dict[str, dict[str, Any]]:
    """The router's report on each worker."""
    return {worker["worker_id"]: worker for worker in (await client.cluster())["workers"]}


async def whole(client: AsyncClient) -> dict[str, dict[str, Any]]:
    """The reports once all workers are live.

    Raises:
        TimeoutError: they are not within PATIENCE_S.
    """
    async with asyncio.timeout(PATIENCE_S):
        while True:
            found = await reports(client)
            if all(found.get(name, {}).get("state") == "live" for name in NAMES):
                return found
            await asyncio.sleep(LOOK_S)


async def round_of(
    client: AsyncClient, load: Load, told: Told, victim: str, number: signal.Signals
) -> dict[str, float]:
    """Harm a worker; the four times in milliseconds."""
    pid = (await whole(client))[victim]["pid"]
    os.kill(pid, number)
    at_s = time.monotonic()
    times: dict[str, float] = {}
    async with asyncio.timeout(PATIENCE_S):
        while "serving" not in times:
            seen = (await reports(client)).get(victim)
            now_s = time.monotonic()
            if "avoided" not in times and (seen is None or seen["state"] != "live"):
                times["avoided"] = now_s - at_s
            if seen is not None and seen["pid"] != pid and seen["state"] == "live":
                times["serving"] = now_s - at_s
            await asyncio.sleep(LOOK_S)
    times["replaced"] = (told.first(at_s, victim, "ended (") or now_s) - at_s
    times["resumed"] = load.pause_at(at_s)
    return {name: value * 1000 for name, value in times.items()}


async def quiet(client: AsyncClient, told: Told, seconds: float) -> dict[str, float]:
    """Harm nobody; how often a worker was not live, and was replaced."""
    await whole(client)
    begin_s, away, num_alarms, longest_s = time.monotonic(), dict.fromkeys(NAMES, 0.0), 0, 0.0
    last_s = begin_s
    while time.monotonic() - begin_s < seconds:
        found = await reports(client)
        now_s = time.monotonic()
        longest_s, last_s = max(longest_s, now_s - last_s), now_s
        for name in NAMES:
            is_away = found.get(name, {}).get("state") != "live"
            num_alarms += is_away and not away[name]
            away[name] = now_s if is_away else 0.0
        await asyncio.sleep(LOOK_S)
    replaced = sum(1 for at_s, line in told.lines if at_s >= begin_s and " ended (" in line)
    return {"seconds": seconds, "alarms": num_alarms, "replaced": replaced, "longest time between two looks": longest_s}


def burn() -> None:
    """Compute without a pause, until our parent is gone."""
    parent = os.getppid()
    while os.getppid() == parent:
        sum(range(100_000))


@contextmanager
def burning(num: int) -> Iterator[None]:
    """Processes that take the cores."""
    processes = [multiprocessing.get_context("spawn").Process(target=burn, daemon=True) for _ in range(num)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()


async def measure(args: argparse.Namespace) -> None:
    """Run all rounds and print the figures."""
    flags = {"cluster.launcher": "process", "cluster.prefill": 1, "cluster.decode": 2, "step.num_threads": 1}
    flags |= {"router.port": 0, "router.grpc_port": 0, "cache.tokens": 16384, "model.max_model_len": 1024}
    config, told, rng = load_config(flags=flags), Told(), random.Random(args.seed)
    if args.beat_alone:
        cluster = config.cluster.model_copy(update={"replace_after_s": 5.0})
        config = config.model_copy(update={"cluster": cluster})
        ProcessLauncher.is_stopped = lambda *_: False  # type: ignore[method-assign]
    supervisor = Supervisor(config, place(config, machine_facts(), model_facts(config)), say=told)
    try:
        await supervisor.start()
        async with AsyncClient(supervisor.grpc_address, timeout_s=PATIENCE_S) as client:
            load = Load(client, args.streams)
            await asyncio.sleep(SETTLE_S)
            with burning(args.burn):
                if args.how == "none":
                    print(await quiet(client, told, args.seconds), flush=True)
                else:
                    await harm(client, load, told, rng, args)
            print(f"streams: {load.num_ended} ended, {load.num_failed} failed")
            await load.end()
    finally:
        await supervisor.stop()


async def harm(client: AsyncClient, load: Load, told: Told, rng: random.Random, args: argparse.Namespace) -> None:
    """All rounds; prints each and their spread."""
    number = signal.SIGKILL if args.how == "kill" else signal.SIGSTOP
    found: dict[str, list[float]] = {}
    for at in range(args.rounds):
        victim = "prefill-0" if args.role == "prefill" else f"decode-{at % 2}"
        await whole(client)
        await asyncio.sleep(SETTLE_S + rng.random())
        times = await round_of(client, load, told, victim, number)
        print(f"{at + 1}: {victim}", {name: round(value) for name, value in times.items()}, flush=True)
        for name, value in times.items():
            found.setdefault(name, []).append(value)
    for name in ("avoided", "resumed", "replaced", "serving"):
        values = sorted(found[name])
        middle, last = values[len(values) // 2], values[-1]
        print(f"{args.how} {args.role} {name}: least {values[0]:.0f}, median {middle:.0f}, most {last:.0f} ms")


def main() -> int:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--how", choices=["kill", "freeze", "none"], default="kill")
    parser.add_argument("--role", choices=["decode", "prefill"], default="decode")
    parser.add_argument("--beat-alone", action="store_true")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--burn", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    asyncio.run(measure(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
