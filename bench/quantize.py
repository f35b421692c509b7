"""What methods and widths of `twostroke quantize` cost the bundled model: KL, perplexity, size; as a table.

Calibrated on help topics, compared over documents that training never saw. `python bench/quantize.py`: two minutes.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from pydoc_data.topics import topics

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from quality import held_out_documents
from report import save, table

from twostroke.checkpoint.locate import located
from twostroke.model.quantise.job import Texts, quantise
from twostroke.model.quantise.scheme import Settings
from twostroke.text.tokenizer import Tokenizer

RUNS = {
    "rtn 3": Settings("rtn", 3),
    "awq 3": Settings("awq", 3),
    "gptq 3": Settings("gptq", 3),
    "rtn 4": Settings("rtn", 4),
    "awq 4": Settings("awq", 4),
    "gptq 4": Settings("gptq", 4),
    "rtn 8": Settings("rtn", 8),
    "gptq 8": Settings("gptq", 8),
    "fp8": Settings("fp8"),
    "fp8 block": Settings("fp8", granularity="block"),
    "int8": Settings("int8"),
    "smoothquant": Settings("smoothquant"),
}
WINDOW = 512


def cut(documents: list[list[int]], tokens: int) -> list[list[int]]:
    """Windows of whole documents in turn, about `tokens` in all."""
    windows = [ids[at : at + WINDOW] for ids in documents for at in range(0, len(ids) - WINDOW + 1, WINDOW)]
    step = max(1, len(windows) * WINDOW // tokens)
    return windows[::step][: tokens // WINDOW]


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--evaluation-tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    folder = located("bundled")
    tokenizer = Tokenizer.load(folder)
    shown = [tokenizer.encode(topics[name]) for name in sorted(topics)]
    texts = Texts(
        cut(shown, given.calibration_tokens),
        cut(held_out_documents(folder), given.evaluation_tokens),
        "help() topics",
        "documents held out of training",
    )
    rows, data = [], {}
    for name, settings in RUNS.items():
        with tempfile.TemporaryDirectory() as place:
            start = time.perf_counter()
            out = Path(place) / "out"
            report = quantise(folder, out, settings, texts, memory_bytes=8 << 30, num_threads=given.threads)
            seconds = time.perf_counter() - start
        c = report.comparison
        change = f"{c.perplexity / c.original_perplexity - 1:+.3%}"
        size = f"{report.quantised_bytes / 2**20:.2f}"
        first = f"{c.same_first:.2%}"
        rows.append([name, report.scheme, f"{c.kl:.2e}", f"{c.perplexity:.4f}", change, first, size, f"{seconds:.1f}"])
        data[name] = {"comparison": asdict(c), "bytes": report.quantised_bytes, "seconds": seconds}
        print(rows[-1], flush=True)
    body = (
        f"Bundled model, {report.original_bytes / 2**20:.2f} MiB in bfloat16, of which the embedding (2 MiB) stays. "
        f"Calibrated on {report.calibration}, compared on {report.evaluation}: the original's perplexity there is "
        f"{c.original_perplexity:.4f}. KL of the original ‖ the quantised model in nats per token. "
        "Activations are rounded where the scheme says so.\n\n"
        + table(["method", "scheme", "KL", "perplexity", "change", "top-1 equal", "MiB", "seconds"], rows)
    )
    print(body, save("quantize", "What quantising the bundled model costs", body, data), sep="\n")


if __name__ == "__main__":
    main()
