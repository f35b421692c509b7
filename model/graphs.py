"""Decode steps as CUDA graphs, keyed (padded batch, query length 1). Knows the decoder, no sampling, no request.

A graph replays on the memory on which it was captured: each size has an arena of inputs that one copy fills. Steps with
prompt chunks, more sequences than the largest size, or a context beyond `GRAPH_CONTEXT` run eagerly, with the same
kernels on the same rows. Padding rows have slot -1 and context 0: they store nothing and attend to nothing.

    arena of size n:  token ids, positions, slots [n] int64 | contexts [n] int32 | block tables [n, blocks] int32

On a CPU (Triton's interpreter) nothing is captured: the decoder runs each step on the same arenas.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..checkpoint.spec import ExpertsFfn, ModelSpec
from ..engine.plan import StepPlan
from ..kv.store.store import KvStore
from .batch import StepBatch
from .decoder.decoder import Decoder, Hidden
from .ops.triton_ops import Layout
from .ops.upload import Arena

GRAPH_CONTEXT = 8192  # tokens; with longer tables every short step would launch more empty splits

_one_capture = threading.Lock()  # torch allows one capture at a time in a process; workers may share it


def graph_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Batch sizes to capture, ascending: powers of two, and the largest batch itself."""
    sizes = [1 << power for power in range(max_num_seqs.bit_length()) if 1 << power <= max_num_seqs]
    return tuple(sizes) if sizes[-1] == max_num_seqs else (*sizes, max_num_seqs)


def padded_size(sizes: Sequence[int], num_seqs: int) -> int | None:
    """Smallest captured size that holds a batch. None: the batch is too large."""
    place = bisect_left(sizes, num_seqs)
    return sizes[place] if place < len(sizes) else None


def can_capture(spec: ModelSpec) -> bool:
    """Return whether a step's kernel launches are independent of its data. With experts they depend on the routing."""
    return not any(isinstance(layer.ffn, ExpertsFfn) for layer in spec.layers)


@dataclass(slots=True, eq=False)
class _Captured:
    """One captured size: its inputs, and the graph that writes their hidden rows to `hidden`."""

    arena: Arena
    batch: StepBatch
    graph: torch.cuda.CUDAGraph | None = None
    hidden: Hidden | None = None


class DecodeGraphs:
    """Graphs of all sizes of one decoder on one store. Use in the thread and the inference mode of the steps."""

    def __init__(self, decoder: Decoder, store: KvStore, max_num_seqs: int) -> None:
        self._decoder = decoder
        self._store = store
        self._device = decoder.ops.device
        self._max_context = min(decoder.max_model_len, GRAPH_CONTEXT)
        self.sizes = graph_sizes(max_num_seqs)
        self._captured: dict[int, _Captured] = {}

    def capture(self) -> None:
        """Capture every size, the largest first, so that the others reuse its memory from the shared pool."""
        for size in reversed(self.sizes):
            self._captured[size] = self._prepared(size)
        if self._device.type == "cpu":
            return
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        for captured in self._captured.values():
            self._decoder.hidden(captured.batch, self._store)  # compiles kernels, and lets cuBLAS choose its own
            captured.graph = torch.cuda.CUDAGraph()
            # Thread-local mode: other threads may use the device meanwhile, e.g. to allocate memory.
            graph = torch.cuda.graph(captured.graph, pool, stream, capture_error_mode="thread_local")
            with _one_capture, graph:
                captured.hidden = self._decoder.hidden(captured.batch, self._store)

    def serves(self, plan: StepPlan) -> bool:
        """Return whether a plan is one decode step that fits a captured size."""
        return len(plan.sequences) <= self.sizes[-1] and all(
            step.num_tokens == 1 and step.end <= self._max_context and not step.adapter_slot for step in plan.sequences
        )

    def run(self, plan: StepPlan, token_ids: Sequence[Sequence[int]]) -> tuple[StepBatch, Hidden]:
        """Compute a step that `serves` accepts. Batch and hidden rows (padding last) are valid until the next step."""
        size = padded_size(self.sizes, len(plan.sequences))
        assert size is not None, "the plan is not served"
        captured = self._captured[size]
        self._fill(captured.arena, plan, token_ids)
        captured.arena.send()
        if captured.graph is None:
            hidden = self._decoder.hidden(captured.batch, self._store)
        else:
            captured.graph.replay()
            assert captured.hidden is not None
            hidden = captured.hidden
        sampled = [i for i, step in enumerate(plan.sequences) if step.samples]
        batch = StepBatch(
            token_ids=captured.batch.token_ids,
            positions=captured.batch.positions,
            slots=captured.batch.slots,
            attention=captured.batch.attention,
            num_rows=size,
            first_rows=range(len(plan.sequences)),
            sampled=sampled,
            sample_rows=sampled,
            read_rows=captured.batch.read_rows,
        )
        return batch, hidden

    def _prepared(self, size: int) -> _Captured:
        blocks = -(-self._max_context // self._store.block_tokens)
        rows, ids = ((size,), torch.int64), torch.int32
        arena = Arena([rows, rows, rows, ((size,), ids), ((size, blocks), ids)], self._device)
        arena.host[2].fill_(-1)
        arena.send()
        token_ids, positions, slots, contexts, tables = arena.device
        layout = Layout.of_singles(tables, contexts)
        return _Captured(arena, StepBatch(token_ids, positions, slots, layout, size, (), (), (), range(size)))

    def _fill(self, arena: Arena, plan: StepPlan, token_ids: Sequence[Sequence[int]]) -> None:
        ids, positions, slots, contexts, tables = (part.numpy() for part in arena.host)
        used, block_tokens = len(plan.sequences), self._store.block_tokens
        place = np.array([step.start for step in plan.sequences])
        ids[:used], ids[used:] = [row[0] for row in token_ids], 0
        positions[:used], positions[used:] = place, 0
        contexts[:used], contexts[used:] = place + 1, 0
        for row, step in zip(tables, plan.sequences, strict=False):
            blocks = -(-step.end // block_tokens)
            row[:blocks] = step.block_table[:blocks]
        blocks_now = tables[np.arange(used), place // block_tokens].astype(np.int64)
        slots[:used], slots[used:] = blocks_now * block_tokens + place % block_tokens, -1
