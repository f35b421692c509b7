"""What adapters cost a decode step: 64 of them loaded, a batch of 16 sequences, each with another one.

    python bench/adapters.py [--threads 2] [--rounds 30] [--context 256] [--shapes reference 8b]

Steps of the native kernels with random weights in bfloat16, in turns: without adapters, all rows with one adapter, and
every row with another one of 64 (of rank 16, and of ranks 8 to 64 mixed). Shares are those of the median step without
adapters. "reference" is the shape of bench/engine; "8b" has four layers of an 8B Llama's width, so that a matrix and
its change stand in the relation that they have in a model of that size. Then steps beside a thread that loads one
adapter after the other from files, all the time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
import torch
from safetensors.torch import save_file
from torch import Tensor

from twostroke.checkpoint.adapters.adapter import ADAPTED, AdapterLimits, places, read_adapter
from twostroke.checkpoint.config_json import spec_from_config
from twostroke.checkpoint.layout import expected_shapes
from twostroke.checkpoint.spec import DenseFfn, ModelSpec, PlainAttention
from twostroke.core.request import SamplingParams, SequenceKey
from twostroke.engine.link.messages import LoadAdapter
from twostroke.engine.plan import SequenceStep, StepPlan
from twostroke.kv.block import BlockId
from twostroke.kv.store.store import KvStore
from twostroke.model.adapters.loaded import LoadedAdapter
from twostroke.model.adapters.loading import AdapterLoader
from twostroke.model.loader import make_ops
from twostroke.model.ops.seam import LowRank, Ops
from twostroke.model.runner import Runner
from twostroke.model.weights.weights import load_weights

NUM_ADAPTERS, BATCH, BLOCK_TOKENS = 64, 16, 16
RANKS = (8, 16, 32, 64)
SHAPES: dict[str, dict[str, int]] = {
    "reference": {"hidden_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 8,
                  "head_dim": 64, "intermediate_size": 2816, "vocab_size": 32_000},
    "8b": {"hidden_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 8,
           "head_dim": 128, "intermediate_size": 14_336, "vocab_size": 32_000},
}  # fmt: skip


@dataclass
class RandomWeights:
    """Random tensors of a model, made when they are asked for. Implements `TensorSource`."""

    spec: ModelSpec
    where: str = "random"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return expected_shapes(self.spec)

    def take(self, name: str) -> Tensor:
        shape = self.shapes()[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return (torch.randn(shape) * 0.02).to(torch.bfloat16)

    def fingerprint(self) -> bytes:
        return b"r" * 16


def spec_of(shape: dict[str, int]) -> ModelSpec:
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
        "max_position_embeddings": 2048, "eos_token_id": 1, "tie_word_embeddings": False, **shape,
    }  # fmt: skip
    return spec_from_config(config, {}, "bench")


def random_adapter(spec: ModelSpec, ops: Ops, rank: int) -> LoadedAdapter:
    """An adapter of all linear modules, in bfloat16."""
    attention, ffn = spec.attention, spec.layers[0].ffn
    assert isinstance(attention, PlainAttention)
    assert isinstance(ffn, DenseFfn)
    hidden, q, kv = (
        spec.hidden_size,
        attention.num_heads * attention.head_dim,
        attention.num_kv_heads * attention.head_dim,
    )
    shapes = {  # columns of the matrix, and rows of its modules
        "qkv": (hidden, (q, kv, kv)),
        "output": (q, (hidden,)),
        "gate_up": (hidden, (ffn.width, ffn.width)),
        "down": (ffn.width, (hidden,)),
    }
    layers = []
    for _ in spec.layers:
        changes = {}
        for name in ADAPTED:
            columns, modules = shapes[name]
            parts, first = [], 0
            for rows in modules:
                a, b = (torch.randn(sides).mul_(0.02).to(torch.bfloat16) for sides in ((rank, columns), (rows, rank)))
                parts.append(LowRank(a, b, 2.0, first))
                first += rows
            changes[name] = ops.pack_change(parts, gate_width=ffn.width if name == "gate_up" else None)
        layers.append(changes)
    return LoadedAdapter(b"d" * 16, tuple(layers))


class Bench:
    """A runner with its adapters and 16 sequences in the middle of their decoding."""

    def __init__(self, shape: str, num_threads: int, context: int) -> None:
        self.spec = spec_of(SHAPES[shape])
        ops = make_ops(torch.bfloat16, num_threads=num_threads, kernels="native")
        weights = load_weights(RandomWeights(self.spec), self.spec, ops)
        blocks = -(-(context + 1) // BLOCK_TOKENS)
        store = KvStore(self.spec.kv_spec("fp8"), blocks * BATCH, BLOCK_TOKENS)
        self.runner = Runner(self.spec, weights, ops, store)
        self.runner.warm_up()
        self.arithmetic = ops.description
        for slot in range(1, NUM_ADAPTERS + 1):
            self.runner.hold_adapter(slot, random_adapter(self.spec, ops, 16))
        for slot in range(NUM_ADAPTERS + 1, 2 * NUM_ADAPTERS + 1):
            self.runner.hold_adapter(slot, random_adapter(self.spec, ops, RANKS[slot % len(RANKS)]))
        self.num_bytes = [self.runner._adapters[slot].num_bytes for slot in range(1, 2 * NUM_ADAPTERS + 1)]
        self._tables = [tuple(BlockId(row * blocks + block) for block in range(blocks)) for row in range(BATCH)]
        self._context, self._number = context, 0

    def step_ms(self, slots: list[int]) -> float:
        """Time of one decode step whose rows have these adapters."""
        self._number += 1
        params = SamplingParams(max_tokens=64, temperature=0.0)
        steps = tuple(
            SequenceStep(
                *(SequenceKey(str(row), 0), self._context, (5 + row,), self._tables[row]),
                *((1,) * len(self._tables[row]), True, params, 1),
                adapter_slot=slot,
            )
            for row, slot in enumerate(slots)
        )
        began_s = time.perf_counter()
        self.runner.run(StepPlan(self._number, steps))
        return (time.perf_counter() - began_s) * 1000


def loads_beside_steps(bench: Bench, seconds: float) -> list[tuple[str, str]]:
    """Times of steps without adapters, alone and while another thread loads adapters one after the other."""
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        write_adapter(bench.spec, directory)
        present = expected_shapes(bench.spec)
        digest = read_adapter(directory, bench.spec, present).digest
        loader, num_loaded, may_go_on = AdapterLoader(bench.runner, present, AdapterLimits()), 0, True

        def loaded(_: object) -> None:
            nonlocal num_loaded
            num_loaded += 1
            if may_go_on:
                loader.load(LoadAdapter(3 * NUM_ADAPTERS, place, digest), loaded)

        rows = []
        for name in ("alone", "beside loads"):
            if name == "beside loads":
                loader.load(LoadAdapter(3 * NUM_ADAPTERS, place, digest), loaded)
            times, end_s = [], time.perf_counter() + seconds
            while time.perf_counter() < end_s:
                times.append(bench.step_ms([0] * BATCH))
            p99 = report.percentile(times, 99)
            what = name if name == "alone" else f"{name}, {num_loaded / seconds:.1f} adapters per second"
            rows.append((what, f"{statistics.median(times):.3g}, p99 {p99:.3g}"))
        may_go_on = False
        loader.drop(3 * NUM_ADAPTERS)
    return rows


def write_adapter(spec: ModelSpec, directory: Path) -> None:
    """An adapter of rank 16 as PEFT saves it."""
    tensors = {}
    for module, place in places(spec, ()).items():
        for side, shape in (("A", (16, place.columns)), ("B", (place.rows, 16))):
            tensors[f"base_model.model.{module}.lora_{side}.weight"] = torch.randn(shape).mul_(0.02).to(torch.bfloat16)
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 16, "lora_alpha": 32}))


def ways(round_: int) -> dict[str, list[int]]:
    """Slots of the rows, by the name of the way; another sixteen of the adapters in every round."""
    first = round_ * BATCH % NUM_ADAPTERS
    others = [1 + (first + row) % NUM_ADAPTERS for row in range(BATCH)]
    return {
        "no adapter": [0] * BATCH,
        "one adapter, rank 16": [others[0]] * BATCH,
        "16 of 64 adapters, rank 16": others,
        "16 of 64 adapters, ranks 8 to 64": [NUM_ADAPTERS + slot for slot in others],
        "8 rows without, 8 with one each, rank 16": [0] * 8 + others[:8],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--load-s", type=float, default=8.0, help="seconds of steps beside loads")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    given = parser.parse_args()
    facts, bodies, data = report.machine(), [], {}
    torch.manual_seed(7)
    for shape in given.shapes:
        bench = Bench(shape, given.threads, given.context)
        times: dict[str, list[float]] = {name: [] for name in ways(0)}
        for round_ in range(given.rounds + 3):
            for name, slots in ways(round_).items():
                took = bench.step_ms(slots)
                if round_ >= 3:
                    times[name].append(took)
        plain = statistics.median(times["no adapter"])
        rows = [
            (name, report.spread(taken), f"{(statistics.median(taken) / plain - 1):+.1%}")
            for name, taken in times.items()
        ]
        sizes = f"an adapter of rank 16 has {bench.num_bytes[0] / 1e6:.1f} MB"
        bodies.append(
            f"Shape {shape}, {bench.arithmetic}, {given.threads} threads, context {given.context}; {sizes}.\n\n"
            + report.table(("rows of the batch of 16", "step, ms: median (range)", "more than without"), rows)
            + "\n\n"
            + report.table(("steps without adapters", "ms, median"), loads_beside_steps(bench, given.load_s))
        )
        data[shape] = dict(times)
        print(bodies[-1], flush=True)
        del bench
    report.save("adapters", "What adapters cost a decode step", "\n\n".join(bodies), data, facts)


if __name__ == "__main__":
    main()
