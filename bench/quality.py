"""What the FP8 cache and 8-bit weights cost in quality on the bundled model: perplexity, distributions, greedy texts.

Everything runs on the production decoder over the production store: attention reads what the cache holds, rounding
included. (A chunk of a prompt and single decode steps give the same bits, so whole windows stand for decoding too.)
Within a compute dtype all caches are measured against the float32 cache.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: more threads change no bit, `--threads` asks for them

import argparse
import math
import random
import statistics
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import torch
from bundled_model.corpus import Document, is_held_out, source_files
from bundled_model.evaluate import STRIDE_TOKENS, WINDOW_TOKENS
from bundled_model.tokenizer import encode_documents
from report import save, table
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from twostroke.checkpoint.config_json import load_spec
from twostroke.checkpoint.locate import located
from twostroke.checkpoint.spec import DType, ModelSpec, Quantization
from twostroke.core.request import SamplingParams, SequenceKey
from twostroke.engine.plan import SequenceStep, StepPlan
from twostroke.kv.block import BlockId
from twostroke.kv.store.store import KvStore
from twostroke.model.batch import build_batch, read_whole
from twostroke.model.decoder.decoder import Decoder
from twostroke.model.loader import make_ops, torch_dtype
from twostroke.model.runner import Runner
from twostroke.model.weights.tensors import open_source
from twostroke.model.weights.weights import load_weights

CacheName = Literal["float32", "bfloat16", "fp8"]
CACHES: tuple[CacheName, ...] = ("float32", "bfloat16", "fp8")  # the first is what the others are compared with
COMPUTES: dict[str, tuple[DType, Quantization]] = {
    "float32": ("float32", "none"),
    "bfloat16": ("bfloat16", "none"),
    "int8": ("bfloat16", "int8"),  # weights of 8 bits, everything else as in bfloat16
}
BLOCK_TOKENS = 16
GREEDY = SamplingParams(max_tokens=1 << 20, temperature=0.0)


def held_out_documents(folder: Path) -> list[list[int]]:
    """Sources and help topics that training never saw, as `training.corpus.collect` chooses and orders them."""
    root = Path(sysconfig.get_path("stdlib"))
    texts = source_files(root) + [(f"topics/{name}", text) for name, text in sorted(topics.items())]
    chosen = [Document(path, "source", True, text=text) for path, text in texts if is_held_out(path)]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [document.tolist() for document in encode_documents(tokenizer, chosen)]


# ------------------------------------------------------------------ teacher-forced


class Forced:
    """Logits of given tokens through decoder and cache."""

    def __init__(self, spec: ModelSpec, decoder: Decoder, cache: CacheName) -> None:
        num_blocks = WINDOW_TOKENS // BLOCK_TOKENS
        self._decoder = decoder
        self._store = KvStore(spec.kv_spec(cache), num_blocks, BLOCK_TOKENS)
        shuffled = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).tolist()
        self._table = tuple(BlockId(block) for block in shuffled)

    def logits(self, tokens: list[int], fresh: int) -> Tensor:
        """Logits [fresh, vocab] of the last `fresh` of `tokens`, computed as one chunk of a prompt."""
        ids = tuple(tokens)
        key, generations = SequenceKey("forced", 0), (1,) * len(self._table)
        step = SequenceStep(key, 0, ids, self._table, generations, samples=False, params=GREEDY, num_generated=0)
        batch = read_whole(build_batch(StepPlan(0, (step,)), [ids], BLOCK_TOKENS, self._decoder.ops))
        stale = len(ids) - fresh
        cut = stale - stale % self._decoder.ops.row_multiple  # logits take as many rows as the ops do
        rows = self._decoder.hidden(batch, self._store).rows[cut:]
        return self._decoder.logits(rows).rows[stale - cut :][:fresh]


@dataclass
class Distance:
    """Of one cache over all tokens: its own losses, and how far its distributions are from the first cache's."""

    losses: list[Tensor] = field(default_factory=list)
    divergences: list[Tensor] = field(default_factory=list)  # KL(first ‖ this), nats
    agree: list[Tensor] = field(default_factory=list)

    def add(self, logs: Tensor, targets: Tensor, reference: Tensor) -> None:
        """One window: log-probabilities [tokens, vocab] of this cache and of the first one."""
        self.losses.append(F.nll_loss(logs, targets, reduction="none").double())
        self.divergences.append((reference.exp() * (reference - logs)).sum(-1).double())
        self.agree.append(logs.argmax(-1) == reference.argmax(-1))

    def figures(self) -> dict[str, float]:
        """Over all tokens together."""
        divergence = torch.cat(self.divergences)
        return {
            "perplexity": math.exp(torch.cat(self.losses).mean().item()),
            "top1_agreement": torch.cat(self.agree).double().mean().item(),
            "kl_mean": divergence.mean().item(),
            "kl_max": divergence.max().item(),
        }


def windows(documents: list[list[int]], limit: int) -> Iterator[tuple[list[int], int]]:
    """(window, fresh tokens at its end) as `tools/bundled_model/evaluate.py` cuts them; about `limit` fresh tokens.

    Where the limit cuts, every document gives an equal share of its windows, the first ones.
    """
    by_document = []
    for document in documents:
        done, found = 1, []
        for start in range(0, len(document), STRIDE_TOKENS):
            window = document[start : start + WINDOW_TOKENS]
            fresh = start + len(window) - done
            if fresh <= 0:
                break
            found.append((window, fresh))
            done += fresh
        by_document.append(found)
    taken = 0
    for place in range(max(map(len, by_document))):
        for found in by_document:
            if place < len(found) and taken < limit:
                taken += found[place][1]
                yield found[place]


@torch.inference_mode()
def teacher_forced(
    spec: ModelSpec, decoder: Decoder, documents: list[list[int]], limit: int
) -> tuple[dict[CacheName, dict[str, float]], int]:
    """Figures per cache over held-out tokens, and how many those were."""
    forced = {cache: Forced(spec, decoder, cache) for cache in CACHES}
    distances = {cache: Distance() for cache in CACHES}
    num_tokens = 0
    for window, fresh in windows(documents, limit):
        targets = torch.tensor(window[-fresh:])
        logs = {cache: F.log_softmax(forced[cache].logits(window[:-1], fresh), dim=-1) for cache in CACHES}
        for cache in CACHES:
            distances[cache].add(logs[cache], targets, logs[CACHES[0]])
        num_tokens += fresh
    return {cache: distance.figures() for cache, distance in distances.items()}, num_tokens


# ------------------------------------------------------------------ greedy


def choose_prompts(documents: list[list[int]], count: int, seed: int) -> list[list[int]]:
    """Pieces of 128 to 512 tokens, from anywhere in the held-out documents."""
    chance = random.Random(seed)
    prompts = []
    for _ in range(count):
        length = chance.randint(128, 512)
        fitting = [document for document in documents if len(document) > length]
        document = chance.choices(fitting, [len(d) - length for d in fitting])[0]
        start = chance.randrange(len(document) - length)
        prompts.append(document[start : start + length])
    return prompts


def continuations(runner: Runner, prompts: list[list[int]], num_new: int) -> list[list[int]]:
    """Greedy tokens through the runner, each up to its end-of-text: prompts one by one, then all decode together."""
    per_sequence = -(-(max(map(len, prompts)) + num_new) // BLOCK_TOKENS)

    def step_of(index: int, ids: list[int], start: int) -> SequenceStep:
        first = index * per_sequence
        blocks = tuple(BlockId(block) for block in range(first, first + per_sequence))
        num_generated = len(ids) - len(prompts[index])
        return SequenceStep(
            SequenceKey(str(index), 0), start, tuple(ids[start:]), blocks, (1,) * per_sequence, samples=True,
            params=GREEDY, num_generated=num_generated, seals_tail=num_generated == 0,
        )  # fmt: skip

    texts = [list(prompt) for prompt in prompts]
    for index, text in enumerate(texts):
        text.extend(runner.run(StepPlan(index, (step_of(index, text, 0),))).tokens[0])
    for number in range(num_new - 1):
        steps = tuple(step_of(index, text, len(text) - 1) for index, text in enumerate(texts))
        for text, tokens in zip(texts, runner.run(StepPlan(len(prompts) + number, steps)).tokens, strict=True):
            text.extend(tokens)
    return [_cut(text[len(prompt) :], runner.spec) for text, prompt in zip(texts, prompts, strict=True)]


def _cut(tokens: list[int], spec: ModelSpec) -> list[int]:
    ends = [place for place, token in enumerate(tokens) if token in spec.eos_ids]
    return tokens[: ends[0] + 1] if ends else tokens


def agreement(ours: list[list[int]], reference: list[list[int]]) -> dict[str, float]:
    """Share of equal texts, and where the others first differ."""
    places = [
        next((p for p, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), min(len(mine), len(other)))
        for mine, other in zip(ours, reference, strict=True)
        if mine != other
    ]
    return {
        "greedy_equal": 1 - len(places) / len(ours),
        "first_difference_mean": statistics.mean(places) if places else None,
    }


# ------------------------------------------------------------------ the page


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much to measure."""

    tokens: int
    prompts: int
    new_tokens: int
    threads: int


def measure(
    folder: Path, compute: str, documents: list[list[int]], sizes: Sizes
) -> tuple[dict[str, Any], dict[CacheName, list[list[int]]]]:
    """All caches under one way to compute: figures, and the greedy texts."""
    dtype, quantization = COMPUTES[compute]
    spec = load_spec(folder)
    ops = make_ops(torch_dtype(dtype), quantization, sizes.threads)
    weights = load_weights(open_source(folder), spec, ops)
    ops.prepare()
    decoder = Decoder(spec, weights, ops, spec.max_model_len)
    figures, num_tokens = teacher_forced(spec, decoder, documents, sizes.tokens)
    prompts = choose_prompts(documents, sizes.prompts, seed=1)
    texts = {}
    for cache in CACHES:
        num_blocks = len(prompts) * -(-(512 + sizes.new_tokens) // BLOCK_TOKENS)
        store = KvStore(spec.kv_spec(cache), num_blocks, BLOCK_TOKENS)
        runner = Runner(spec, weights, ops, store)
        texts[cache] = continuations(runner, prompts, sizes.new_tokens)
        figures[cache] |= agreement(texts[cache], texts[CACHES[0]])
        figures[cache]["bytes_per_token"] = spec.kv_spec(cache).bytes_per_token
    return {"tokens": num_tokens, "caches": figures}, texts


def page(results: dict[str, dict[str, Any]], sizes: Sizes, across: dict[str, dict[str, float]]) -> str:
    """The table, and how to read it."""
    rows = []
    for dtype, result in results.items():
        base = result["caches"][CACHES[0]]["perplexity"]
        for cache, f in result["caches"].items():
            is_first = cache == CACHES[0]
            first = f["first_difference_mean"]
            rows.append(
                [dtype, cache, f["bytes_per_token"], f"{f['perplexity']:.4f}"]
                + (["–"] * 6 if is_first else [f"{f['perplexity'] / base - 1:+.3%}"])
                + ([] if is_first else [f"{f['kl_mean']:.2e}", f"{f['kl_max']:.2e}", f"{f['top1_agreement']:.2%}"])
                + ([] if is_first else [f"{f['greedy_equal']:.0%}", "–" if first is None else f"{first:.1f}"])
            )
    headings = ["compute", "cache", "bytes/token", "perplexity", "change", "KL mean", "KL max", "top-1 equal"]
    headings += ["greedy equal", "first difference"]
    count = next(iter(results.values()))["tokens"]
    body = (
        f"Bundled model. Perplexity, KL (nats, float32 cache ‖ this cache) and top-1 agreement over {count} held-out "
        f"tokens, teacher-forced, in windows of {WINDOW_TOKENS} that move by {STRIDE_TOKENS}. Greedy: the share of "
        f"{sizes.prompts} held-out prompts of 128–512 tokens whose {sizes.new_tokens} new tokens all equal the "
        "float32 cache's, and the mean place of the first difference where they do not. Comparisons are within one "
        "compute dtype, so that they show the cache alone.\n\n" + table([*headings], rows)
    )
    for pair, agreed in across.items():
        body += f"\n\nWith a float32 cache, {pair} leaves {agreed['greedy_equal']:.0%} of the greedy texts equal."
    if {"int8", "bfloat16"} <= results.keys():
        plain, rounded = (results[c]["caches"][CACHES[0]]["perplexity"] for c in ("bfloat16", "int8"))
        body += f" 8-bit weights change the perplexity by {rounded / plain - 1:+.3%}."
    return body


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compute", choices=COMPUTES, nargs="+", default=list(COMPUTES))
    parser.add_argument("--tokens", type=int, default=40_000, help="held-out tokens, about; all are 120,000")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    sizes = Sizes(given.tokens, given.prompts, given.new_tokens, given.threads)
    folder = located("bundled")
    documents = held_out_documents(folder)
    results, texts = {}, {}
    for compute in given.compute:
        results[compute], texts[compute] = measure(folder, compute, documents, sizes)
        print(compute, results[compute], flush=True)
    across = {
        f"computing in {mine} instead of {other}": agreement(texts[mine][CACHES[0]], texts[other][CACHES[0]])
        for mine, other in (("bfloat16", "float32"), ("int8", "bfloat16"))
        if {mine, other} <= texts.keys()
    }
    body = page(results, sizes, across)
    data = {"compute": results, "across": across}
    print(body, save("quality", "What the FP8 cache and 8-bit weights cost", body, data), sep="\n")


if __name__ == "__main__":
    main()
