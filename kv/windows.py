"""Which hash blocks need the KV of windowed layers, and where a computation may begin that lacks some. Pure.

    tokens            0        first_needed(n)              n
    full layers       |=================================|        computing may begin at token n if every layer
    windowed layers   |  may be missing  |==============|        has what its queries see from there on

So a hand-over of n tokens sends windowed layers from `first_needed(n - 1)` on only, a fetch from `first_needed(n)` on.
Positions are rounded to WINDOW_STEP, the largest block of a cache: so the same prompt, which matches up to the end of a
block below n, finds what it needs there, and a worker that may begin at some token below n has what n tokens need.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from .spec import HASH_BLOCK_TOKENS, LayerGroup, WindowedLayers

if TYPE_CHECKING:
    from .section import SectionData

MAIN_GROUP = "main"
WINDOW_STEP = 64  # tokens: the largest physical block


def windowed_layers(windows: Sequence[int | None]) -> WindowedLayers | None:
    """The windowed layers of a cache, from the window of each of its layers; None: there is none."""
    found = [layer for layer, window in enumerate(windows) if window is not None]
    if len(found) == len(windows):
        del found[:1]  # a hash block without any layer could not be sent, and nobody would know that it was left out
    return WindowedLayers(tuple(found), max(window for window in windows if window is not None)) if found else None


def first_needed(windowed: WindowedLayers | None, start: int) -> int:
    """First token that windowed layers must hold so that computing may begin at token `start`; `start` without any."""
    if windowed is None:
        return start
    begin = start - start % WINDOW_STEP
    seen = max(0, begin - windowed.tokens + 1)
    return seen - seen % WINDOW_STEP


def windows_from(windowed: WindowedLayers | None, held: int, num_tokens: int) -> int:
    """First token whose windowed layers a receiver of `num_tokens` tokens wants: it has the first `held`, a start.

    A multiple of 16; 0: all of them.
    """
    if windowed is None:
        return 0
    first = first_needed(windowed, num_tokens - 1)
    return first if first > held else 0


def furthest_start(windowed: WindowedLayers | None, num_blocks: int, lacking: Collection[int], step: int = 1) -> int:
    """Most leading hash blocks, at most `num_blocks` and a multiple of `step`, after which computing may begin.

    `lacking`: numbers of hash blocks without their windowed layers.
    """
    held = num_blocks - num_blocks % step
    while windowed is not None and held and lacking:
        first = first_needed(windowed, held * HASH_BLOCK_TOKENS) // HASH_BLOCK_TOKENS
        missing = max((block for block in lacking if first <= block < held), default=None)
        if missing is None:
            break
        held = missing - missing % step  # every start between here and there sees this block too
    return held


def last_start(
    windowed: WindowedLayers | None, num_blocks: int, block_tokens: int, lacks: Callable[[int], bool]
) -> int:
    """`furthest_start` in blocks of `block_tokens` tokens. `lacks(i)`: block i is without its windowed layers."""
    held = num_blocks
    while windowed is not None and held:
        first = first_needed(windowed, held * block_tokens) // block_tokens
        found = next((block for block in range(held - 1, first - 1, -1) if lacks(block)), None)
        if found is None:
            break
        held = found  # every start between here and there sees this block too
    return held


def usable(stored: int, held: int, wanted_from: int, num_tokens: int) -> int:
    """Where computing may begin after the first `stored` of `num_tokens` tokens came to one that had `held`, a start.

    `wanted_from`: what `windows_from` said.
    """
    if stored <= held or wanted_from <= held or stored >= num_tokens - 1 - (num_tokens - 1) % WINDOW_STEP:
        return stored
    return held


def layer_runs(group: LayerGroup, *, without_windows: bool) -> tuple[range, ...]:
    """Neighbouring layers, each a section of a frame: of all layers one run, else those of the full layers."""
    left_out = group.windowed.layers if without_windows and group.windowed is not None else ()
    edges = [-1, *left_out, group.num_layers]
    return tuple(range(before + 1, after) for before, after in pairwise(edges) if before + 1 < after)


def lacks_windows(sections: Iterable[SectionData], windowed: WindowedLayers | None) -> bool:
    """True if sections of the main group leave out its windowed layers."""
    if windowed is None:
        return False
    first = windowed.layers[0]
    mine = [section for section in sections if section.group == MAIN_GROUP]
    return bool(mine) and not any(s.layer_start <= first < s.layer_start + s.layer_count for s in mine)
