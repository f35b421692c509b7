"""A Llama of random weights, made on the device: the engine's own decoder and store over it. Knows no checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from twostroke.checkpoint.spec import DenseFfn, LayerSpec, ModelSpec, PlainAttention, RopeSpec
from twostroke.core.request import SamplingParams, SequenceKey
from twostroke.engine.plan import SequenceStep, StepPlan
from twostroke.kv.block import BlockId
from twostroke.kv.store.store import KvStore
from twostroke.model.ops.seam import Norm
from twostroke.model.ops.triton_ops import TritonOps
from twostroke.model.runner import Runner
from twostroke.model.weights.weights import DenseWeights, LayerWeights, PlainWeights, Weights

BLOCK_TOKENS = 16
KEY = 0x0123456789ABCDEF
_GREEDY = SamplingParams(max_tokens=4096, temperature=0.0)


@dataclass(frozen=True)
class Shape:
    """How big the model and the runs are; `tiny()` is what the interpreter can do."""

    device: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    width: int
    vocab: int
    prefills: tuple[tuple[int, int], ...]  # sequences and tokens of each
    batches: tuple[int, ...]
    uneven_batch: int  # padded by the graphs
    context: int
    steps: int

    @classmethod
    def llama_8b(cls) -> Shape:
        return cls(
            "cuda", 32, 4096, 14336, 32, 8, 128, 128256, ((1, 2048), (8, 1024)), (1, 8, 32, 64, 128), 5, 1024, 24
        )

    @classmethod
    def tiny(cls) -> Shape:
        return cls("cpu", 1, 48, 64, 4, 2, 16, 96, ((1, 20), (2, 3)), (1, 2), 3, 16, 2)

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(
            architecture="LlamaForCausalLM",
            hidden_size=self.hidden,
            vocab_size=self.vocab,
            attention=PlainAttention(self.heads, self.kv_heads, self.width, self.width**-0.5),
            layers=(LayerSpec(DenseFfn(self.ffn)),) * self.layers,
            ropes=(RopeSpec(500000.0, self.width),),
            activation="silu",
            rms_eps=1e-5,
            tied_embeddings=False,
            max_model_len=self.max_len,
            bos_id=None,
            eos_ids=(),
            dtype="bfloat16",
        )

    @property
    def max_len(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.context + 2 * self.steps, *(tokens for _, tokens in self.prefills))

    @property
    def linear_numbers(self) -> int:
        """Weights that a token meets in the layers."""
        attention = self.hidden * self.width * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.ffn)

    def prefill_flops(self, sequences: int, tokens: int) -> int:
        """Products of layers and of causal attention, and of the head for the last rows."""
        attention = 2 * self.layers * self.heads * self.width * tokens * (tokens + 1)
        return sequences * (2 * self.linear_numbers * tokens + attention + 2 * self.hidden * self.vocab)

    def decode_bytes(self, batch: int, kv_bytes_per_token: int) -> int:
        """Read at least: every weight of a step, and every sequence's context (as it is in the middle of a run)."""
        weights = 2 * (self.linear_numbers + self.hidden * self.vocab)
        return weights + batch * (self.context + self.steps // 2) * kv_bytes_per_token


def random_weights(shape: Shape, ops: TritonOps) -> Weights:
    """Weights that neither explode nor vanish, from one seed."""
    generator = torch.Generator(shape.device).manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        numbers = torch.randn((rows, columns), generator=generator, device=shape.device, dtype=ops.dtype)
        return numbers.mul_(columns**-0.5)

    def norm() -> Norm:
        return Norm(torch.ones(shape.hidden, device=shape.device), 1e-5)

    def layer() -> LayerWeights:
        qkv = ops.pack(matrix((shape.heads + 2 * shape.kv_heads) * shape.width, shape.hidden))
        output = ops.pack(matrix(shape.hidden, shape.heads * shape.width))
        gate_up = ops.pack(matrix(2 * shape.ffn, shape.hidden), gated=True)
        ffn = DenseWeights(gate_up, ops.pack(matrix(shape.hidden, shape.ffn)))
        return LayerWeights(norm(), PlainWeights(qkv, output, None, None), None, norm(), ffn, None)

    layers = tuple(layer() for _ in range(shape.layers))
    head = ops.pack(matrix(shape.vocab, shape.hidden))
    return Weights(matrix(shape.vocab, shape.hidden), layers, norm(), head, b"random")


class Engine:
    """Runners with and without graphs over one model and one store, and a hand that drives them."""

    def __init__(self, shape: Shape, ops: TritonOps, weights: Weights, cache: str, batches: Sequence[int]) -> None:
        self.shape = shape
        self.blocks_each = -(-shape.max_len // BLOCK_TOKENS)
        spec = shape.spec
        num_seqs = max(*batches, *(sequences for sequences, _ in shape.prefills))
        num_blocks = num_seqs * self.blocks_each
        self.store = KvStore(spec.kv_spec(cache), num_blocks, BLOCK_TOKENS, shape.device, KEY, by_kernels=True)
        scattered = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).tolist()
        self.tables = [
            tuple(BlockId(b) for b in scattered[i * self.blocks_each : (i + 1) * self.blocks_each])
            for i in range(num_seqs)
        ]
        self.eager = Runner(spec, weights, ops, self.store, shape.max_len)
        self.graphs = Runner(spec, weights, ops, self.store, shape.max_len, graph_seqs=max(batches))
        self._number = 0

    def prefill(self, first: int, sequences: int, tokens: int) -> list[int]:
        """Run prompts in one step; the first tokens."""
        prompt = torch.randint(0, self.shape.vocab, (sequences, tokens), generator=torch.Generator().manual_seed(first))
        steps = [self._step(first + i, 0, row, tail=True) for i, row in enumerate(prompt.tolist())]
        return self._run(self.eager, steps)

    def decode(self, runner: Runner, position: int, tokens: Sequence[int]) -> list[int]:
        """Run one step of the first sequences, all at one position; the next tokens."""
        return self._run(runner, [self._step(i, position, [token]) for i, token in enumerate(tokens)])

    def _step(self, sequence: int, start: int, ids: Sequence[int], tail: bool = False) -> SequenceStep:
        key, table = SequenceKey(f"sequence-{sequence}", 0), self.tables[sequence]
        generations = (1,) * len(table)
        return SequenceStep(key, start, tuple(ids), table, generations, True, _GREEDY, start, seals_tail=tail)

    def _run(self, runner: Runner, steps: Sequence[SequenceStep]) -> list[int]:
        result = runner.run(StepPlan(self._number, tuple(steps)))
        self._number += 1
        assert not result.non_finite, "random weights gave numbers that are not finite"
        return [row[0] for row in result.tokens]
