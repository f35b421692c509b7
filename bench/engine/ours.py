"""Contestant: Twostroke's real engine: scheduler, paged cache, sampling, and tokens streamed through its link.

Variants: `none`, `int8` (what `model.quantization` takes), `q4_0` (the GGUF file, whose 4-bit groups stay as stored).
The decoder's own time is taken by wrapping the two calls that the runner makes to it; what remains of a step is
scheduler, batch, sampling, seals and streaming.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import os
import time
from collections.abc import Callable
from typing import Any

from protocol import MAX_BATCH, NEW_TOKENS, PROMPT_TOKENS, RAMP_TOKENS, Trace, arguments, serve

import checkpoint
from twostroke.checkpoint.config import ModelConfig
from twostroke.core.clock import MonotonicClock
from twostroke.core.request import FinishReason, SamplingParams, SequenceKey
from twostroke.decode_worker.policy import combined_policy
from twostroke.engine.config import StepConfig
from twostroke.engine.core import CoreLimits, EngineCore
from twostroke.engine.link.messages import Ended, LoadNews, Source, StepTokens, Stop, Submit
from twostroke.engine.link.thread_link import ThreadLink
from twostroke.engine.loop import Engine
from twostroke.engine.policy import StepLimits
from twostroke.kernels.cpu import library as native
from twostroke.kernels.cpu.build import build, built_library
from twostroke.kv.block import chain
from twostroke.kv.cache.pool import BlockPool
from twostroke.kv.cache.prefix import PrefixCache
from twostroke.model.loader import RunnerOptions, load_runner
from twostroke.model.resolved import resolve
from twostroke.model.runner import Runner

BLOCK_TOKENS = 16
POOL_TOKENS = 2 * MAX_BATCH * (PROMPT_TOKENS + NEW_TOKENS + RAMP_TOKENS)  # as in service: half of it holds old prefixes
KEY, ROOT = b"bench", b"root"
TIMEOUT_S = 300.0
ALL_AT_ONCE_MS = 1e6


class Ours:
    """Satisfies protocol.Contestant. The face is this thread's event loop, the engine has a thread of its own."""

    ramp_tokens = RAMP_TOKENS

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.count = 0
        self.loop = asyncio.new_event_loop()
        self.spans_s: list[tuple[float, float]] = []

    def prepare(self) -> dict[str, Any]:
        options = RunnerOptions(
            num_blocks=POOL_TOKENS // BLOCK_TOKENS,
            block_tokens=BLOCK_TOKENS,
            num_threads=self.given.threads,
        )
        is_file = self.given.variant == "q4_0"
        path = self.given.checkpoint / ("q4_0.gguf" if is_file else "hf")
        config = ModelConfig(quantization="none" if is_file else self.given.variant)
        _keep_to_isa()
        runner = load_runner(resolve(path, config, "auto", "cpu", built_library), options)
        step = StepConfig()
        # Prompts in whole steps, as the peers compute them: in service they give way to streams (`step.target_ms`), and
        # the first sequences of a batch would end before the last begins to decode.
        limits = StepLimits(step.max_num_seqs, step.max_num_batched_tokens, step.max_waiting, target_ms=ALL_AT_ONCE_MS)
        pool = BlockPool(options.num_blocks, BLOCK_TOKENS)
        self.link = ThreadLink()
        core = EngineCore(
            CoreLimits(runner.max_model_len),
            pool,
            PrefixCache(pool),
            combined_policy(limits),
            eos_ids=runner.spec.eos_ids,
            key=KEY,
        )
        self.engine = Engine(core, runner, runner.store, self.link, MonotonicClock())
        self.engine.start()
        self.loop.run_until_complete(asyncio.wait_for(self._ready(), TIMEOUT_S))
        self._time_the_decoder(runner)
        return {
            "weight_bytes": _weight_bytes(self.given.variant),
            "kv_pool_bytes": POOL_TOKENS * runner.store.spec.bytes_per_token,
            "arithmetic": runner.ops.description,
            "max_batch_tokens": limits.max_batch_tokens,
        }

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Trace:
        self.spans_s.clear()
        self._began_s = time.perf_counter()
        return self.loop.run_until_complete(asyncio.wait_for(self._generate(prompts, new_tokens), TIMEOUT_S))

    def extra(self) -> dict[str, Any]:
        """When the decoder computed, of the last repeat."""
        return {"decoder_spans": [(a - self._began_s, b - self._began_s) for a, b in self.spans_s]}

    async def _generate(self, prompts: list[list[int]], new_tokens: int) -> Trace:
        trace = Trace(len(prompts))
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        places: dict[SequenceKey, int] = {}
        for place, prompt in enumerate(prompts):
            self.count += 1
            key = SequenceKey(str(self.count), 0)
            places[key] = place
            identities = tuple(chain(KEY, ROOT, prompt))
            self.link.send(Submit(key, Source.LOCAL, tuple(prompt), identities, ROOT, params))
        left = len(prompts)
        while left:
            for event in await self.link.receive():
                if isinstance(event, StepTokens):
                    trace.note({places[news.key]: news.token_ids for news in event.news})
                elif isinstance(event, Ended):
                    left -= 1
                    if event.reason is not FinishReason.LENGTH:
                        raise RuntimeError(f"a sequence ended by {event.reason}: {event.error_message}")
        return trace

    async def _ready(self) -> None:
        """The first beat that does not say "loading"."""
        while True:
            events = await self.link.receive()
            if not events:
                raise RuntimeError("the engine ended while it loaded")
            if any(isinstance(event, LoadNews) and event.phase == "idle" for event in events):
                return

    def _time_the_decoder(self, runner: Runner) -> None:
        """Between two generations, with the engine idle: its thread reads these attributes at the next step."""
        decoder: Any = runner._decoder
        decoder.hidden = self._timed(decoder.hidden)
        decoder.logits = self._timed(decoder.logits)

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            began_s = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                self.spans_s.append((began_s, time.perf_counter()))

        return timed

    def close(self) -> None:
        """End the engine's thread."""
        self.link.send(Stop())
        self.engine.join(TIMEOUT_S)


def _keep_to_isa() -> None:
    """Load the kernels of the instruction set that the campaign compares, where it is not this machine's own."""
    isa = os.environ.get("TWOSTROKE_BENCH_ISA")
    if isa:
        library = native.Library(build((f"-march={isa}",)))
        native.load = functools.cache(lambda: library)
        native.load()


def _weight_bytes(quantization: str) -> int:
    """bf16, but in products int8: a byte per number and a float32 per row of a matrix; q4_0: 18 bytes per 32."""
    hidden, ffn = checkpoint.HIDDEN, checkpoint.FFN
    query, key = checkpoint.HEADS * checkpoint.HEAD_DIM, checkpoint.KV_HEADS * checkpoint.HEAD_DIM
    layer = [(query + 2 * key, hidden), (hidden, query), (2 * ffn, hidden), (hidden, ffn)]
    matrices = [*layer * checkpoint.LAYERS, (checkpoint.VOCABULARY, hidden)]
    numbers = sum(rows * columns for rows, columns in matrices)
    others = 2 * (checkpoint.VOCABULARY * hidden + (2 * checkpoint.LAYERS + 1) * hidden)  # embedding and norms
    if quantization == "q4_0":
        return others + numbers * 18 // 32
    return others + (2 * numbers if quantization == "none" else numbers + 4 * sum(rows for rows, _ in matrices))


if __name__ == "__main__":
    contestant = Ours(arguments())
    serve(contestant)
    if hasattr(contestant, "engine"):
        contestant.close()
