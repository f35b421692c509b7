"""What a grammar adds to a decode step: on the reference model of 254 M parameters (bench/engine), one core.

`python bench/grammar.py FOLDER` writes the checkpoint there if need be. Steps with and without a grammar are
interleaved; the time is that of the core. With a second core, masks are made while the step computes.
"""

from __future__ import annotations

import random
import sys
import time
from dataclasses import replace
from pathlib import Path

from bench.engine.checkpoint import VOCABULARY, ensure
from bench.report import save, spread, table
from twostroke.checkpoint.config import ModelConfig
from twostroke.core.request import SamplingParams, SequenceKey
from twostroke.engine.plan import History, SequenceStep, StepPlan
from twostroke.kernels.cpu.build import built_library
from twostroke.kv.block import BlockId
from twostroke.model.loader import RunnerOptions, load_runner
from twostroke.model.resolved import resolve
from twostroke.model.runner import Runner
from twostroke.text.grammar import GrammarCompiler
from twostroke.text.grammar_program import grammar_of
from twostroke.text.tokenizer import Tokenizer

CONTEXT, REPEATS = 64, 30
FREE = SamplingParams(max_tokens=4096, temperature=0.8, seed=1, repetition_penalty=1.0001)  # has a history, as grammars
ENTRY = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "size": {"type": "integer"}, "kind": {"enum": ["file", "folder"]}},
    "required": ["name", "size", "kind"],
    "additionalProperties": False,
}
GRAMMARS = {
    "JSON schema, a list of objects": {"json": {"type": "array", "items": ENTRY, "minItems": 1000}},
    "any JSON object": {"json": {"type": "object", "minProperties": 1000}},
    "regex": {"regex": "([a-z]{1,8} ){1000}"},
}


class Decoding:
    """A batch that decodes: the same rows each step, one token longer."""

    def __init__(self, runner: Runner, name: str, params: SamplingParams, batch: int) -> None:
        self._runner = runner
        self._params = [replace(params, seed=seed) for seed in range(batch)]
        self._keys = [SequenceKey(f"{name}{i}", 0) for i in range(batch)]
        self._ids: list[list[int]] = [[] for _ in range(batch)]
        self.num_deferred = 0

    def step(self, number: int) -> float:
        """Milliseconds of one step: of all threads' time on the core, so that others on the machine count little."""
        steps = []
        for i, (key, params, ids) in enumerate(zip(self._keys, self._params, self._ids, strict=True)):
            blocks = tuple(BlockId(i * CONTEXT // 16 + j) for j in range(CONTEXT // 16))
            start = len(ids) % (CONTEXT - 1)
            steps.append(
                SequenceStep(
                    key, start, (ids[-1] if ids else 5,), blocks, (1,) * len(blocks), True, params, len(ids),
                    history=History((), tuple(ids)),
                )
            )  # fmt: skip
        plan = StepPlan(number, tuple(steps))
        began_s = time.process_time()
        result = self._runner.run(plan)
        took_ms = (time.process_time() - began_s) * 1000
        assert not result.failed, result.failed
        for ids, found in zip(self._ids, result.tokens, strict=True):
            ids.extend(found)
        self.num_deferred += len(result.deferred)
        return took_ms


def main() -> None:
    directory = ensure(Path(sys.argv[1]))
    runner = load_runner(
        resolve(directory, ModelConfig(), "fp8", "cpu", built_library),
        RunnerOptions(num_blocks=16 * CONTEXT // 16 + 1, num_threads=1),
    )
    tokenizer = Tokenizer.load(directory)
    compiler = GrammarCompiler(tokenizer, VOCABULARY, tokenizer.eos_ids)
    runner.serve_grammars(compiler.start)
    runner.warm_up()
    rows, data, number = [], {}, 0
    for name, rule in GRAMMARS.items():
        grammar = grammar_of(rule)
        began_s = time.perf_counter()
        matcher = compiler.start(grammar)
        compile_ms = (time.perf_counter() - began_s) * 1000
        mask_ms = masks_of(matcher)
        for batch in (1, 16):
            free, bound = (
                Decoding(runner, f"{name}{batch}{kind}", params, batch)
                for kind, params in (("free", FREE), ("bound", replace(FREE, grammar=grammar)))
            )
            spent: tuple[list[float], list[float]] = ([], [])
            for repeat in range(REPEATS + 3):
                for decoding, into in zip((free, bound), spent, strict=True):
                    number += 1
                    took_ms = decoding.step(number)
                    if repeat >= 3:
                        into.append(took_ms)
            without, within = (sorted(each)[len(each) // 2] for each in spent)
            share = f"{(within / without - 1) * 100:+.1f} %"
            cells = (name, batch, f"{compile_ms:.1f}", f"{mask_ms:.3f}", spread(spent[0]), spread(spent[1]), share)
            rows.append((*cells, bound.num_deferred))
            data[f"{name}, {batch}"] = {"free_ms": spent[0], "bound_ms": spent[1], "deferred": bound.num_deferred}
    headings = (
        "grammar",
        "batch",
        "compile ms",
        "mask ms",
        "step without, ms",
        "step with, ms",
        "added",
        "deferred rows",
    )
    print(save("grammar", "Structured output: cost of a decode step", table(headings, rows), {"steps": data}))


def masks_of(matcher: object) -> float:
    """Median milliseconds of a mask, over tokens drawn from the masks."""
    import numpy as np

    rng, spent = random.Random(1), []
    for _ in range(100):
        began_s = time.perf_counter()
        mask = matcher.mask()  # type: ignore[attr-defined]
        spent.append((time.perf_counter() - began_s) * 1000)
        allowed = np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little"))
        began_s = time.perf_counter()
        matcher.advance((int(rng.choice(allowed)),))  # type: ignore[attr-defined]
        spent[-1] += (time.perf_counter() - began_s) * 1000
    return sorted(spent)[len(spent) // 2]


if __name__ == "__main__":
    main()
