"""From traces to tokens per second, ratios per round and verdicts. Pure: knows no process, no clock, no file.

A trace is what protocol.Trace holds: events of (seconds since the submission, the sequences that got a token then).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Events = Sequence[tuple[float, Sequence[int]]]
MIN_DECODE_STEPS = 8


class Measure(NamedTuple):
    """One thing that every contestant is asked for."""

    kind: str  # "prefill" or "decode"
    batch: int
    repeats: int = 1

    @property
    def name(self) -> str:
        """As it stands in tables."""
        return f"{self.kind} {self.batch}"


MEASURES = (
    Measure("prefill", 1, repeats=3),
    Measure("prefill", 8),
    Measure("decode", 1),
    Measure("decode", 8),
    Measure("decode", 16),
)


class Window(NamedTuple):
    """The part of a trace in which every sequence decodes and none prefills."""

    begin_s: float
    end_s: float
    tokens: int

    @property
    def tokens_per_s(self) -> float:
        """The rate within it."""
        return self.tokens / (self.end_s - self.begin_s)


def prefill_tokens_per_s(events: Events, batch: int, prompt_tokens: int) -> float:
    """Prompt tokens over the time until the last sequence has its first token.

    Raises:
        ValueError: a sequence got none.
    """
    return batch * prompt_tokens / _first_tokens_s(events, batch)


def decode_window(events: Events, batch: int, new_tokens: int) -> Window:
    """From the last sequence's first token until it has `new_tokens`, or until any sequence ends before.

    Raises:
        ValueError: fewer than MIN_DECODE_STEPS steps lie in it, so that the rate would say little.
    """
    begin_s = _first_tokens_s(events, batch)
    last_s: dict[int, float] = {}
    for at_s, places in events:
        last_s.update(dict.fromkeys(places, at_s))
    first_end_s = min(last_s.values())
    within = [(at_s, len(places)) for at_s, places in events if begin_s < at_s <= first_end_s][: new_tokens - 1]
    if len(within) < MIN_DECODE_STEPS:
        raise ValueError(f"only {len(within)} steps with all {batch} sequences decoding")
    return Window(begin_s, within[-1][0], sum(count for _, count in within))


def outside_share(window: Window, spans: Iterable[Sequence[float]]) -> float:
    """Which share of a window lies outside the spans: with the decoder's spans, what all the rest costs."""
    inside = sum(max(0.0, min(end, window.end_s) - max(begin, window.begin_s)) for begin, end in spans)
    return 1.0 - inside / (window.end_s - window.begin_s)


def _first_tokens_s(events: Events, batch: int) -> float:
    first_s: dict[int, float] = {}
    for at_s, places in events:
        for place in places:
            first_s.setdefault(place, at_s)
    if len(first_s) != batch:
        raise ValueError(f"{len(first_s)} of {batch} sequences got a token")
    return max(first_s.values())


# ------------------------------------------------------------------ comparison

Rounds = Mapping[str, Sequence[float | None]]
"""Per contestant: a figure for every round, None where it failed."""


class Ratio(NamedTuple):
    """Ours against the best rival of each round."""

    median: float
    lowest: float
    highest: float
    rival: str  # the best by median


def ratio_to_best(figures: Rounds, ours: str, rivals: Sequence[str]) -> Ratio | None:
    """Round by round ours over the best rival, then the median; None without a round that has both."""
    ratios = []
    for number, own in enumerate(figures.get(ours, ())):
        others = [value for name in rivals if (value := _at(figures.get(name, ()), number)) is not None]
        if own is not None and others:
            ratios.append(own / max(others))
    if not ratios:
        return None
    medians = {name: median for name in rivals if (median := median_of(figures.get(name, ()))) is not None}
    return Ratio(statistics.median(ratios), min(ratios), max(ratios), max(medians, key=lambda name: medians[name]))


def median_of(values: Sequence[float | None]) -> float | None:
    """The median of what was measured."""
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None


def _at(values: Sequence[float | None], number: int) -> float | None:
    return values[number] if number < len(values) else None


# ------------------------------------------------------------------ goals


@dataclass(frozen=True)
class Goal:
    """Ours (its weights) shall reach `factor` times the best of the rivals."""

    measure: str
    ours: str
    factor: float
    against: str  # a key of the rival groups
    says: str


GOALS = (
    Goal("prefill 1", "twostroke bf16", 1.1, "16-bit", "prefill, batch 1, 16-bit weights"),
    Goal("prefill 8", "twostroke bf16", 1.1, "16-bit", "prefill, batch 8, 16-bit weights"),
    Goal("decode 1", "twostroke bf16", 1.1, "16-bit", "decode, batch 1, 16-bit weights"),
    Goal("decode 16", "twostroke bf16", 1.5, "16-bit", "decode, batch 16, 16-bit weights"),
    Goal("prefill 1", "twostroke int8", 1.1, "8-bit", "prefill, batch 1, 8-bit weights"),
    Goal("decode 1", "twostroke int8", 1.1, "llama.cpp q8_0", "decode, batch 1, 8-bit weights"),
    Goal("decode 16", "twostroke int8", 2.0, "any", "decode, batch 16, 8-bit weights"),
    Goal("decode 1", "twostroke q4_0", 1.1, "llama.cpp q4_0", "decode, batch 1, 4-bit weights"),
    Goal("decode 16", "twostroke q4_0", 1.5, "llama.cpp q4_0", "decode, batch 16, 4-bit weights"),
)
MAX_OVERHEAD = 0.05  # of a decode step at batch 16: all that is not the decoder
MEMORY_FACTOR, MEMORY_SLACK_BYTES = 1.15, 400e6  # of weights plus KV pool


def memory_bound(weight_bytes: int, kv_pool_bytes: int) -> float:
    """Unshared resident bytes that are allowed."""
    return MEMORY_FACTOR * (weight_bytes + kv_pool_bytes) + MEMORY_SLACK_BYTES


def agreement(first_ids: Mapping[str, Sequence[int | None]], reference: str) -> dict[str, float]:
    """Which share of the prompts got the reference's first token: whether all compute the same model."""
    wanted = first_ids.get(reference, ())
    return {
        name: sum(a == b for a, b in zip(ids, wanted, strict=False)) / len(wanted)
        for name, ids in first_ids.items()
        if wanted and len(ids) == len(wanted)
    }
