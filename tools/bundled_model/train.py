"""Trains the bundled model: `python -m bundled_model.train --minutes 60 --out DIR`.

The length of the run is wall-clock time. Learning rates and sequence lengths depend on the fraction that has passed, so
a run on a busy machine uses fewer tokens, but still ends with low rates and long sequences.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from .corpus import collect
from .export import export_model
from .network import Block, Network, Shape
from .optimizer import Muon, adamw
from .tokenizer import encode_documents, render, train_tokenizer

TOKENS_PER_STEP = 8_192
TOKENS_PER_PASS = 4_096  # tokens per forward and backward pass; a step accumulates several


@dataclass(frozen=True, slots=True)
class Plan:
    """Settings of one run. Learning rates are those of the plateau."""

    minutes: float
    out: Path
    seed: int = 0
    num_threads: int = 2
    matrix_lr: float = 5e-3
    embedding_lr: float = 4e-3
    weight_decay: float = 0.1
    export_every_s: float = 600.0
    compiled: bool = False


def rate_at(fraction: float) -> float:
    """Factor on learning rates after this fraction of the time: rises until 1 %, flat until 35 %, then falls to 0."""
    return min(fraction / 0.01, 1.0, max(1.0 - fraction, 0.0) / 0.65)


LENGTHS = (512, 1_024, 2_048, 4_096)


def length_at(fraction: float, step: int) -> int:
    """Sequence length: first 512, later 1,024, in the last eighth of the time 2,048 and 4,096 alternately."""
    if fraction < 0.5:
        return 512
    if fraction < 0.875:
        return 1_024
    return 2_048 if step % 2 else 4_096


class TokenStream:
    """Stream of the training documents, joined and shuffled again for each epoch."""

    def __init__(self, documents: list[npt.NDArray[np.int64]], seed: int) -> None:
        self._documents = documents
        self._random = np.random.default_rng(seed)
        self._rest = np.empty(0, dtype=np.int64)
        self.num_epochs = 0

    def take(self, num_tokens: int, length: int) -> tuple[Tensor, Tensor]:
        """Take inputs and their next tokens, each [num_tokens / length, length]."""
        while len(self._rest) <= num_tokens:
            order = self._random.permutation(len(self._documents))
            self._rest = np.concatenate([self._rest, *(self._documents[index] for index in order)])
            self.num_epochs += 1
        window = torch.from_numpy(self._rest[: num_tokens + 1])
        self._rest = self._rest[num_tokens:]
        return window[:-1].view(-1, length), window[1:].view(-1, length)


def prepare() -> tuple[Tokenizer, list[npt.NDArray[np.int64]]]:
    """Collect the corpus, train the tokenizer on its training part, and encode this part."""
    documents = [document for document in collect() if not document.held_out]
    tokenizer = train_tokenizer(render(d.messages) if d.messages else d.text for d in documents)
    encoded = encode_documents(tokenizer, documents)
    num_bytes = sum(len(d.text.encode()) for d in documents)
    print(f"{len(documents)} documents, {sum(map(len, encoded)):,} tokens, {num_bytes:,} bytes of text", flush=True)
    return tokenizer, encoded


def make_optimizers(network: Network, plan: Plan) -> list[torch.optim.Optimizer]:
    """Make Muon for the matrices of all layers, and AdamW for the other parameters."""
    shape = network.shape
    matrices: list[tuple[Tensor, tuple[int, ...]]] = []
    for block in network.blocks:
        assert isinstance(block, Block)
        matrices.append((block.qkv.weight, block.sizes))
        matrices.append((block.out.weight, (shape.hidden,)))
        matrices.append((block.gate_up.weight, (shape.ffn, shape.ffn)))
        matrices.append((block.down.weight, (shape.hidden,)))
    chosen = {id(parameter) for parameter, _ in matrices}
    others = [parameter for parameter in network.parameters() if id(parameter) not in chosen]
    return [
        Muon(matrices, lr=plan.matrix_lr, weight_decay=plan.weight_decay),
        adamw(others, lr=plan.embedding_lr),
    ]


def train_step(network: Network, stream: TokenStream, length: int, optimizers: list[torch.optim.Optimizer]) -> float:
    """Make one update from `TOKENS_PER_STEP` tokens. Returns their mean loss in nats."""
    total = 0.0
    passes = TOKENS_PER_STEP // TOKENS_PER_PASS
    for _ in range(passes):
        tokens, targets = stream.take(TOKENS_PER_PASS, length)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = network.loss(tokens, targets) / passes
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total


def warm_up(network: Network) -> None:
    """Compile the network for every sequence length, before the time of the run starts."""
    network.compile_parts()
    for length in LENGTHS:
        started = time.monotonic()
        tokens = torch.zeros(TOKENS_PER_PASS // length, length, dtype=torch.int64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            network.loss(tokens, tokens).backward()  # type: ignore[no-untyped-call]
        network.zero_grad(set_to_none=True)
        print(f"compiled for length {length} in {time.monotonic() - started:.0f} s", flush=True)


class Run:
    """Network in training, with all state that is needed to continue after an interruption."""

    def __init__(self, plan: Plan) -> None:
        """Start a run, or continue the one whose state is in `plan.out`."""
        torch.manual_seed(plan.seed)
        self.plan, self.network = plan, Network(Shape())
        self.optimizers = make_optimizers(self.network, plan)
        self.bases = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.step, self.elapsed_s, self.loss = 0, 0.0, 0.0
        self.resumed: list[dict[str, float]] = []  # per continuation: step, and length planned before
        if self._file.exists():
            state = torch.load(self._file, weights_only=True)
            self.network.load_state_dict(state["network"])
            for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(kept)
            self.step, self.elapsed_s, self.loss = state["step"], state["elapsed_s"], state["loss"]
            self.resumed = [*state["resumed"], {"step": self.step, "minutes_before": state["minutes"]}]

    @property
    def _file(self) -> Path:
        return self.plan.out / "state.pt"

    @property
    def fraction(self) -> float:
        """Fraction of the time that has passed: 0 to slightly more than 1."""
        return self.elapsed_s / (self.plan.minutes * 60)

    def set_rates(self) -> None:
        """Set the optimizers' current learning rates."""
        for optimizer, rates in zip(self.optimizers, self.bases, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * rate_at(self.fraction)

    def keep(self) -> None:
        """Write the state from which `Run` can continue."""
        state = {
            "network": self.network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "loss": self.loss,
            "resumed": self.resumed,
            "minutes": self.plan.minutes,
        }
        partial = self._file.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self._file)


def train(plan: Plan) -> None:
    """Run the plan. `plan.out` gets the newest state and export, and at the end `progress.json`."""
    torch.set_num_threads(plan.num_threads)
    plan.out.mkdir(parents=True, exist_ok=True)
    tokenizer, documents = prepare()
    run = Run(plan)
    stream = TokenStream(documents, plan.seed + run.step)
    if plan.compiled:
        warm_up(run.network)
    exported = reported = before = time.monotonic()
    while run.fraction < 1.0:
        run.set_rates()
        length = length_at(run.fraction, run.step)
        loss = train_step(run.network, stream, length, run.optimizers)
        run.step += 1
        run.loss = loss if run.step == 1 else 0.97 * run.loss + 0.03 * loss
        now = time.monotonic()
        run.elapsed_s, before = run.elapsed_s + now - before, now
        if now - reported > 15:
            _report(run, stream.num_epochs, length)
            reported = now
        if now - exported > plan.export_every_s:
            run.keep()
            export_model(run.network, tokenizer, plan.out)
            exported = now
    export_model(run.network, tokenizer, plan.out)
    _write_progress(run)


def _report(run: Run, num_epochs: int, length: int) -> None:
    seen = run.step * TOKENS_PER_STEP
    print(
        f"{run.fraction:6.1%}  step {run.step}  epoch {num_epochs}  length {length}  loss {run.loss:.3f}  "
        f"{seen:,} tokens  {seen / run.elapsed_s:,.0f} tokens/s",
        flush=True,
    )


def _write_progress(run: Run) -> None:
    plan = run.plan
    facts: dict[str, object] = {
        "minutes": plan.minutes,
        "threads": plan.num_threads,
        "seed": plan.seed,
        "compiled": plan.compiled,
        "steps": run.step,
        "tokens_seen": run.step * TOKENS_PER_STEP,
        "resumed": run.resumed,
        "training_loss": round(run.loss, 4),
        "parameters": sum(parameter.numel() for parameter in run.network.parameters()),
    }
    (plan.out / "progress.json").write_text(json.dumps(facts, indent=2) + "\n")


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=60.0, help="wall-clock time of the training loop")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the export; a state found there is continued"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="twice as fast after minutes of compiling; needs g++")
    given = parser.parse_args()
    train(Plan(given.minutes, given.out, seed=given.seed, num_threads=given.threads, compiled=given.compile))


if __name__ == "__main__":
    main()
