"""All layers of a decoder in one call of the CPU kernels, without Python between ops.

Serves models whose layers all have plain attention without sinks and a dense gate; other models run op by op. Both
give the same bits. During the call the GIL is free for the worker's face.

A rank of a `SharedMemoryGroup` adds its partial results to those of the others inside the call. They stay float32 until
they are added, so there the bits are not those of op by op, which rounds them first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...checkpoint.adapters.adapter import MatrixName
from ...checkpoint.spec import DenseFfn, ModelSpec, PlainAttention
from ...kernels.cpu import library as native
from ...kernels.cpu.memory import take_memory
from ...kv.store.store import KvStore
from ..adapters.loaded import AdapterRows, LoadedAdapter
from ..batch import StepBatch
from ..ops.native_changes import ChangeTable
from ..ops.native_ops import ACTIVATIONS, KINDS, NativeOps, PackedLinear, StepSpans, address, native_plane, single_rows
from ..ops.seam import Change, Linear, Norm, Ops
from ..parallel.collectives import ONE_RANK, Collectives
from ..parallel.shared_group import SharedMemoryGroup
from ..weights.weights import DenseWeights, LayerWeights, PlainWeights, Weights

_MAX_ROPES = 2
_PLACES: dict[MatrixName, int] = {
    "qkv": native.ADAPTED_QKV,
    "output": native.ADAPTED_OUTPUT,
    "gate_up": native.ADAPTED_GATE_UP,
    "down": native.ADAPTED_DOWN,
}
Angles = list[tuple[Tensor, ...]]  # per rope: cos and sin [rows, half] float32


class Taps(NamedTuple):
    """Places at which copies of the residual stream of all rows are kept."""

    layers: Sequence[int]  # before these, ascending; the number of layers: after the last
    kept: list[Tensor]  # receives [rows, hidden] for each


class _Rows(NamedTuple):
    """Rows of a step between layers. The last two fields are None if keys and values are stored already."""

    x: Tensor  # [rows, hidden], becomes the residual stream
    angles: Angles
    spans: StepSpans
    slots: Tensor | None
    non_finite: Tensor | None
    adapters: Sequence[AdapterRows] = ()


class NativeStack:
    """All layers of one model, created by `make`. For one caller at a time."""

    def __init__(self, spec: ModelSpec, weights: Weights, ops: NativeOps, group: SharedMemoryGroup | None) -> None:
        self._group = group
        self._spec = spec
        self._weights = weights
        self._ops = ops
        attention = spec.attention
        assert isinstance(attention, PlainAttention)
        # True if keys begin at a panel: then they can be computed without the queries before them.
        self._splits = attention.num_heads * attention.head_dim % native.LANES == 0
        self._memory = take_memory(0)
        self._layers: WeakKeyDictionary[KvStore, ctypes.Array[native.Layer]] = WeakKeyDictionary()
        self._changes: WeakKeyDictionary[LoadedAdapter, ChangeTable] = WeakKeyDictionary()

    @staticmethod
    def make(spec: ModelSpec, weights: Weights, ops: Ops, collectives: Collectives = ONE_RANK) -> NativeStack | None:
        """The stack of a model; None for other ops, for a model with layers of another kind, or another kind of group.

        `collectives`: if it has several ranks, `spec` and `weights` are the rank's.
        """
        group = collectives if isinstance(collectives, SharedMemoryGroup) else None
        if group is None and collectives.size > 1:
            return None
        if not isinstance(ops, NativeOps) or not isinstance(spec.attention, PlainAttention) or spec.attention.sinks:
            return None
        if spec.delta is not None or spec.attention.output_gate:
            return None
        ffns = {layer.ffn for layer in spec.layers}
        if len(ffns) > 1 or not isinstance(ffns.pop(), DenseFfn) or len(spec.ropes) > _MAX_ROPES:
            return None
        takes = {part.dtype for layer in weights.layers for part in _linears(layer)}
        return NativeStack(spec, weights, ops, group) if takes == {ops.dtype} else None

    def run(
        self,
        x: Tensor,
        angles: Angles,
        batch: StepBatch,
        store: KvStore,
        taps: Taps | None = None,
    ) -> tuple[Tensor, int]:
        """Run all layers over rows x [rows, hidden], in place: x becomes the residual stream.

        Returns `non_finite` of `Hidden` and its sum. For rows outside `batch.read_rows` the last layer computes
        only keys and values, and their x is undefined.

        With `taps` there are several calls of the kernels, which give the same bits; the step has no adapters then.
        """
        layers = self._layers.get(store)
        if layers is None:
            layers = self._layers[store] = self._describe(store)
        non_finite = torch.zeros(len(x), dtype=torch.int32)
        rows = _Rows(x, angles, batch.attention, batch.slots, non_finite, batch.adapters)
        read, before, above = batch.read_rows, 0, layers
        taps = taps or Taps((), [])
        if taps.layers:
            assert not batch.adapters, "adapters are found by the number of the layer in the call"
            before, above = self._tap(layers, rows, taps)
        if not self._splits or len(read) == batch.num_rows or batch.adapters:
            refused = before + self._run(above, rows, native.WHOLE)
            if len(layers) in taps.layers:
                taps.kept.append(x.clone())
            return non_finite, refused
        assert len(layers) not in taps.layers, "the last layer computes some rows only"
        refused = before + self._run(above, rows, native.KEYS_ONLY)
        if read:
            last = (native.Layer * 1)(layers[len(layers) - 1])
            places = torch.tensor(read, dtype=torch.int64)
            spoken = x[places]
            turned = [tuple(part[places] for part in rope) for rope in angles]
            rows = _Rows(spoken, turned, single_rows(batch.attention, places.numpy()), None, None)
            self._run(last, rows, native.QUERIES_ONLY)
            x[places] = spoken
        return non_finite, refused

    def _tap(
        self, layers: ctypes.Array[native.Layer], rows: _Rows, taps: Taps
    ) -> tuple[int, ctypes.Array[native.Layer]]:
        """Run the layers below the highest tap, and keep x there; returns the sum of `_run`, and the other layers."""
        start, refused = 0, 0
        for tap in taps.layers:
            if tap == len(layers):
                break
            if tap > start:
                refused += self._run(_part(layers, start, tap), rows, native.WHOLE)
                start = tap
            taps.kept.append(rows.x.clone())
        return refused, _part(layers, start, len(layers))

    def _run(self, layers: ctypes.Array[native.Layer], rows: _Rows, last_layer: int) -> int:
        """Run the layers; returns the number of vectors of keys and values that were not finite."""
        spec, x, spans, count = self._spec, rows.x, rows.spans, len(rows.x)
        attention, ffn = spec.attention, spec.layers[0].ffn
        assert isinstance(attention, PlainAttention)
        assert isinstance(ffn, DenseFfn)
        q_width = attention.num_heads * attention.head_dim
        qkv_width = q_width + 2 * attention.num_kv_heads * attention.head_dim
        widths: tuple[int, ...] = (spec.hidden_size, qkv_width, q_width, ffn.width, spec.hidden_size)
        adapters = self._adapters(rows.adapters)
        if len(adapters):
            widths = (*widths, layers[0].gate_up.columns)
        h, qkv, mixed, gated, delta, *halves = self._room(count, widths, x.dtype)
        if count != spans.num_rows:
            mixed.zero_()  # rows of no span must be zeros
        refused = torch.empty(count, dtype=torch.int32)
        step = native.Step(
            x.data_ptr(), h.data_ptr(), qkv.data_ptr(), mixed.data_ptr(), gated.data_ptr(), delta.data_ptr(),
            self._ops.scratch_for(count, max(spec.hidden_size, q_width, ffn.width)), slots=address(rows.slots),
            spans=spans.address, refused=refused.data_ptr(), non_finite=address(rows.non_finite), rows=count,
            kind=KINDS[x.dtype], num_spans=spans.count, hidden=spec.hidden_size, heads=attention.num_heads,
            kv_heads=attention.num_kv_heads, width=attention.head_dim, ffn=ffn.width,
            activation=ACTIVATIONS[spec.activation], last_layer=last_layer,
            group=None if self._group is None else self._group.address, adapters=ctypes.addressof(adapters),
            halves=halves[0].data_ptr() if halves else None, num_adapters=len(adapters),
        )  # fmt: skip
        for i, (cos, sin) in enumerate(rows.angles):
            step.cos[i], step.sin[i], step.half[i] = cos.data_ptr(), sin.data_ptr(), cos.shape[1]
        num_refused = self._ops.run_layers(layers, step)
        if num_refused < 0:
            assert self._group is not None, "only a group fails"
            self._group.check(num_refused - native.GROUP_FAILED)
        return num_refused

    def _adapters(self, rows: Sequence[AdapterRows]) -> ctypes.Array[native.AdapterRows]:
        """The adapters of a step's rows, valid while these live."""
        assert not rows or self._group is None, "adapters are not served by several ranks"
        found = []
        for adapter, chosen in rows:
            table = self._changes.get(adapter)
            if table is None:
                table = self._changes[adapter] = ChangeTable(
                    _by_place(adapter), native.NUM_ADAPTED * len(adapter.layers)
                )
            found.append(table.of_rows(chosen))
        return (native.AdapterRows * len(found))(*found)

    def _room(self, count: int, widths: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Buffers [count, width] for each width, valid until the next call. Memory grows to the largest step's."""
        sizes = [count * width * dtype.itemsize for width in widths]
        sizes = [size + -size % native.ALIGNMENT for size in sizes]
        if sum(sizes) > len(self._memory):
            self._memory = take_memory(sum(sizes))
        ends = list(accumulate(sizes))
        return tuple(self._memory[end - size : end].view(dtype) for size, end in zip(sizes, ends, strict=True))

    def _describe(self, store: KvStore) -> ctypes.Array[native.Layer]:
        attention = self._spec.attention
        assert isinstance(attention, PlainAttention)
        layers = (native.Layer * len(self._spec.layers))()
        for i, (layer, shape) in enumerate(zip(self._weights.layers, self._spec.layers, strict=True)):
            assert isinstance(layer.attention, PlainWeights)
            to = layers[i]
            for name in ("attention_norm", "after_attention", "ffn_norm", "after_ffn"):
                setattr(to, name, _norm(getattr(layer, name)))
            to.q_norm, to.k_norm = _norm(layer.attention.q_norm), _norm(layer.attention.k_norm)
            to.qkv, to.output, to.gate_up, to.down = (part.matrix for part in _linears(layer))
            keys, values = store.planes(i)
            to.keys, to.values = native_plane(keys, attention.head_dim), native_plane(values, attention.head_dim)
            to.scale, to.softcap = attention.scale, attention.softcap or 0.0
            to.window, to.rope = shape.window or 0, shape.rope
        return layers


def _part(layers: ctypes.Array[native.Layer], start: int, end: int) -> ctypes.Array[native.Layer]:
    return (native.Layer * (end - start))(*layers[start:end])


def _by_place(adapter: LoadedAdapter) -> dict[int, Change]:
    """Changes of an adapter by the numbers that the kernels give to matrices of layers."""
    return {
        index * native.NUM_ADAPTED + _PLACES[matrix]: change
        for index, layer in enumerate(adapter.layers)
        for matrix, change in layer.items()
    }


def _linears(layer: LayerWeights) -> tuple[PackedLinear, ...]:
    """The four matrices of a layer with plain attention and a dense gate."""
    assert isinstance(layer.attention, PlainWeights)
    assert isinstance(layer.ffn, DenseWeights)
    return tuple(map(_packed, (layer.attention.qkv, layer.attention.output, layer.ffn.gate_up, layer.ffn.down)))


def _packed(linear: Linear) -> PackedLinear:
    assert isinstance(linear, PackedLinear)
    return linear


def _norm(norm: Norm | None) -> native.NormWeight:
    return native.NormWeight(None, 0.0) if norm is None else native.NormWeight(norm.weight.data_ptr(), norm.eps)
