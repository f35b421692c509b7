"""What scoring a prompt row costs a step, and what the fields of a request add to a sampled row. On one core.

`python bench/scoring.py` prints tables; the definition (a row at a time, in fresh memory) runs between the repeats of
what is served, so that a busy machine slows both.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from twostroke.core.request import SamplingParams
from twostroke.engine.plan import History
from twostroke.engine.policy import scored_rows
from twostroke.model.ops.extremes import extremes
from twostroke.model.sampling.logprobs import Scorer
from twostroke.model.sampling.sampler import Draw, Sampler

ROWS, REPEATS, TOP = 32, 9, 20
PLAIN = SamplingParams(max_tokens=4096, temperature=0.0)


def plain_score(row: np.ndarray, token_id: int) -> tuple[float, int, list[int]]:
    """Logprob, rank and the likeliest, by the formulas."""
    best = row.max()
    log_total = math.log(float(np.exp(row - best).sum(dtype=np.float64)))
    rank = 1 + int((row > row[token_id]).sum()) + int((row[:token_id] == row[token_id]).sum())
    last = np.partition(row, len(row) - TOP)[len(row) - TOP]
    top = sorted(np.flatnonzero(row >= last).tolist(), key=lambda i: (-row[i], i))[:TOP]
    return float(row[token_id] - best) - log_total, rank, top


def interleaved(first: Callable[[], object], second: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds of each, in its quickest repeat: what nothing else disturbed."""
    spent_ms: tuple[list[float], list[float]] = ([], [])
    for _ in range(REPEATS):
        for work, into in zip((first, second), spent_ms, strict=True):
            began_s = time.perf_counter()
            work()
            into.append((time.perf_counter() - began_s) * 1000)
    return min(spent_ms[0]), min(spent_ms[1])


def scoring(vocab: int) -> str:
    rows = np.random.default_rng(0).normal(0, 3, (ROWS, vocab)).astype(np.float32)
    targets, scorer = list(range(ROWS)), Scorer()
    plain_ms, ours_ms = interleaved(
        lambda: [plain_score(row, target) for row, target in zip(rows, targets, strict=True)],
        lambda: scorer.score(rows, targets, TOP),
    )
    step_ms = scored_rows(vocab) * ours_ms / ROWS
    return (
        f"| {vocab:,} | {plain_ms / ROWS:.2f} ms | {ours_ms / ROWS:.2f} ms | {plain_ms / ours_ms:.1f} | "
        f"{scored_rows(vocab)} | {step_ms:.0f} ms |"
    )


def fields(vocab: int) -> list[str]:
    """What each field costs beside a plain greedy row."""
    generator = np.random.default_rng(1)
    rows = generator.normal(0, 3, (ROWS, vocab)).astype(np.float32)
    known, sampler = extremes(rows), Sampler((1,))
    draw = lambda count: tuple(generator.integers(0, vocab, count).tolist())  # noqa: E731
    history = History(draw(4000), draw(1000))
    asked: dict[str, SamplingParams] = {
        "logprobs 20": replace(PLAIN, logprobs=20),
        "128 bad words of 256 tokens": replace(PLAIN, bad_words=tuple(draw(256) for _ in range(128))),
        "1,024 biases": replace(PLAIN, logit_bias=tuple((i, 1.0) for i in draw(1024))),
        "1,024 stop ids before min_tokens": replace(PLAIN, min_tokens=4000, stop_token_ids=draw(1024)),
        "repetition penalty": replace(PLAIN, repetition_penalty=1.2),
        "frequency penalty": replace(PLAIN, frequency_penalty=0.5),
        "temperature 1": replace(PLAIN, temperature=1.0),
    }
    lines = []
    for name, params in asked.items():
        draws = [Draw(params, n, 1000, None, history if params.needs_history else None) for n in range(ROWS)]
        plain = [Draw(PLAIN, n, 1000) for n in range(ROWS)]
        with_ms, without_ms = interleaved(
            lambda draws=draws: sampler.sample(rows, draws, known),
            lambda plain=plain: sampler.sample(rows, plain, known),
        )
        lines.append(f"| {name} | {(with_ms - without_ms) / ROWS:.3f} ms |")
    return lines


def main() -> None:
    print(f"## Scoring a prompt row with its {TOP} likeliest tokens\n")
    print("| vocabulary | by the formulas | served | ratio | rows a step may score | which take |")
    print("|---|---|---|---|---|---|")
    for vocab in (4096, 32_000, 128_256, 151_936):
        print(scoring(vocab))
    print("\n## What a field adds to a sampled row, vocabulary 151,936, 1,000 tokens generated\n")
    print("| field | per row and step |\n|---|---|")
    print("\n".join(fields(151_936)))


if __name__ == "__main__":
    main()
