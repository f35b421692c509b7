"""Writes what every kernel costs on every target: registers, spilled bytes, shared memory. Needs no GPU.

`python bench/gpu/resources.py [--processes 2]` compiles every shape of `ahead.py` for every target, as the wrappers
launch them (minutes), and writes bench/results/kernels/resources.md and .json.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import triton
from ahead import TARGETS, compile_all

RESULTS = Path(__file__).resolve().parents[1] / "results" / "kernels"


def table(compiled: list[dict[str, Any]]) -> str:
    """One row per call, kernel and shape; a cell per target: registers / spilled bytes / KiB of shared memory."""
    lines = ["| shape | call | kernel | warps, stages on sm_90 | " + " | ".join(TARGETS) + " |"]
    lines.append("|---" * (4 + len(TARGETS)) + "|")
    rows: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for result in compiled:
        rows.setdefault((result["shape"], result["call"], result["kernel"]), {})[result["target"]] = result
    for key, by_target in rows.items():
        of_hopper = by_target["sm_90"]
        cells = [*key, f"{of_hopper['warps']}, {of_hopper['stages']}"]
        for target in TARGETS:
            found = by_target[target]
            cells.append(f"{found['registers']} / {found['spilled_bytes']} / {found['shared_bytes'] / 1024:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    compiled = compile_all(everything=True, processes=parser.parse_args().processes)
    facts = {"triton": triton.__version__, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
    text = f"""# What every kernel costs on every target

`python bench/gpu/resources.py`, {", ".join(f"{name} {value}" for name, value in facts.items())}

Compiled ahead of time, as the wrappers launch them. A cell: registers of a thread / bytes of a thread that were spilled
to memory / KiB of shared memory of a block. A block may have 99 KiB on sm_86, sm_89 and sm_120, 64 on gfx942. Nothing
may spill on sm_90; elsewhere the launch table (`kernels/gpu/launch.py`) awaits measurement.

{table(compiled)}
"""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "resources.md").write_text(text, encoding="utf-8")
    (RESULTS / "resources.json").write_text(
        json.dumps({"machine": facts, "compiled": compiled}) + "\n", encoding="utf-8"
    )
    print(f"{len(compiled)} kernels compiled; written to {RESULTS}")


if __name__ == "__main__":
    main()
