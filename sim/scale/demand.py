"""Requests of scaling runs: trace files of two formats, and two hostile traces made from a seed. Reads files."""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from ...core.errors import ConfigError

_HASH_TOKENS = 512  # tokens per hash id in Mooncake's traces
_JITTER_S = 5.0  # of copies


class Demand(NamedTuple):
    """One request."""

    arrived_s: float
    prompt_tokens: int
    held_tokens: int  # leading tokens that a prefix cache holds
    answer_tokens: int


def read_trace(path: Path) -> list[Demand]:
    """Read a trace: `.jsonl` in Mooncake's format or `.csv` in that of Azure's LLM inference traces.

    A prefix of a Mooncake request counts as held if an earlier request had it: a cache without bounds, for all workers.
    Source of the formats: Mooncake (Qin et al., FAST '25); Splitwise (Patel et al., ISCA '24).

    Raises:
        ConfigError: the file cannot be read, or is no such trace.
    """
    try:
        with path.open(newline="") as lines:
            found = _mooncake(lines) if path.suffix == ".jsonl" else _azure(lines)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        what = "timestamp, input_length, output_length" if path.suffix == ".jsonl" else "TIMESTAMP, ContextTokens"
        raise ConfigError(f"{path} is no trace: {error}; .jsonl has {what}, .csv has TIMESTAMP, …") from None
    if not found:
        raise ConfigError(f"{path} has no requests")
    first_s = min(each.arrived_s for each in found)
    return sorted(each._replace(arrived_s=each.arrived_s - first_s) for each in found)


def _mooncake(lines: Iterable[str]) -> list[Demand]:
    seen, found = set[int](), []
    for line in lines:
        row = json.loads(line)
        hashes = row.get("hash_ids", [])
        held = next((place for place, each in enumerate(hashes) if each not in seen), len(hashes))
        seen.update(hashes)
        prompt = int(row["input_length"])
        found.append(
            Demand(
                row["timestamp"] / 1e3,
                prompt,
                max(0, min(held * _HASH_TOKENS, prompt - 1)),
                max(1, int(row["output_length"])),
            )
        )
    return found


def _azure(lines: Iterable[str]) -> list[Demand]:
    return [
        Demand(
            datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp(),
            max(1, int(row["ContextTokens"])),
            0,
            max(1, int(row["GeneratedTokens"])),
        )
        for row in csv.DictReader(lines)
    ]


def copied(trace: list[Demand], copies: int, seed: int) -> list[Demand]:
    """Every request `copies` times, each within 5 s after its time: the same course of a larger service."""
    random_s = random.Random(seed)
    found = [each._replace(arrived_s=each.arrived_s + random_s.uniform(0, _JITTER_S)) for each in trace * (copies - 1)]
    return sorted([*trace, *found])


def bursts(seed: int, hours: float = 1.0) -> list[Demand]:
    """A steady load, three times as high for 1 to 3 minutes about every 8 minutes, without a sign before."""
    chance = random.Random(seed)
    ends_s = hours * 3600
    edges, at_s = list[tuple[float, float]](), chance.uniform(120, 480)
    while at_s < ends_s:
        lasts_s = chance.uniform(60, 180)
        edges.append((at_s, at_s + lasts_s))
        at_s += lasts_s + chance.uniform(240, 600)

    def rate(now_s: float) -> float:
        return 180.0 if any(start <= now_s < end for start, end in edges) else 60.0

    return _arrivals(chance, ends_s, 180.0, rate, lambda _: (1200.0, 220.0))


def drift(seed: int, hours: float = 2.0) -> list[Demand]:
    """Prompts of 4,000 tokens with answers of 60 become, in hours, prompts of 400 with answers of 2,000."""
    chance = random.Random(seed)
    ends_s = hours * 3600

    def sizes(now_s: float) -> tuple[float, float]:
        share = 0.5 - 0.5 * math.cos(math.pi * min(1.0, now_s / ends_s))
        return 4000 * (400 / 4000) ** share, 60 * (2000 / 60) ** share

    return _arrivals(chance, ends_s, 20.0, lambda _: 20.0, sizes)


def _arrivals(chance: random.Random, ends_s: float, most_per_s: float, rate, sizes) -> list[Demand]:  # type: ignore[no-untyped-def]
    """A Poisson process of varying rate (by thinning), with log-normal lengths around the means of `sizes`."""
    found, now_s = [], 0.0
    while (now_s := now_s + chance.expovariate(most_per_s)) < ends_s:
        if chance.random() * most_per_s > rate(now_s):
            continue
        prompt, answer = sizes(now_s)
        found.append(Demand(now_s, _length(chance, prompt, 1.0), 0, _length(chance, answer, 0.7)))
    return found


def _length(chance: random.Random, mean: float, sigma: float) -> int:
    return max(1, min(131_072, round(chance.lognormvariate(math.log(mean) - sigma * sigma / 2, sigma))))
