"""Which blocks need their windowed layers, and where computing may begin: against the definition, for many caches."""

import random
from dataclasses import dataclass, field

import numpy as np
import pytest

from twostroke.kv.section import SectionData
from twostroke.kv.spec import LayerGroup, WindowedLayers
from twostroke.kv.windows import (
    first_needed,
    furthest_start,
    lacks_windows,
    layer_runs,
    usable,
    windowed_layers,
    windows_from,
)

EMPTY, NONE = np.zeros(0, np.uint8), np.zeros(0, np.uint64)


def may_begin(windowed: WindowedLayers, token: int, lacking: set[int]) -> bool:
    """The definition: no query from `token` on sees a token whose hash block lacks windowed layers."""
    seen = range(max(0, token - windowed.tokens + 1), token)
    return not any(position // 16 in lacking for position in seen)


def test_windowed_layers_are_found_and_one_layer_is_always_full():
    assert windowed_layers([None, None]) is None
    assert windowed_layers([]) is None
    assert windowed_layers([128, None, 128, None]) == WindowedLayers((0, 2), 128)
    assert windowed_layers([None, 16, 512]) == WindowedLayers((1, 2), 512)
    assert windowed_layers([40, 40, 40]) == WindowedLayers((1, 2), 40)
    assert windowed_layers([40]) is None


def test_the_layers_of_a_frame_are_runs_of_neighbours():
    def runs(layers: tuple[int, ...], **how: bool) -> list[list[int]]:
        group = LayerGroup("main", 6, (), WindowedLayers(layers, 16))
        return [list(run) for run in layer_runs(group, **how)]

    assert runs((0, 2, 3), without_windows=True) == [[1], [4, 5]]
    assert runs((5,), without_windows=True) == [[0, 1, 2, 3, 4]]
    assert runs((1, 3, 5), without_windows=True) == [[0], [2], [4]]
    assert runs((0, 2, 3), without_windows=False) == [[0, 1, 2, 3, 4, 5]]
    plain = LayerGroup("main", 2, ())
    assert layer_runs(plain, without_windows=True) == (range(2),)


@pytest.mark.parametrize("layers", [(0, 2, 3), (1, 3), (3, 4, 5), (5,)])
def test_the_layers_of_a_frame_tell_whether_windows_were_left_out(layers: tuple[int, ...]):
    def sections(group: str, *, without_windows: bool) -> list[SectionData]:
        runs = layer_runs(LayerGroup(group, 6, (), windowed), without_windows=without_windows)
        return [SectionData(group, "k", run.start, len(run), 0, 1, 1, 16, EMPTY, None, NONE) for run in runs]

    windowed = WindowedLayers(layers, 16)
    assert lacks_windows(sections("main", without_windows=True), windowed)
    assert not lacks_windows(sections("main", without_windows=False), windowed)
    assert not lacks_windows(sections("main", without_windows=True), None)
    assert not lacks_windows(sections("draft", without_windows=True), windowed), "another group says nothing"


@pytest.mark.parametrize("window", [1, 16, 20, 64, 128, 1000])
def test_what_is_needed_begins_at_a_block_of_any_cache_and_holds_all_that_is_seen(window: int):
    windowed = WindowedLayers((0,), window)
    for token in range(1500):
        first = first_needed(windowed, token)
        assert first % 64 == 0
        assert 0 <= first <= max(0, token - window + 1)
        assert first > token - window - 2 * 64, "no more than two of the largest blocks too much"
        assert first_needed(windowed, token + 1) >= first
        for size in (16, 32, 64):
            match = token - token % size  # where the same prompt, with one more token, is matched
            assert first_needed(windowed, match) == first


def test_nothing_is_left_out_that_a_start_below_needs():
    windowed = WindowedLayers((0,), 40)
    assert windows_from(None, 0, 1000) == 0
    assert windows_from(windowed, 0, 80) == 0
    assert windows_from(windowed, 0, 1000) == 896
    assert windows_from(windowed, 880, 1000) == 896
    assert windows_from(windowed, 896, 1000) == 0


def test_what_came_midway_is_of_use_from_the_last_64_tokens_on():
    for stored, start in ((0, 0), (400, 0), (944, 0), (960, 960), (992, 992), (1000, 1000)):
        assert usable(stored, 0, 896, 1000) == start
    assert usable(944, 896, 0, 1000) == 944, "nothing was left out"
    assert usable(400, 416, 896, 1000) == 400


def test_the_furthest_start_is_that_of_the_definition():
    chance = random.Random(3)
    for _ in range(3000):
        windowed = WindowedLayers((0,), chance.choice((1, 16, 17, 64, 100, 300)))
        blocks, step = chance.randrange(40), chance.choice((1, 2, 4))
        lacking = {number for number in range(blocks) if chance.random() < chance.choice((0.02, 0.3))}
        found = furthest_start(windowed, blocks, lacking, step)
        assert found % step == 0
        assert 0 <= found <= blocks
        assert may_begin(windowed, found * 16, lacking)
        later = range(found + step, blocks + 1, step)
        needed = [range(first_needed(windowed, end * 16) // 16, end) for end in later]
        assert all(lacking.intersection(each) for each in needed), "a later start would do"
        assert furthest_start(None, blocks, lacking, step) == blocks - blocks % step


@dataclass
class Cache:
    """The leading tokens of one prompt on one worker, with blocks of its own size."""

    windowed: WindowedLayers
    size: int
    held: int = 0
    lacking: set[int] = field(default_factory=set)  # hash blocks

    def start(self, most: int) -> int:
        """Where computing may begin, below `most` tokens."""
        whole = min(self.held, most) // self.size * self.size
        by_block = {number for number in self.lacking if number // (self.size // 16) * self.size < whole}
        return furthest_start(self.windowed, whole // 16, by_block, self.size // 16) * 16

    def take(self, source: "Cache", start: int, end: int, first: int) -> None:
        """Tokens [start, end) come from a source that must have all that is read of it."""
        for number in range(start // 16, -(-end // 16)):
            assert number * 16 < source.held, "a block that the source does not have"
            if number * 16 >= first:
                assert number not in source.lacking, f"hash block {number} is read and lacks its windowed layers"
                self.lacking.discard(number)
            else:
                self.lacking.add(number)
        self.held = max(self.held, end)


@pytest.mark.parametrize("seed", range(60))
def test_workers_that_hand_over_and_fetch_in_any_order_never_read_what_is_not_there(seed: int):
    """Turns of one growing conversation between workers with blocks of 16, 32 and 64 tokens; some turns are short."""
    chance = random.Random(seed)
    windowed = WindowedLayers((0,), chance.choice((1, 20, 64, 128, 200)))
    workers = [Cache(windowed, chance.choice((16, 32, 64))) for _ in range(4)]
    tokens = chance.randrange(1, 400)
    for _ in range(60):
        source, target = chance.sample(workers, 2)
        if chance.random() < 0.3:  # Blocks.Fetch: as far as the source may begin
            start, asked = target.start(tokens), (tokens - 1) // 16 * 16
            reach = {number for number in source.lacking if number * 16 >= start}
            end = furthest_start(windowed, min(asked, source.held) // 16, reach) * 16
            if end <= start:
                continue
            target.lacking = {number for number in target.lacking if number * 16 < start}
            target.held = start
            target.take(source, start, end, first_needed(windowed, end))
            assert may_begin(windowed, end, target.lacking), "what was fetched is of no use"
        else:  # a hand-over, for which the source computes what it lacks
            begin = source.start(tokens - 1)
            source.lacking = {number for number in source.lacking if number * 16 < begin}
            source.held = max(source.held, tokens)
            start = target.start(tokens - 1)
            first = windows_from(windowed, start, tokens)
            target.lacking = {number for number in target.lacking if number * 16 < start}
            target.held = start
            target.take(source, start, tokens, first)
            assert may_begin(windowed, tokens, target.lacking)
            assert target.start(tokens - 1) == (tokens - 1) // target.size * target.size, "the same prompt is found"
            stored = chance.randrange(start, tokens) // 16 * 16
            kept = usable(stored, start, first, tokens)
            assert kept in (stored, start)
            assert may_begin(windowed, kept, target.lacking)
        tokens = max(1, tokens + chance.choice((0, 1, 15, 16, 100, -30)))
