"""Sections of a whole model and of its tensor-parallel ranks: heads joined and taken apart. Knows no store.

    whole model   heads 0 1 2 3              a section's heads are counted in the whole model
    2 ranks       rank 0: 0 1 | rank 1: 2 3  a section of a rank's own store counts that rank's heads from 0

A replicated component (`Component.shard`) is whole on every rank; with more ranks than heads, neighbours hold the same.
Slices of `handover/shards.py` say which rank gives which layers and heads; holders of the same heads share them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from .handover.shards import Slice, plan_slices, rank_specs
from .section import PlaneBuffer, SectionData
from .spec import HASH_BLOCK_TOKENS, Component, KvSpec
from .windows import layer_runs

U8 = NDArray[np.uint8]


class RankSlices:
    """Slices between the ranks of one worker and its endpoint, where the sections of all heads leave and arrive."""

    def __init__(self, spec: KvSpec, size: int) -> None:
        """`spec`: of the whole model.

        Raises:
            PairRefused: its heads cannot be split over so many ranks.
        """
        self.ranks = rank_specs(spec, size)
        self._spec = spec
        self._given = [[s for s in plan_slices(self.ranks, (spec,)) if s.source == rank] for rank in range(size)]
        self._taken = plan_slices((spec,), self.ranks)

    def packed_bytes(self, num_tokens: int) -> int:
        """Size in which the part of every rank fits: that of the largest one."""
        return max(sum(_size(self._component(s), s, num_tokens) for s in given) for given in self._given)

    def packed(self, rank: int, sections: Sequence[SectionData], num_tokens: int) -> U8:
        """A rank's part of a range: the layers and heads that it gives, one plane behind the other.

        `sections`: of all its heads, as its store reads them, with or without the windowed layers.
        """
        out = np.zeros(self.packed_bytes(num_tokens), np.uint8)
        end = 0
        for piece in self._given[rank]:
            first_head = _named(self.ranks[rank], piece.component).first_head
            for section, place in _parts(piece, sections, first_head):
                for plane in (section.payload, section.scales, section.digests):
                    if plane is not None:
                        flat = np.ascontiguousarray(plane[place]).reshape(-1).view(np.uint8)
                        out[end : end + len(flat)] = flat
                        end += len(flat)
        return out

    def joined(
        self, parts: Sequence[U8], num_tokens: int, into: PlaneBuffer | None = None, *, without_windows: bool = False
    ) -> tuple[SectionData, ...]:
        """Sections of the whole model from the packed parts of all ranks: per component, one or one per run of layers.

        `into` receives the planes: per section, payload before scales.
        """
        runs = layer_runs(self._spec.main, without_windows=without_windows)
        whole = [_empty(component, run, num_tokens, into) for component in self._spec.main.components for run in runs]
        for given, part in zip(self._given, parts, strict=True):
            end = 0
            for piece in given:
                for section, place in _parts(piece, whole, 0):
                    for plane in (section.payload, section.scales, section.digests):
                        if plane is not None:
                            target = plane[place]
                            flat = part[end : end + target.nbytes]
                            plane[place] = flat.view(plane.dtype).reshape(target.shape)
                            end += target.nbytes
        return tuple(whole)

    def taken_apart(self, sections: Iterable[SectionData]) -> list[tuple[SectionData, ...]]:
        """Each rank's part of sections of the whole model, as its store takes them. Arrays are views."""
        parts: list[list[SectionData]] = [[] for _ in self.ranks]
        for section in sections:
            for piece in self._taken:
                if section.group == self._spec.main.name and section.component == piece.component:
                    for rank in piece.destinations:
                        cut = _cut(section, piece, _named(self.ranks[rank], piece.component).first_head)
                        parts[rank] += [] if cut is None else [cut]
        return [tuple(part) for part in parts]

    def _component(self, piece: Slice) -> Component:
        return _named(self._spec, piece.component)


def _size(component: Component, piece: Slice, num_tokens: int) -> int:
    """Bytes of payload, scales and digests."""
    rows = len(piece.layers) * len(piece.heads)
    row_bytes = component.bytes_per_token // component.heads
    return rows * (num_tokens * row_bytes + 8 * -(-num_tokens // HASH_BLOCK_TOKENS))


def _empty(component: Component, layers: range, num_tokens: int, into: PlaneBuffer | None) -> SectionData:
    shape = (len(layers), component.heads, num_tokens)
    has_scales = component.bytes_per_token > component.heads * component.row_bytes

    def plane(*dimensions: int) -> U8:
        return np.empty(dimensions, np.uint8) if into is None else into.take(dimensions)

    return SectionData(
        group="main",
        component=component.name,
        layer_start=layers.start,
        layer_count=len(layers),
        head_start=0,
        head_count=component.heads,
        codec=component.codec,
        row_bytes=component.row_bytes,
        payload=plane(*shape, component.row_bytes),
        scales=plane(*shape) if has_scales else None,
        digests=np.empty((*shape[:2], -(-num_tokens // HASH_BLOCK_TOKENS)), np.uint64),
    )


def _cut(section: SectionData, piece: Slice, first_head: int) -> SectionData | None:
    """The part of a section that is in a slice, its heads counted from `first_head`; None: there is none."""
    layers = _common(section.layer_start, section.layer_count, piece.layers)
    heads = _common(section.head_start, section.head_count, piece.heads)
    if not layers or not heads:
        return None
    place = (
        slice(layers.start - section.layer_start, layers.stop - section.layer_start),
        slice(heads.start - section.head_start, heads.stop - section.head_start),
    )
    return replace(
        section,
        layer_start=layers.start,
        layer_count=len(layers),
        head_start=heads.start - first_head,
        head_count=len(heads),
        payload=section.payload[place],
        scales=None if section.scales is None else section.scales[place],
        digests=section.digests[place],
        found=None if section.found is None else section.found[place],
    )


def _common(start: int, count: int, other: range) -> range:
    return range(max(start, other.start), min(start + count, other.stop))


def _parts(
    piece: Slice, sections: Iterable[SectionData], first_head: int
) -> Iterator[tuple[SectionData, tuple[slice, slice]]]:
    """The sections that have layers of a slice, and the place of these layers and of the slice's heads in them."""
    heads = slice(piece.heads.start - first_head, piece.heads.stop - first_head)
    for section in sections:
        layers = _common(section.layer_start, section.layer_count, piece.layers)
        if section.component == piece.component and layers:
            yield section, (slice(layers.start - section.layer_start, layers.stop - section.layer_start), heads)


def _named(spec: KvSpec, name: str) -> Component:
    return next(component for component in spec.main.components if component.name == name)
