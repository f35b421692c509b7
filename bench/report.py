"""How results are written: the machine, the command, and a table, under bench/results/."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def machine() -> dict[str, Any]:
    """What a reader needs to judge a figure; nothing that names a host."""
    flags, model = "", platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            model = value.strip()
        if name.strip() == "flags":
            flags = value
    memory = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory.split()[1]) / 2**20),
        "features": [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags.split()],
        "python": platform.python_version(),
        "torch": version("torch"),
        "grpcio": version("grpcio"),
        "load_before": round(os.getloadavg()[0], 2),
        "date": time.strftime("%Y-%m-%d"),
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, min(len(ordered) - 1, round(percent / 100 * len(ordered) + 0.5) - 1))]


def spread(values: Sequence[float]) -> str:
    """Median and range, for figures of a noisy machine."""
    return f"{statistics.median(values):.3g} ({min(values):.3g}–{max(values):.3g})"


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def save(name: str, title: str, body: str, data: dict[str, Any], facts: dict[str, Any] | None = None) -> Path:
    """Write `results/<name>.md` (for people) and `.json` (for scripts). `facts`: `machine()` taken before the work."""
    facts = machine() if facts is None else facts
    command = "python " + " ".join(sys.argv)
    lines = [f"# {title}", "", f"`{command}`", "", ", ".join(f"{k} {v}" for k, v in facts.items()), "", body, ""]
    (RESULTS / name).parent.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"command": command, "machine": facts} | data, indent=1) + "\n")
    path = RESULTS / f"{name}.md"
    path.write_text("\n".join(lines))
    return path
