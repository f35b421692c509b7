"""An open-loop load generator for the HTTP API: requests leave at their times, whatever the server does.

    python bench/load_generators/open_loop.py http://127.0.0.1:8000 --rate 20 --seconds 30 [--deadline 4]
    python bench/load_generators/open_loop.py http://127.0.0.1:8000 --trace conversation.jsonl --speed 2

Arrivals are a Poisson process, or those of a trace. Every latency counts from the moment at which a request was due,
and not from when it was sent: a generator that falls behind, or a server that stops taking connections, shows in the
percentiles (no coordinated omission). Prompts are random token ids, so no two share a prefix.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from report import percentile

from twostroke.sim.scale.demand import read_trace

MAX_CONNECTIONS = 2000  # below the router's bound; a request that finds none free waits, which its latency shows
PATIENCE_S = 60.0  # beyond a deadline


@dataclass(frozen=True)
class Due:
    """One request: when it is due, in seconds from the begin, and its size in tokens."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Target:
    """Where requests go, and what all of them say."""

    url: str
    model: str | None = None
    deadline_s: float | None = None  # sent as x-request-timeout; an answer after it is no good one
    api_key: str | None = None


@dataclass(slots=True)
class Outcome:
    """What became of one request. Times count from when it was due."""

    due_s: float
    status: int = 0  # 0: the connection failed
    tokens: int = 0  # in the whole answer
    whole_s: float | None = None
    late_s: float = 0.0  # sent after it was due: of this machine, not the server
    has_retry_after: bool = False


@dataclass
class Result:
    """All outcomes of one run."""

    outcomes: list[Outcome]
    seconds: float  # in which requests were due
    deadline_s: float | None = None

    @property
    def good(self) -> list[Outcome]:
        """Requests that were answered whole and in time."""
        bound = self.deadline_s if self.deadline_s is not None else float("inf")
        return [o for o in self.outcomes if o.status == 200 and o.whole_s is not None and o.whole_s <= bound]

    @property
    def refused(self) -> list[Outcome]:
        """Requests that got a 429 or a 503."""
        return [o for o in self.outcomes if o.status in (429, 503)]

    def figures(self, warm_s: float = 0.0) -> dict[str, float]:
        """Rates per second and milliseconds, of requests that were due after `warm_s`."""
        counted = Result([o for o in self.outcomes if o.due_s >= warm_s], self.seconds - warm_s, self.deadline_s)
        good, refused = counted.good, counted.refused
        ends = [o.whole_s * 1e3 for o in good if o.whole_s is not None]
        refusals = [o.whole_s * 1e3 for o in refused if o.whole_s is not None]
        known = {200, 429, 503, 504}
        return {
            "offered_per_s": len(counted.outcomes) / counted.seconds,
            "good_per_s": len(good) / counted.seconds,
            "good_tokens_per_s": sum(o.tokens for o in good) / counted.seconds,
            "late_answers": float(sum(o.status == 200 for o in counted.outcomes) - len(good)),
            "refused": float(len(refused)),
            "expired": float(sum(o.status == 504 for o in counted.outcomes)),
            "failed": float(sum(o.status not in known for o in counted.outcomes)),
            "without_retry_after": float(sum(not o.has_retry_after for o in refused)),
            "answer_p50_ms": percentile(ends, 50) if ends else 0.0,
            "answer_p99_ms": percentile(ends, 99) if ends else 0.0,
            "refusal_p50_ms": percentile(refusals, 50) if refusals else 0.0,
            "refusal_p99_ms": percentile(refusals, 99) if refusals else 0.0,
            "sent_late_p99_ms": percentile([o.late_s * 1e3 for o in counted.outcomes], 99),
        }


def poisson(rate_per_s: float, seconds: float, size: tuple[int, int], seed: int) -> list[Due]:
    """Arrivals of a Poisson process; `size`: prompt tokens of each, and mean output tokens, which vary by half."""
    chance, at_s, found = random.Random(seed), 0.0, []
    while (at_s := at_s + chance.expovariate(rate_per_s)) < seconds:
        found.append(Due(at_s, size[0], max(1, round(size[1] * chance.uniform(0.5, 1.5)))))
    return found


def of_trace(path: Path, speed: float, seconds: float, most: tuple[int, int]) -> list[Due]:
    """Arrivals and sizes of a trace, `speed` times as fast; `most`: bounds on prompt and output tokens."""
    found = [
        Due(each.arrived_s / speed, min(each.prompt_tokens, most[0]), max(1, min(each.answer_tokens, most[1])))
        for each in read_trace(path)
    ]
    return [due for due in found if due.at_s < seconds]


class Generator:
    """Sends requests over kept connections."""

    def __init__(self, target: Target, seed: int = 1) -> None:
        self._target = target
        self._parts = urlsplit(target.url)
        self._chance = random.Random(seed)
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._free = asyncio.Semaphore(MAX_CONNECTIONS)

    async def run(self, dues: Sequence[Due], seconds: float) -> Result:
        """Send every request when it is due, and wait for all answers."""
        loop = asyncio.get_running_loop()
        bodies = [self._body(due) for due in dues]  # before the begin: it is not the server's time
        began_s, tasks = loop.time(), []
        for due, body in zip(dues, bodies, strict=True):
            wait_s = began_s + due.at_s - loop.time()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            tasks.append(asyncio.create_task(self._one(due, body, began_s + due.at_s)))
        outcomes = list(await asyncio.gather(*tasks))
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()
        return Result(outcomes, seconds, self._target.deadline_s)

    def _body(self, due: Due) -> bytes:
        prompt = [self._chance.randrange(300, 4000) for _ in range(due.prompt_tokens)]
        body = {"prompt": prompt, "max_tokens": due.output_tokens, "ignore_eos": True, "temperature": 0}
        if self._target.model:
            body["model"] = self._target.model
        data = json.dumps(body, separators=(",", ":")).encode()
        lines = [
            f"POST {self._parts.path.rstrip('/')}/v1/completions HTTP/1.1",
            f"host: {self._parts.netloc}",
            "content-type: application/json",
            f"content-length: {len(data)}",
            *([f"x-request-timeout: {self._target.deadline_s:g}"] if self._target.deadline_s else []),
            *([f"authorization: Bearer {self._target.api_key}"] if self._target.api_key else []),
        ]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + data

    async def _one(self, due: Due, message: bytes, due_s: float) -> Outcome:
        loop = asyncio.get_running_loop()
        outcome = Outcome(due.at_s)
        patience_s = PATIENCE_S + (self._target.deadline_s or 0.0)
        try:
            async with self._free, asyncio.timeout(patience_s):
                reader, writer = await self._connection()
                outcome.late_s = loop.time() - due_s
                writer.write(message)
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                size = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
                data = await reader.readexactly(size)
                outcome.status = int(head.split(b" ", 2)[1])
                outcome.has_retry_after = b"\r\nretry-after: " in head
                outcome.whole_s = loop.time() - due_s
                if outcome.status == 200:
                    outcome.tokens = json.loads(data)["usage"]["completion_tokens"]
                if b"\r\nconnection: close" in head:
                    writer.close()
                else:
                    self._idle.append((reader, writer))
        except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError):
            outcome.status = 0
        return outcome

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof() and not writer.is_closing():
                return reader, writer
        return await asyncio.open_connection(self._parts.hostname, self._parts.port or 80)


def main() -> None:
    """Send a load and print what became of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--rate", type=float, default=10.0, help="requests per second, of a Poisson process")
    parser.add_argument("--trace", type=Path, help="a trace instead (.jsonl of Mooncake, .csv of Azure)")
    parser.add_argument("--speed", type=float, default=1.0, help="of the trace")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of a trace: at most")
    parser.add_argument("--output-tokens", type=int, default=32, help="of a trace: at most")
    parser.add_argument("--deadline", type=float, help="x-request-timeout in seconds")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    size = (given.prompt_tokens, given.output_tokens)
    if given.trace:
        dues = of_trace(given.trace, given.speed, given.seconds, size)
    else:
        dues = poisson(given.rate, given.seconds, size, given.seed)
    target = Target(given.url, deadline_s=given.deadline)
    began = time.process_time()
    result = asyncio.run(Generator(target, given.seed).run(dues, given.seconds))
    for name, value in result.figures().items():
        print(f"{name:22} {value:10.2f}")
    print(f"{'generator_cpu_s':22} {time.process_time() - began:10.2f}")


if __name__ == "__main__":
    main()
