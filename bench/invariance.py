"""What batch invariance costs on this CPU: our linear layers, one K order for every number of rows, beside the fastest
of torch's, whose order follows the shape. Run: python bench/invariance.py [--threads N] [--rounds N]

The linear layers of the reference model (a Llama of 254 M parameters) are most of a step, and the only part that a
library would compute in another order for another number of rows. Their time is set against a whole step of ours.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from report import machine, save, spread, table

from twostroke.model.ops.native_ops import NativeOps

HIDDEN, LAYERS, FFN, VOCABULARY, QKV = 1024, 16, 2816, 32000, 2048
SHAPES = [(QKV, HIDDEN), (HIDDEN, HIDDEN), (2 * FFN, HIDDEN), (HIDDEN, FFN)] * LAYERS + [(VOCABULARY, HIDDEN)]
ROWS = (1, 8, 16, 512)
GOAL = {1: 1.02, 8: 1.02, 16: 1.02, 512: 1.10}


def contestants(threads: int) -> dict[str, Callable[[int], float]]:
    """Seconds of all linear layers once, for a number of rows."""
    generator = torch.Generator().manual_seed(1)
    weights = [(torch.randn(shape, generator=generator) * 0.02).bfloat16() for shape in SHAPES]
    ops = NativeOps(torch.bfloat16, threads)
    ours = [ops.pack(w) for w in weights]
    packed: dict[int, list[torch.Tensor]] = {}

    def inputs(rows: int) -> dict[int, torch.Tensor]:
        return {inner: torch.randn(rows, inner, generator=generator).bfloat16() for inner in (HIDDEN, FFN)}

    def timed(call: Callable[[], object]) -> float:
        time.sleep(0.1)  # torch's threads spin for a while after their work, and would do so into the next one's time
        began_s = time.perf_counter()
        call()
        return time.perf_counter() - began_s

    def by_ours(rows: int) -> float:
        torch.set_num_threads(1)
        x = inputs(rows)
        return timed(lambda: [ops.linear(x[p.matrix.inner], p) for p in ours])

    def by_linear(rows: int) -> float:
        torch.set_num_threads(threads)
        x = inputs(rows)
        return timed(lambda: [torch.nn.functional.linear(x[w.shape[1]], w) for w in weights])

    def by_prepacked(rows: int) -> float:
        torch.set_num_threads(threads)
        mkldnn = torch.ops.mkldnn
        if rows not in packed:
            packed.clear()
            packed[rows] = [mkldnn._reorder_linear_weight(w, rows) for w in weights]
        x = inputs(rows)
        pairs = list(zip(weights, packed[rows], strict=True))
        return timed(lambda: [mkldnn._linear_pointwise(x[w.shape[1]], p, None, "none", [], "") for w, p in pairs])

    return {"ours, invariant": by_ours, "torch F.linear": by_linear, "oneDNN, prepacked for these rows": by_prepacked}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    facts = machine()
    rows_of_table, data = [], {}
    with torch.inference_mode():
        everybody = contestants(given.threads)
        for rows in ROWS:
            for call in everybody.values():
                call(rows)  # warm, and packed for these rows
            times: dict[str, list[float]] = {name: [] for name in everybody}
            for _ in range(given.rounds):
                for name, call in everybody.items():
                    times[name].append(call(rows) * 1000)
            mine, *others = times.values()
            ratios = [ours / min(rest) for ours, *rest in zip(mine, *others, strict=True)]
            data[str(rows)] = {"times_ms": times, "ratios": ratios}
            verdict = "reached" if statistics.median(ratios) <= GOAL[rows] else "missed"
            rows_of_table.append([rows, *map(spread, times.values()), spread(ratios), f"≤ {GOAL[rows]:.2f}, {verdict}"])
    headings = ["rows", *(f"{name}, ms" for name in everybody), "ours / fastest other", "goal"]
    body = (
        f"All linear layers of the reference model once, bf16, {given.threads} threads, {given.rounds} interleaved "
        f"rounds; median (lowest–highest).\n\n{table(headings, rows_of_table)}"
    )
    print(body, save("invariance", "What batch invariance costs", body, data, facts), sep="\n")


if __name__ == "__main__":
    main()
