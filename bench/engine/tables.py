"""A campaign's results as text and as JSON. Knows what stands where, measures nothing."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from figures import (
    GOALS,
    MAX_OVERHEAD,
    MEMORY_FACTOR,
    MEMORY_SLACK_BYTES,
    Goal,
    Ratio,
    agreement,
    median_of,
    memory_bound,
    ratio_to_best,
)
from protocol import NEW_TOKENS, PROMPT_TOKENS
from seats import Entry

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from report import spread, table

if TYPE_CHECKING:
    from campaign import Results

REFERENCE = "transformers bf16"


def rivals(entries: Sequence[Entry], group: str) -> list[str]:
    """Peers that a goal compares with: of a weight class, of one kind, or any."""
    peers = [entry for entry in entries if not entry.is_ours]
    return [e.name for e in peers if group in ("any", e.group) or e.name.startswith(group)]


def ratio(goal: Goal, entries: Sequence[Entry], results: Results) -> Ratio | None:
    """How a goal stands."""
    return ratio_to_best(results.figures.get(goal.measure, {}), goal.ours, rivals(entries, goal.against))


def body(entries: Sequence[Entry], results: Results) -> str:
    """The report below its title."""
    parts = [
        f"A Llama of 254 M parameters (hidden 1,024, 16 layers, 16 heads, 8 KV heads of 64, FFN 2,816, vocabulary "
        f"32,000, untied), random weights, the same numbers for everybody; {PROMPT_TOKENS}-token prompts of "
        f"random ids, {NEW_TOKENS} new tokens, greedy, end token ignored; {results.threads} threads; {results.rounds} "
        f"interleaved rounds, one contestant computing while all others are stopped. Tokens per second, median "
        f"(lowest–highest); decode counts only steps in which every sequence of the batch decodes.",
        f"Ours and llama.cpp are kept to {results.isa} (AVX2 and FMA), and this machine has more; OpenVINO, which "
        "cannot be kept to it, uses what there is."
        if results.isa
        else "",
        _throughput(entries, results),
        _goals(entries, results),
        _own(results),
        _limits(results),
        _conditions(results),
    ]
    if results.absent:
        reasons = [[name, reason.replace("|", "/").replace("\n", " ")] for name, reason in results.absent.items()]
        parts.append("Absent:\n\n" + table(["contestant", "why"], reasons))
    return "\n\n".join(part for part in parts if part)


def _throughput(entries: Sequence[Entry], results: Results) -> str:
    same = agreement(results.first_ids, REFERENCE)
    rows = []
    for entry in entries:
        cells = []
        for measure in results.measures:
            values = [v for v in results.figures.get(measure.name, {}).get(entry.name, []) if v is not None]
            cells.append(_rates(values) if values else "–")
        share = f"{same[entry.name]:.0%}" if entry.name in same else "–"
        rows.append([entry.name, entry.group, *cells, share])
    return table(["contestant", "weights", *(m.name for m in results.measures), f"first tokens as {REFERENCE}"], rows)


def _rates(values: Sequence[float]) -> str:
    """Median and range of tokens per second: whole ones from a hundred on."""
    three = (statistics.median(values), min(values), max(values))
    middle, low, high = (f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in three)
    return f"{middle} ({low}–{high})"


def _goals(entries: Sequence[Entry], results: Results) -> str:
    rows = []
    for goal in GOALS:
        found = ratio(goal, entries, results)
        if found is None:
            rows.append([goal.says, "–", f"≥ {goal.factor:g} ×", "–", "not measured"])
            continue
        verdict = "reached" if found.median >= goal.factor else "missed"
        shown = f"{found.median:.2f} × ({found.lowest:.2f}–{found.highest:.2f})"
        rows.append([goal.says, found.rival, f"≥ {goal.factor:g} ×", shown, verdict])
    return table(["ours beside the best peer, per round", "best peer by median", "goal", "measured", "verdict"], rows)


def _own(results: Results) -> str:
    rows = []
    for name, shares in results.outside.items():
        share = statistics.median(shares)
        shown = f"{share:.1%} ({min(shares):.1%}–{max(shares):.1%})"
        verdict = "reached" if share <= MAX_OVERHEAD else "missed"
        rows.append([f"{name}: scheduler, sampling, streaming at batch 16", f"≤ {MAX_OVERHEAD:.0%}", shown, verdict])
    for name, memory in results.memory.items():
        facts = results.facts[name]
        bound = memory_bound(facts["weight_bytes"], facts["kv_pool_bytes"])
        shown = (
            f"{memory['uss_bytes'] / 1e6:.0f} MB of weights {facts['weight_bytes'] / 1e6:.0f} MB and pool "
            f"{facts['kv_pool_bytes'] / 1e6:.0f} MB (PSS {memory['pss_bytes'] / 1e6:.0f} MB)"
        )
        limit = f"≤ {bound / 1e6:.0f} MB ({MEMORY_FACTOR} × (weights + pool) + {MEMORY_SLACK_BYTES / 1e6:.0f} MB)"
        verdict = "reached" if memory["uss_bytes"] <= bound else "missed"
        rows.append([f"{name}: unshared resident memory after the work", limit, shown, verdict])
    return table(["ours", "goal", "measured", "verdict"], rows) if rows else ""


def _limits(results: Results) -> str:
    names = {
        "read_gb_per_s": "memory reads, GB/s",
        "float_tmul_per_s": "float32 products in registers, 10^12/s",
        "byte_tmul_per_s": "byte products in registers, 10^12/s",
        "bf16_tflop_per_s": "bf16 2048³, TFLOP/s",
        "int8_top_per_s": "int8 2048³, TOP/s",
    }
    rows = [[names[name], spread(values)] for name, values in results.limits.items()]
    return table([f"this machine's limits in the same run, {results.threads} threads", ""], rows) if rows else ""


def _conditions(results: Results) -> str:
    versions = {name: version for found in results.versions.values() for name, version in found.items()}
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    foreign = sorted(results.foreign_cpu)
    if not foreign:
        return said
    busy = f"Cores kept busy by anything else: median {statistics.median(foreign):.2f}, at most {foreign[-1]:.2f}."
    return f"{busy} Peers: {said}." if said else busy


def to_json(entries: Sequence[Entry], results: Results) -> dict[str, Any]:
    """Everything, for scripts."""
    goals = []
    for goal in GOALS:
        found = ratio(goal, entries, results)
        goals.append(
            {"goal": goal.says, "ours": goal.ours, "measure": goal.measure, "factor": goal.factor}
            | {"against": goal.against, "ratio": None if found is None else found._asdict()}
        )
    medians = {
        measure: {name: median_of(values) for name, values in by_name.items()}
        for measure, by_name in results.figures.items()
    }
    return {
        "rounds": results.rounds,
        "threads": results.threads,
        "medians_tokens_per_s": medians,
        "tokens_per_s": results.figures,
        "goals": goals,
        "outside_decoder_share": results.outside,
        "memory": results.memory,
        "limits": results.limits,
        "foreign_cpu": [round(value, 3) for value in results.foreign_cpu],
        "facts": results.facts,
        "versions": results.versions,
        "first_tokens_agree": agreement(results.first_ids, REFERENCE),
        "absent": results.absent,
    }
