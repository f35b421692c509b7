"""What speculation by n-grams gains and costs: tokens per second of the bundled model, on and off in turns.

    python bench/speculation.py [--rounds 5] [--new-tokens 256]

Two engines of one process, with and without speculation, continue the same Python modules one after the other; the
texts must be equal. The clock runs from the moment when all sequences of a batch have a token to the last token. It is
the CPU time of the process, with one thread for the kernels: what other processes do meanwhile changes it little. The
engine itself decides by the wall clock, as in service.
"""

from __future__ import annotations

import argparse
import asyncio
import sysconfig
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import report

import twostroke
from twostroke.checkpoint.config import ModelConfig
from twostroke.core.clock import MonotonicClock
from twostroke.core.request import SamplingParams, SequenceKey
from twostroke.decode_worker.policy import combined_policy
from twostroke.engine.config import SpeculationConfig
from twostroke.engine.core import CoreLimits, EngineCore
from twostroke.engine.link.messages import Ended, LoadNews, Source, StepTokens, Stop, Submit
from twostroke.engine.link.thread_link import ThreadLink
from twostroke.engine.loop import Engine
from twostroke.engine.policy import StepLimits
from twostroke.engine.speculation.ngram import NgramLimits, NgramProposer
from twostroke.engine.speculation.speculation import Speculation
from twostroke.kernels.cpu.build import built_library
from twostroke.kv.cache.pool import BlockPool
from twostroke.kv.cache.prefix import PrefixCache
from twostroke.model.loader import RunnerOptions, load_runner
from twostroke.model.resolved import resolve
from twostroke.text.tokenizer import Tokenizer

MODEL = Path(twostroke.__file__).parent / "model" / "bundled"
MODULES = (
    *("argparse", "ast", "bisect", "calendar", "cmd", "codecs", "colorsys", "contextlib"),
    *("csv", "difflib", "enum", "fileinput", "fractions", "gettext", "heapq", "imaplib"),
)
PROMPT_TOKENS, BLOCK_TOKENS, NUM_BLOCKS = 384, 16, 4096
TIMEOUT_S = 300.0
BATCHES, NUM_AT_LEAST = (1, 4, 16), 4
KINDS = {"greedy": (0.0, 0), "sampled at 0.8": (0.8, 7)}


@dataclass
class Said:
    """One generation of a batch, timed from the moment when all of its sequences have a token."""

    tokens: dict[SequenceKey, list[int]] = field(default_factory=dict)
    first_s: float = 0.0
    last_s: float = 0.0

    num_timed: int = 0  # tokens after `first_s`


class Contestant:
    """An engine in its own thread."""

    def __init__(self, config: SpeculationConfig | None) -> None:
        options = RunnerOptions(num_blocks=NUM_BLOCKS, block_tokens=BLOCK_TOKENS, num_threads=1)
        runner = load_runner(resolve(MODEL, ModelConfig(), "auto", "cpu", built_library), options)
        self.arithmetic = runner.ops.description
        self.link = ThreadLink()
        pool = BlockPool(NUM_BLOCKS, BLOCK_TOKENS)
        speculation = None
        if config is not None:
            limits = NgramLimits(config.prompt_lookup_min, config.prompt_lookup_max)
            speculation = Speculation(lambda key, params: NgramProposer(limits), config.num_speculative_tokens)
        self.core = EngineCore(
            CoreLimits(runner.max_model_len),
            pool,
            PrefixCache(pool, enabled=False),
            combined_policy(StepLimits(target_ms=1e6)),
            eos_ids=runner.spec.eos_ids,
            key=b"bench",
            speculation=speculation,
        )
        self.engine = Engine(self.core, runner, runner.store, self.link, MonotonicClock())
        self.engine.start()
        self._count = 0

    async def ready(self) -> None:
        """Wait for the engine to load."""
        while not any(isinstance(e, LoadNews) and e.phase == "idle" for e in await self.link.receive()):
            pass

    async def say(self, prompts: list[list[int]], params: SamplingParams) -> Said:
        """Continue all prompts at once."""
        said = Said()
        for prompt in prompts:
            self._count += 1
            key = SequenceKey(str(self._count), 0)
            said.tokens[key] = []
            self.link.send(Submit(key, Source.LOCAL, tuple(prompt), (), b"root", params))
        left = len(prompts)
        async with asyncio.timeout(TIMEOUT_S):
            while left:
                for event in await self.link.receive():
                    if isinstance(event, StepTokens):
                        said.last_s = time.process_time()
                        if said.first_s:
                            said.num_timed += sum(len(news.token_ids) for news in event.news)
                        for news in event.news:
                            said.tokens[news.key] += news.token_ids
                        if not said.first_s and all(said.tokens.values()):
                            said.first_s = said.last_s
                    elif isinstance(event, Ended):
                        left -= 1
        return said

    def close(self) -> None:
        """End the thread."""
        self.link.send(Stop())
        self.engine.join(TIMEOUT_S)


def prompts() -> list[list[int]]:
    """The beginnings of modules of the standard library."""
    tokenizer, folder = Tokenizer.load(MODEL), Path(sysconfig.get_paths()["stdlib"])
    return [tokenizer.encode((folder / f"{name}.py").read_text()[:8000])[:PROMPT_TOKENS] for name in MODULES]


async def measure(given: argparse.Namespace) -> tuple[list[tuple[object, ...]], str]:
    """Rows of the table, and the arithmetic of the engines."""
    config = SpeculationConfig(method="ngram", num_speculative_tokens=given.most)
    contestants = Contestant(None), Contestant(config)
    for each in contestants:
        await each.ready()
    rows = []
    for kind, (temperature, seed) in KINDS.items():
        params = SamplingParams(given.new_tokens, temperature, seed=seed, ignore_eos=True)
        for batch in BATCHES:
            rows.append((kind, batch, *await compare(contestants, batch, params, given.rounds)))
            print(*rows[-1], sep=" | ", flush=True)
    for each in contestants:
        each.close()
    return rows, contestants[0].arithmetic


async def compare(
    contestants: tuple[Contestant, Contestant], batch: int, params: SamplingParams, rounds: int
) -> tuple[str, ...]:
    """Thousands of tokens per second without and with speculation, the gain, and how much of the guesses was right."""
    work, before = prompts()[: max(batch, NUM_AT_LEAST)], Counter(contestants[1].core.counters)
    rates: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        seconds, counts = [0.0, 0.0], [0, 0]
        for at in range(0, len(work), batch):
            texts = {}
            for who in (0, 1) if number % 2 else (1, 0):
                said = await contestants[who].say(work[at : at + batch], params)
                seconds[who] += said.last_s - said.first_s
                counts[who] += said.num_timed
                texts[who] = list(said.tokens.values())
            assert texts[0] == texts[1], "speculation changed a text"
        for who in (0, 1):
            rates[who].append(counts[who] / seconds[who] / 1000)
    counters = contestants[1].core.counters
    drafted, accepted = (
        counters[name] - before[name] for name in ("spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens")
    )
    gains = [with_ / without for without, with_ in zip(*rates, strict=True)]
    share = f"{accepted / drafted:.0%} of {drafted:,}" if drafted else "none"
    return report.spread(rates[0]), report.spread(rates[1]), report.spread(gains), share


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--most", type=int, default=4, help="num_speculative_tokens")
    given = parser.parse_args()
    facts = report.machine()
    rows, arithmetic = asyncio.run(measure(given))
    headings = (
        "sampling",
        "batch",
        "off, thousands",
        "on, thousands",
        "gain, of each round",
        "guesses that were right",
    )
    body = (
        f"Bundled model, {arithmetic}; one thread, prompts of {PROMPT_TOKENS} tokens of Python modules, "
        f"{given.new_tokens} new tokens, n-grams of 2 to 4, at most {given.most} guessed tokens.\n\n"
        + report.table(headings, rows)
        + "\n\nThousands of tokens per second of CPU time: median and range over the rounds. All texts were equal."
    )
    report.save("speculation", "Speculation by n-grams, on and off in turns", body, {"rows": rows}, facts)


if __name__ == "__main__":
    main()
