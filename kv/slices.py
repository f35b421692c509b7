"""Sections of a whole model and of its tensor-parallel ranks: heads joined and taken apart. Knows no store.

    whole model   heads 0 1 2 3              a section's heads are counted in the whole model
    2 ranks       rank 0: 0 1 | rank 1: 2 3  a section of a rank's own store counts that rank's heads from 0

A replicated component (`Component.shard`) is whole on every rank; with more ranks than heads, neighbours hold the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from .section import SectionData
from .spec import Component, KvSpec


def sections_of_rank(sections: Iterable[SectionData], rank_spec: KvSpec) -> tuple[SectionData, ...]:
    """A rank's part of sections of the whole model, as its store takes them; those without heads of it are left out.

    `rank_spec`: the rank's, of `KvSpec.of_rank`. Arrays are views where possible.
    """
    components = {component.name: component for component in rank_spec.main.components}
    found = []
    for section in sections:
        component = components.get(section.component) if section.group == rank_spec.main.name else None
        if component is not None:
            part = _cut(section, component)
            if part.head_count:
                found.append(part)
    return tuple(found)


def joined_sections(parts: Sequence[Sequence[SectionData]], rank_specs: Sequence[KvSpec]) -> tuple[SectionData, ...]:
    """Sections of the whole model from those that every rank's store has read: one per component, all heads in order.

    `parts`: per rank, one section of all its heads per component, in the order of its spec.
    """
    joined = []
    for place, component in enumerate(rank_specs[0].main.components):
        owners = [rank for rank in range(len(parts)) if rank % component.holders == 0]
        sections = [parts[rank][place] for rank in owners]
        assert all(section.component == component.name for section in sections)
        first = sections[0]
        scales = [section.scales for section in sections if section.scales is not None]
        joined.append(
            replace(
                first,
                head_start=0,
                head_count=sum(section.head_count for section in sections),
                payload=np.concatenate([section.payload for section in sections], axis=1),
                scales=np.concatenate(scales, axis=1) if scales else None,
                digests=np.concatenate([section.digests for section in sections], axis=1),
                found=None,  # the join has copied the bytes
            )
        )
    return tuple(joined)


def _cut(section: SectionData, component: Component) -> SectionData:
    start = max(section.head_start, component.first_head)
    stop = min(section.head_start + section.head_count, component.first_head + component.heads)
    heads = slice(start - section.head_start, max(start, stop) - section.head_start)
    return replace(
        section,
        head_start=start - component.first_head,
        head_count=max(0, stop - start),
        payload=section.payload[:, heads],
        scales=None if section.scales is None else section.scales[:, heads],
        digests=section.digests[:, heads],
        found=None if section.found is None else section.found[:, heads],
    )
