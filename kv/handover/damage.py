"""Compares the digests of frames with their planes, and finds what is missing in them. Knows shapes, no envelope."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np

from ..codec import Codec, payload_bytes
from ..digest import U64, places
from ..frame_digest import section_digests
from ..section import SectionData
from ..spec import COMPONENT_NUMBERS, HASH_BLOCK_TOKENS, KvSpec
from ..windows import lacks_windows, layer_runs
from .frames import Frame

_MAIN = "main"


def verify_frame(frame: Frame, key: int, spec: KvSpec | None = None, windows_from: int = 0) -> bool:
    """True if every digest of a frame matches and, with `spec`, every row that this cache needs is present.

    Frames of tokens before `windows_from` may leave out the windowed layers.
    """
    header = frame.header
    may_lack = header.token_start + header.token_count <= windows_from
    if spec is not None and not covers(frame.sections, spec, without_windows=may_lack):
        return False
    return verify_sections(frame.sections, header.token_start, header.token_count, key)


def verify_sections(sections: Iterable[SectionData], token_start: int, token_count: int, key: int) -> bool:
    """True if every digest matches: there is no damaged range."""
    return not damaged_ranges(sections, token_start, token_count, key)


def damaged_ranges(
    sections: Iterable[SectionData], token_start: int, token_count: int, key: int
) -> list[tuple[int, int]]:
    """Token ranges (start, count) with a digest that does not match, in order; adjacent ranges are merged.

    Sections of other groups than "main" are auxiliary: they are not verified and must not be used. If "main" has a
    component that this release cannot digest, the whole range counts as damaged.
    """
    first = token_start // HASH_BLOCK_TOKENS
    bad = np.zeros(-(-token_count // HASH_BLOCK_TOKENS), bool)
    for section in sections:
        if section.group != _MAIN:
            continue
        if section.component not in COMPONENT_NUMBERS:
            return [(token_start, token_count)]
        found = section.found
        if found is None:
            blocks = np.arange(first, first + len(bad), dtype=np.uint64)
            found = section_digests(section.payload, section.scales, _first_places(*_extent(section)) | blocks, key)
        if not np.array_equal(found, section.digests):
            bad |= (found != section.digests).any(axis=(0, 1))
    if not bad.any():
        return []
    edges = np.flatnonzero(np.diff(bad, prepend=False, append=False)).reshape(-1, 2)
    stop = token_start + token_count
    ranges = ((HASH_BLOCK_TOKENS * (first + int(a)), HASH_BLOCK_TOKENS * (first + int(b))) for a, b in edges)
    return [(start, min(end, stop) - start) for start, end in ranges]


def _extent(section: SectionData) -> tuple[str, int, int, int, int]:
    return section.component, section.layer_start, section.layer_count, section.head_start, section.head_count


@lru_cache(maxsize=256)
def _first_places(component: str, layer_start: int, layer_count: int, head_start: int, head_count: int) -> U64:
    """Places uint64 [layers, heads, 1] of hash block 0; those of another hash block differ in the lowest bits only."""
    layers = layer_start + np.arange(layer_count)
    heads = head_start + np.arange(head_count)
    found = places(layers[:, None, None], COMPONENT_NUMBERS[component], heads[:, None], np.zeros(1, np.int64))
    found.flags.writeable = False
    return found


def covers(sections: Sequence[SectionData], spec: KvSpec, *, without_windows: bool = False) -> bool:
    """True if sections hold all layers and heads of every component of the main group, in rows of its width.

    `without_windows`: or all but the windowed layers, of all components.
    """
    lacks = without_windows and lacks_windows(sections, spec.main.windowed)
    runs = layer_runs(spec.main, without_windows=lacks)
    num_layers = sum(map(len, runs))
    missing = {component.name: num_layers * component.heads for component in spec.main.components}
    component_by_name = {component.name: component for component in spec.main.components}
    for section in sections:
        component = component_by_name.get(section.component)
        if section.group != _MAIN or component is None:
            continue
        layers = range(section.layer_start, section.layer_start + section.layer_count)
        fits_layers = any(run.start <= layers.start and layers.stop <= run.stop for run in runs)
        fits_heads = section.head_start + section.head_count <= component.heads
        if not fits_layers or not fits_heads:
            return False
        if section.row_bytes != payload_bytes(Codec(section.codec), component.width):
            return False
        missing[component.name] -= section.layer_count * section.head_count  # sections of a frame do not overlap
    return not any(missing.values())
