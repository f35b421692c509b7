"""Of a worker with sliding windows the router's map says what the worker's cache says, whatever its blocks lack."""

import random

import pytest

from twostroke.kv.block import chain
from twostroke.kv.cache.pool import BlockPool
from twostroke.kv.cache.prefix import PrefixCache
from twostroke.kv.cache.reach import EVERYWHERE, Reach, bits_of, places_of, reach_of, told_reach
from twostroke.kv.spec import WindowedLayers
from twostroke.router.routing.prefixes import PrefixMap

KEY, ROOT = b"key", b"root"


def named(num_blocks, salt=0):
    return chain(KEY, ROOT, [salt * 1000 + i for i in range(16 * num_blocks)])


class Heard:
    """A router's map of one worker's cache, which hears of changes as over the wire."""

    def __init__(self, cache, reach):
        self.cache, self.reach, self.map, self.sequence = cache, reach, PrefixMap(), 1
        self.map.join("w")
        self.resync()

    def resync(self):
        self.cache.drain_events()
        listed = self.cache.snapshot()
        cut = len(listed) // 2
        for part, last in ((listed[:cut], False), (listed[cut:], True)):  # in two pieces
            bits = bits_of(part, frozenset(self.cache.lacking(part)))
            assert self.map.snapshot("w", self.sequence, b"".join(part), last, lacking=bits, reach=self.reach)
            self.sequence += 1

    def hear(self):
        if self.cache.resync_needed:
            self.resync()
            return
        stored, removed = self.cache.drain_events()
        bits = bits_of(stored, frozenset(self.cache.lacking(stored)))
        assert self.map.delta("w", self.sequence, b"".join(stored), b"".join(removed), lacking=bits)
        self.sequence += 1

    def held(self, identities):
        return self.map.held(identities).get("w", 0)


def test_the_map_expects_what_the_cache_finds():
    shorter = sum(compared(random.Random(seed)) for seed in range(12))
    assert shorter > 30, "windows that are missing made hardly any match shorter"


def compared(rng):
    """Change a cache at random, and compare; returns how often a match was shorter than what is stored."""
    block_tokens, window = rng.choice((16, 16, 32, 64)), rng.choice((1, 40, 100, 300))
    span = block_tokens // 16
    pool = BlockPool(rng.choice((12, 30)), block_tokens)
    windowed = WindowedLayers((0,), window)
    cache = PrefixCache(pool, rng.choice((12, 1000)), windowed=windowed)
    heard = Heard(cache, reach_of(block_tokens, windowed))
    trunk = list(range(160))
    prompts = [
        [*trunk[: rng.randrange(160)], *(1000 * salt + i for i in range(rng.randrange(60)))] for salt in (1, 2, 3)
    ]
    chains = [chain(KEY, ROOT, tokens[: len(tokens) // 16 * 16]) for tokens in (trunk, *prompts)]
    num_shorter = 0
    for _ in range(60):
        identities = rng.choice(chains)
        identities = identities[: rng.randrange(len(identities) + 1)]
        if rng.random() < 0.2:
            pool.give_back(pool.take(rng.randrange(pool.num_free + 1)))  # evicts what is cached
        blocks = cache.acquire(identities) if rng.random() < 0.8 else []  # or another copy of what is there
        missing = len(identities) // span - len(blocks)
        if 0 <= missing <= pool.num_free:
            start, blocks = len(blocks), [*blocks, *pool.take(missing)]
            first = rng.randrange(len(blocks) + 1)
            lacking = range(start, first) if rng.random() < 0.6 else ()
            blocks = cache.publish(identities, blocks, start, ROOT, lacking)
        pool.give_back(blocks)
        if rng.random() < 0.6:
            heard.hear()
            heard.map.check_integrity()
            for each in chains:
                for end in {len(each), rng.randrange(len(each) + 1)}:
                    assert heard.held(each[:end]) == cache.match(each[:end])
                    num_shorter += cache.match(each[:end]) < cache.whole(cache._held_blocks(each[:end]) * span)
    return num_shorter


def test_a_block_that_gets_its_windows_is_told_once_more():
    pool = BlockPool(8, 16)
    cache = PrefixCache(pool, windowed=WindowedLayers((0,), 64))
    heard, identities = Heard(cache, Reach(16, 64)), named(4)
    pool.give_back(cache.publish(identities, pool.take(4), 0, ROOT, range(4)))
    heard.hear()
    assert heard.held(identities) == 0
    pool.give_back(cache.publish(identities, pool.take(4), 0, ROOT))
    stored, removed = cache.drain_events()
    assert (stored, removed, cache.lacking(stored)) == (identities, [], ())
    assert heard.map.delta("w", heard.sequence, b"".join(stored), b"")
    assert heard.held(identities) == 4
    assert cache.drain_events() == ([], [])


def test_a_block_that_comes_back_without_its_windows_is_told_once_more():
    pool = BlockPool(4, 16)
    cache = PrefixCache(pool, windowed=WindowedLayers((0,), 64))
    heard, identities = Heard(cache, Reach(16, 64)), named(4)
    pool.give_back(cache.publish(identities, pool.take(4), 0, ROOT))
    heard.hear()
    assert heard.held(identities) == 4
    pool.give_back(cache.publish(identities, pool.take(4), 0, ROOT, range(4)))  # taking evicts the copies with windows
    heard.hear()
    assert heard.held(identities) == cache.match(identities) == 0


def test_blocks_are_found_whole():
    prefixes, identities = PrefixMap(), named(6)
    prefixes.join("w")
    assert prefixes.snapshot("w", 1, b"".join(identities), True, reach=Reach(64))
    assert [prefixes.held(identities[:n]).get("w", 0) for n in range(7)] == [0, 0, 0, 0, 4, 4, 4]
    prefixes.predict(["w"], named(7, salt=1), 0.0)
    assert prefixes.expected(named(7, salt=1), 0.0) == {"w": 4}


def test_an_older_worker_says_neither_and_is_believed_as_before():
    prefixes, identities = PrefixMap(), named(3)
    prefixes.join("w")
    assert prefixes.snapshot("w", 1, b"".join(identities), True, reach=told_reach(0, 0))
    assert prefixes.held(identities) == {"w": 3}


@pytest.mark.parametrize("told", [0, 8, 24, 1 << 31])
def test_impossible_block_sizes_count_as_none(told):
    assert told_reach(told, 100) == EVERYWHERE
    assert told_reach(32, 100) == Reach(32, 100)


def test_bits_name_the_lacking_ones():
    identities = named(20)
    assert bits_of(identities, frozenset()) == b""
    assert bits_of(identities, frozenset(identities[9:11])) == b"\0\x06"
    assert list(places_of(b"\0\x06")) == [9, 10]
    prefixes = PrefixMap()
    prefixes.join("w")
    assert prefixes.snapshot("w", 1, b"".join(identities[:2]), True, lacking=b"\xff\xff", reach=Reach(16, 16))
    prefixes.check_integrity()
    assert prefixes.held(identities[:2]) == {"w": 0}, "bits of no identity are ignored"


def test_bits_behind_the_last_identity_are_not_even_read():
    class Endless(bytes):
        def __iter__(self):
            raise AssertionError("all bits are read")

    prefixes, identities = PrefixMap(), named(4)
    prefixes.join("w")
    assert prefixes.snapshot("w", 1, b"".join(identities[:2]), True, lacking=Endless(b"\xff"), reach=Reach(16, 16))
    assert prefixes.delta("w", 2, b"".join(identities[2:]), b"", lacking=Endless(b"\xff" * 9))
    assert prefixes.held(identities) == {"w": 0}


def test_identities_that_are_cut_are_a_gap():
    prefixes, identities = PrefixMap(), named(4)
    prefixes.join("w")
    assert prefixes.snapshot("w", 1, b"".join(identities[:2]), True)
    assert not prefixes.delta("w", 2, identities[2][:15], identities[0] + b"x"), "together they are whole"
    assert prefixes.needs_snapshot("w")
    prefixes.check_integrity()


def test_what_is_dropped_for_the_bound_lacks_nothing_any_more():
    prefixes, identities = PrefixMap(max_entries=8), named(12)
    prefixes.join("w")
    bits = bits_of(identities, frozenset(identities))
    assert prefixes.snapshot("w", 1, b"".join(identities), True, lacking=bits, reach=Reach(16, 16))
    assert prefixes.num_dropped
    prefixes.check_integrity()
