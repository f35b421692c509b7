"""Open-loop load on a served model: TTFT, ITL and throughput, disaggregated beside one piece on the same cores.

Requests arrive by a Poisson process at a fixed rate, whatever the server does: an open loop shows queueing that a
closed one hides. Both topologies get the same cores, requests and arrival times, in interleaved rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from dataclasses import dataclass, field

from report import percentile, save, table

from twostroke import AsyncClient, TwostrokeError
from twostroke.cluster.config import load_config
from twostroke.cluster.model_facts import model_facts
from twostroke.cluster.placement import place
from twostroke.cluster.supervisor import Supervisor
from twostroke.worker.machine import machine_facts

TOPOLOGIES = {
    "disaggregated 1+1": {"cluster.prefill": 1, "cluster.decode": 1},
    "one piece (--prefill 0 --decode 2)": {"cluster.prefill": 0, "cluster.decode": 2},
}


@dataclass
class Load:
    """What to ask, and when."""

    rate_per_s: float
    num_requests: int
    prompt_tokens: int
    output_tokens: int
    seed: int


@dataclass
class Outcome:
    """One request as its client saw it, in seconds."""

    ttft_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str = ""


@dataclass
class Round:
    """All requests of one round."""

    outcomes: list[Outcome]
    wall_s: float

    def figures(self) -> dict[str, float]:
        """Milliseconds and tokens per second."""
        good = [o for o in self.outcomes if not o.error]
        ttft = [o.ttft_s * 1e3 for o in good]
        itl = [gap * 1e3 for o in good for gap in o.gaps_s]
        return {
            "ttft_p50_ms": percentile(ttft, 50),
            "ttft_p99_ms": percentile(ttft, 99),
            "itl_p50_ms": percentile(itl, 50),
            "itl_p99_ms": percentile(itl, 99),
            "tokens_per_s": sum(o.tokens for o in good) / self.wall_s,
            "failed": float(len(self.outcomes) - len(good)),
        }


async def one(client: AsyncClient, prompt: list[int], output_tokens: int) -> Outcome:
    """Stream one request and time its tokens."""
    outcome = Outcome()
    began = last = time.perf_counter()
    try:
        stream = client.generate_stream(prompt, max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
        async with stream:
            async for chunk in stream:
                now = time.perf_counter()
                if not chunk.token_ids:
                    continue
                if outcome.tokens == 0:
                    outcome.ttft_s = now - began
                else:
                    outcome.gaps_s.append(now - last)
                outcome.tokens += len(chunk.token_ids)
                last = now
    except TwostrokeError as error:
        outcome.error = error.code
    return outcome


async def run_round(client: AsyncClient, load: Load, round_number: int) -> Round:
    """Fire the requests at their times and wait for all of them."""
    chance = random.Random(load.seed + round_number)
    prompts = [[chance.randrange(300, 4000) for _ in range(load.prompt_tokens)] for _ in range(load.num_requests)]
    began = time.perf_counter()
    due_s, tasks = 0.0, []
    for prompt in prompts:
        due_s += chance.expovariate(load.rate_per_s)
        await asyncio.sleep(max(0.0, due_s - (time.perf_counter() - began)))
        tasks.append(asyncio.create_task(one(client, prompt, load.output_tokens)))
    outcomes = await asyncio.gather(*tasks)
    return Round(list(outcomes), time.perf_counter() - began)


async def run(load: Load, rounds: int, launcher: str) -> dict[str, list[dict[str, float]]]:
    """Interleaved rounds: each topology is started anew for each round, so that no cache carries over."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in TOPOLOGIES}
    for number in range(rounds):
        for name, flags in TOPOLOGIES.items():
            config = load_config(flags={**flags, "cluster.launcher": launcher, "router.port": 0, "router.grpc_port": 0})
            supervisor = Supervisor(config, place(config, machine_facts(), model_facts(config)), say=print)
            await supervisor.start()
            try:
                async with AsyncClient(supervisor.grpc_address, timeout_s=300.0) as client:
                    await run_round(client, Load(4.0, 4, load.prompt_tokens, 8, 10_000 + number), 0)  # warm
                    figures = (await run_round(client, load, number)).figures()
            finally:
                await supervisor.stop()
            results[name].append(figures)
            print(f"round {number + 1}, {name}: " + ", ".join(f"{k} {v:.1f}" for k, v in figures.items()), flush=True)
    return results


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=4.0, help="requests per second")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--launcher", choices=("process", "ray"), default="process")
    given = parser.parse_args()
    load = Load(given.rate, given.requests, given.prompt_tokens, given.output_tokens, 1)
    results = asyncio.run(run(load, given.rounds, given.launcher))
    names = list(next(iter(results.values()))[0])
    rows = [
        [topology, *(f"{statistics.median(figures[name] for figures in rounds):.1f}" for name in names)]
        for topology, rounds in results.items()
    ]
    body = (
        f"Bundled model, {load.num_requests} requests per round at {load.rate_per_s:g}/s (Poisson), random prompts of "
        f"{load.prompt_tokens} tokens, {load.output_tokens} new tokens each; medians of {given.rounds} interleaved "
        f"rounds, two engine processes on the same cores in both topologies.\n\n" + table(["topology", *names], rows)
    )
    print(body, save("serve", "Open-loop load, disaggregated beside one piece", body, {"rounds": results}), sep="\n")


if __name__ == "__main__":
    main()
