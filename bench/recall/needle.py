"""Recall over long contexts by codec of the KV cache: a needle in held-out source code, on the bundled model.

A needle is a line of a name that the text has nowhere else and of random words, at 10, 50 or 90 % of the context; the
context ends with that name, and the words must follow. The model is small: asked is whether it finds the words that
stood there likelier than each of 15 other rows of words. Every codec is compared with the bfloat16 cache, under the
production decoder and store: the context is one chunk of a prompt, the words are read after it.

"Uneven" is the same model with the same exact products: rows of the projections of queries and keys are multiplied by
opposite powers of two, for pairs of channels that rotary embedding turns together. So some channels of the keys are 32
times larger than the others, as in many large models (KIVI, Liu et al. 2024), and only rounding can tell.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch

import argparse
import random
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from quality import BLOCK_TOKENS, GREEDY, held_out_documents
from report import machine, save, table
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from twostroke.checkpoint.config_json import load_spec
from twostroke.checkpoint.locate import located
from twostroke.checkpoint.spec import ModelSpec
from twostroke.core.request import SequenceKey
from twostroke.engine.plan import SequenceStep, StepPlan
from twostroke.kv.block import BlockId
from twostroke.kv.store.store import KvStore
from twostroke.model.batch import build_batch, read_whole
from twostroke.model.decoder.decoder import Decoder
from twostroke.model.loader import make_ops
from twostroke.model.weights.tensors import TensorSource, open_source
from twostroke.model.weights.weights import load_weights

CODECS = ("bfloat16", "fp8", "fp8_e5m2", "int8", "int8_channel")  # the first is what the others are compared with
DEPTHS = (0.1, 0.5, 0.9)
WORDS, CHOICES = 4, 16  # words of a needle, and rows of words of which one was planted
UNEVEN_PAIRS, UNEVEN_BY = (1, 6, 11), 32.0  # pairs of channels of each head, and the factor of their keys


class Uneven:
    """A source whose keys have outlier channels, and whose queries undo them."""

    def __init__(self, source: TensorSource, head_dim: int) -> None:
        self._source = source
        self.where = source.where
        factors = torch.ones(head_dim)
        for pair in UNEVEN_PAIRS:
            factors[[pair, pair + head_dim // 2]] = UNEVEN_BY
        self._factors = factors

    def shapes(self) -> Any:
        """Those of the model."""
        return self._source.shapes()

    def fingerprint(self) -> bytes:
        """That of the model; nothing here uses it."""
        return self._source.fingerprint()

    def take(self, name: str) -> Tensor:
        """A tensor, multiplied if it makes queries or keys."""
        tensor = self._source.take(name)
        of = {"k_proj.weight": self._factors, "q_proj.weight": 1 / self._factors}
        for ending, factors in of.items():
            if name.endswith(ending):
                heads = tensor.shape[0] // len(factors)
                return (tensor.float() * factors.repeat(heads).unsqueeze(1)).to(tensor.dtype)
        return tensor


@dataclass(frozen=True, slots=True)
class Needle:
    """A context that ends where the words must follow."""

    context: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]  # tokens of rows of words, the planted one first
    depth: float


def needles(tokenizer: Tokenizer, documents: list[list[int]], length: int, count: int, seed: int) -> list[Needle]:
    """`count` needles per depth in contexts of `length` tokens."""
    chance = random.Random(f"{length} {seed}")
    words = [id_ for id_ in range(tokenizer.get_vocab_size()) if re.fullmatch(" [a-z]{4,}", tokenizer.decode([id_]))]
    found = []
    for depth in DEPTHS:
        for _ in range(count):
            name = "NEEDLE_" + "".join(chance.choices("BCDFGHKLMPQRSTVWXZ", k=4))
            asked = tokenizer.encode(f"\n{name}:", add_special_tokens=False).ids
            answers = [tuple(chance.sample(words, WORDS)) for _ in range(CHOICES)]
            planted = [*asked, *answers[0], *tokenizer.encode("\n", add_special_tokens=False).ids]
            straw = _straw(documents, length - len(planted) - len(asked), chance)
            place = int(depth * len(straw))
            context = (*straw[:place], *planted, *straw[place:], *asked)
            found.append(Needle(context, tuple(answers), depth))
    return found


def _straw(documents: list[list[int]], count: int, chance: random.Random) -> list[int]:
    """Held-out text of `count` tokens, from documents in random order."""
    text: list[int] = []
    while len(text) < count:
        text += chance.choice(documents)
    return text[:count]


class Model:
    """The bundled model, even or not, with a cache of each codec."""

    def __init__(self, folder: Path, threads: int, most_tokens: int, *, uneven: bool) -> None:
        self.spec: ModelSpec = load_spec(folder)
        source: TensorSource = open_source(folder)
        if uneven:
            source = Uneven(source, self.spec.attention.head_dim)  # type: ignore[union-attr]
        ops = make_ops(torch.bfloat16, "none", threads)
        weights = load_weights(source, self.spec, ops)
        ops.prepare()
        self._decoder = Decoder(self.spec, weights, ops, self.spec.max_model_len)
        num_blocks = -(-most_tokens // BLOCK_TOKENS)
        self._table = tuple(BlockId(block) for block in range(num_blocks))
        self._stores = {codec: KvStore(self.spec.kv_spec(codec), num_blocks, BLOCK_TOKENS) for codec in CODECS}

    def answer_logs(self, needle: Needle, codec: str) -> list[Tensor]:
        """Per row of words: log-probabilities [words, vocab] at their places, given the tokens before each."""
        start = len(needle.context) - 1
        self._rows(needle.context[:start], 0, codec)
        found = []
        for answer in needle.answers:
            rows = self._rows((needle.context[-1], *answer[:-1]), start, codec)
            found.append(F.log_softmax(self._decoder.logits(rows).rows[: len(answer)].float(), -1))
        return found

    def _rows(self, ids: tuple[int, ...], start: int, codec: str) -> Tensor:
        """Hidden rows of tokens from position `start` on, padded as the ops want them."""
        step = SequenceStep(
            SequenceKey("needle", 0), start, ids, self._table, (1,) * len(self._table),
            samples=False, params=GREEDY, num_generated=0,
        )  # fmt: skip
        batch = read_whole(build_batch(StepPlan(0, (step,)), [ids], BLOCK_TOKENS, self._decoder.ops))
        return self._decoder.hidden(batch, self._stores[codec]).rows


@dataclass
class Recall:
    """Of one codec over some needles."""

    right: list[bool] = field(default_factory=list)  # the planted words are likelier than all others
    losses: list[float] = field(default_factory=list)  # nats per planted word
    divergences: list[float] = field(default_factory=list)  # KL(bfloat16 ‖ this), nats, mean over the planted words

    def add(self, logs: Sequence[Tensor], reference: Tensor, answers: Sequence[Sequence[int]]) -> None:
        """One needle: logs of each row of words, and those of the planted row in the first codec's cache."""
        losses = [F.nll_loss(row, torch.tensor(answer)).item() for row, answer in zip(logs, answers, strict=True)]
        self.right.append(losses[0] < min(losses[1:]))
        self.losses.append(losses[0])
        self.divergences.append((reference.exp() * (reference - logs[0])).sum(-1).double().mean().item())

    def figures(self) -> dict[str, float]:
        """Over all needles."""
        return {
            "recall": statistics.mean(self.right),
            "loss": statistics.mean(self.losses),
            "kl_mean": statistics.mean(self.divergences),
            "kl_max": max(self.divergences),
        }


@torch.inference_mode()
def measure(model: Model, found: list[Needle]) -> dict[str, dict[str, float]]:
    """Figures per codec."""
    recalls = {codec: Recall() for codec in CODECS}
    for needle in found:
        logs = {codec: model.answer_logs(needle, codec) for codec in CODECS}
        for codec in CODECS:
            recalls[codec].add(logs[codec], logs[CODECS[0]][0], needle.answers)
    return {codec: recall.figures() for codec, recall in recalls.items()}


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 2000])
    parser.add_argument("--needles", type=int, default=8, help="per length and depth")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    facts, folder = machine(), located("bundled")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    documents = held_out_documents(folder)
    results: dict[str, dict[str, Any]] = {}
    rows = []
    for kind in ("even", "uneven"):
        model = Model(folder, given.threads, max(given.lengths) + WORDS, uneven=kind == "uneven")
        results[kind] = {}
        for length in given.lengths:
            figures = measure(model, needles(tokenizer, documents, length, given.needles, seed=1))
            results[kind][str(length)] = figures
            print(kind, length, figures, flush=True)
            for codec, f in figures.items():
                change = "–" if codec == CODECS[0] else f"{f['kl_mean']:.1e}"
                most = "–" if codec == CODECS[0] else f"{f['kl_max']:.1e}"
                rows.append([kind, length, codec, f"{f['recall']:.0%}", f"{f['loss']:.3f}", change, most])
    headings = ["keys", "context", "cache", "recalled", "nats per word", "KL mean", "KL max"]
    body = (
        f"Bundled model in bfloat16, {given.needles} needles at each of {len(DEPTHS)} depths per context. Recalled: "
        f"the {WORDS} planted words are likelier than each of {CHOICES - 1} other rows of words (by chance "
        f"{1 / CHOICES:.0%}). Nats per word and KL (nats, bfloat16 cache ‖ this cache) are over the places of the "
        f"planted words. Uneven: the same model, {len(UNEVEN_PAIRS)} pairs of key channels per head are "
        f"{UNEVEN_BY:.0f} times larger and their queries smaller.\n\n" + table(headings, rows)
    )
    print(body, save("needle", "Recall over long contexts by codec of the cache", body, results, facts), sep="\n")


if __name__ == "__main__":
    main()
