"""The prefix cache against a naive model: a list of owned chains and a dict of what was published."""

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from twostroke.kv.block import BlockId, BlockIdentity, chain
from twostroke.kv.cache.pool import BlockPool, OutOfBlocks
from twostroke.kv.cache.prefix import PrefixCache
from twostroke.kv.spec import WindowedLayers

KEY = b"test key"


def identities_of(letters: str) -> list[BlockIdentity]:
    """One hash block of 16 equal tokens per letter."""
    return chain(KEY, b"root", [ord(letter) for letter in letters for _ in range(16)])


def cached(pool: BlockPool, cache: PrefixCache, letters: str) -> list[BlockId]:
    """Take, publish and give back the blocks of a sequence."""
    blocks = cache.publish(identities_of(letters), pool.take(len(letters) * 16 // pool.block_tokens))
    pool.give_back(blocks)
    return blocks


def test_finds_the_longest_held_prefix_and_revives_it():
    pool = BlockPool(8, 16)
    cache = PrefixCache(pool)
    blocks = cached(pool, cache, "abcd")
    assert cache.match(identities_of("abxd")) == 2
    assert cache.acquire(identities_of("abcz")) == blocks[:3]
    assert pool.num_live == 3
    assert [cache.locate(identity) for identity in identities_of("abcd")] == blocks
    pool.check_integrity({"r": blocks[:3]})


def test_match_changes_nothing():
    pool = BlockPool(4, 16)
    cache = PrefixCache(pool)
    old, young = cached(pool, cache, "a"), cached(pool, cache, "b")
    assert cache.match(identities_of("a")) == 1
    assert pool.take(4)[2:] == old + young


def test_a_physical_block_is_findable_only_when_full():
    pool = BlockPool(4, 64)
    cache = PrefixCache(pool)
    blocks = cache.publish(identities_of("abcdefg"), pool.take(2))
    assert cache.match(identities_of("abcdefg")) == 4
    assert cache.match(identities_of("abc")) == 0
    assert cache.locate(identities_of("abc")[2]) == blocks[0]
    assert cache.locate(identities_of("abcde")[4]) is None


def lacking_cache(pool: BlockPool, window: int) -> PrefixCache:
    return PrefixCache(pool, windowed=WindowedLayers((0,), window))


@pytest.mark.parametrize("span", [16, 32])
def test_a_match_ends_where_every_layer_has_what_is_seen_from_there_on(span: int):
    pool = BlockPool(32, span)
    cache = lacking_cache(pool, 20)
    names = identities_of("abcdefghijklmnop")  # 256 tokens
    blocks = cache.publish(names, pool.take(256 // span), lacking=range(192 // span))
    assert cache.match(names) == 16
    assert cache.acquire(names) == blocks
    assert cache.match(identities_of("abcdefghijklmnopq")) == 16
    assert cache.match(names[:15]) == 0, "its window begins before token 192"
    assert cache.acquire(names[:15]) == []
    assert cache.match(identities_of("abcdefghijklmno")) == 0
    assert [cache.lacks_windows(block) for block in blocks] == [True] * (192 // span) + [False] * (64 // span)
    cache.check_integrity()


def test_a_start_before_a_gap_of_windows_is_found():
    pool = BlockPool(32, 16)
    cache = lacking_cache(pool, 20)
    names = identities_of("abcdefghijklmnop")
    cache.publish(names, pool.take(16), lacking=range(8, 14))
    assert cache.match(names) == 8
    assert cache.match(names[:7]) == 7


def test_a_second_copy_without_windows_changes_nothing():
    pool = BlockPool(8, 16)
    cache = lacking_cache(pool, 20)
    names = identities_of("ab")
    first = cache.publish(names, pool.take(2), lacking=[0, 1])
    assert cache.publish(names, pool.take(2), lacking=[0, 1]) == first
    assert all(cache.lacks_windows(block) for block in first)
    assert cache.match(names) == 0


def test_a_copy_with_windows_takes_the_place_of_one_without():
    pool = BlockPool(32, 32)
    cache = lacking_cache(pool, 20)
    names = identities_of("abcdefgh")
    first = cache.publish(names, pool.take(4), lacking=range(4))
    assert cache.match(names) == 0
    mine = pool.take(4)
    assert cache.publish(names[:6], list(mine[:3])) == mine[:3], "a block that lacks layers replaces none that has them"
    assert cache.match(names) == 6
    assert [cache.locate(name) for name in names[::2]] == [*mine[:3], first[3]]
    assert not pool.is_cached(first[0])
    assert cache.drain_events() == (names, [])
    pool.give_back(first)
    cache.check_integrity()
    pool.check_integrity({"mine": mine})
    again = pool.take(2)
    assert cache.publish(names[:4], list(again), lacking=[0, 1]) == mine[:2], "and is replaced by it"
    cache.drop(mine[0])
    assert set(cache.drain_events()[1]) == set(names)
    assert not any(cache.lacks_windows(block) for block in (*first, *mine))


def test_a_finished_copy_is_swapped_for_the_canonical_block():
    pool = BlockPool(6, 16)
    cache = PrefixCache(pool)
    first = cache.publish(identities_of("abc"), pool.take(3))
    mine = pool.take(3)
    second = cache.publish(identities_of("abd"), mine)
    assert second == [*first[:2], mine[2]]
    assert cache.swapped_total == 2
    assert cache.publish(identities_of("abd"), second) == second
    pool.check_integrity({"first": first, "second": second})
    cache.check_integrity()


def test_leaves_are_evicted_before_their_parents():
    pool = BlockPool(4, 16)
    cache = PrefixCache(pool)
    cached(pool, cache, "abcd")
    for held in (3, 2, 1, 0):
        pool.take(1)
        assert cache.match(identities_of("abcd")) == held


def test_dropping_a_block_drops_what_continues_it():
    pool = BlockPool(6, 16)
    cache = PrefixCache(pool)
    blocks = cached(pool, cache, "abc")
    cached(pool, cache, "abd")
    cache.drop(blocks[1])
    assert cache.match(identities_of("abc")) == cache.match(identities_of("abd")) == 1
    assert pool.num_cached == 1
    cache.check_integrity()


def test_a_parent_evicted_under_a_live_child_takes_the_child_out_of_the_index():
    pool = BlockPool(2, 16)
    cache = PrefixCache(pool)
    parent, child = cache.publish(identities_of("ab"), pool.take(2))
    pool.give_back([parent])
    assert pool.take(1) == [parent]
    assert len(cache) == 0
    pool.give_back([child])
    assert pool.num_cached == 0
    cache.check_integrity()


def test_publishing_after_clear_restores_the_parents():
    pool = BlockPool(6, 16)
    cache = PrefixCache(pool)
    mine = cache.publish(identities_of("ab"), pool.take(3))
    cache.clear()
    assert cache.publish(identities_of("abc"), mine, start=2) == mine
    assert cache.match(identities_of("abc")) == 3
    cache.check_integrity()


def test_events_are_the_net_change_with_parents_first():
    pool = BlockPool(4, 32)
    cache = PrefixCache(pool)
    cached(pool, cache, "abcd")
    cached(pool, cache, "abef")
    abcd, abef = identities_of("abcd"), identities_of("abef")
    assert cache.drain_events() == ([*abcd, *abef[2:]], [])
    assert cache.drain_events() == ([], [])
    # Two blocks share the hash block "a": it stays until both are gone.
    pool.retain(blocks := cached(pool, cache, "axyz")[:1])
    cache.drop(cache.acquire(abcd)[0])
    stored, removed = cache.drain_events()
    assert stored == identities_of("axyz")[1:]
    assert set(removed) == {abcd[1], *abcd[2:], *abef[2:]}
    assert cache.locate(abcd[0]) == blocks[0]
    assert cache.snapshot() == identities_of("axyz")


def test_too_many_events_ask_for_a_resync():
    pool = BlockPool(8, 16)
    cache = PrefixCache(pool, max_pending_events=2)
    cached(pool, cache, "abc")
    assert cache.resync_needed
    assert cache.drain_events() == ([], [])
    assert not cache.resync_needed
    assert cache.snapshot() == identities_of("abc")
    cached(pool, cache, "d")
    assert cache.drain_events() == (identities_of("d"), [])


def test_integrity_finds_an_orphan():
    pool = BlockPool(4, 16)
    cache = PrefixCache(pool)
    blocks = cached(pool, cache, "ab")
    cache._remove(cache._entry_by_block[blocks[0]])
    with pytest.raises(AssertionError, match="outlived its parent"):
        cache.check_integrity()


class PoolAndPrefix(RuleBasedStateMachine):
    """Small pools, few letters: evictions and swaps happen all the time."""

    span = 1

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(7, 16 * self.span)
        self.cache = PrefixCache(self.pool)
        self.sequences: dict[str, tuple[str, list[BlockId]]] = {}
        self.contents: dict[tuple[BlockId, int], str] = {}  # (block, generation) to the letters up to its end
        self.heard: set[BlockIdentity] = set()
        self.count = 0

    def held(self, letters: str) -> int:
        """What the cache must say, found the slow way: one identity after the other."""
        length = 0
        identities = identities_of(letters)
        while (length + 1) * self.span <= len(letters):
            if self.cache.locate(identities[(length + 1) * self.span - 1]) is None:
                break
            length += 1
        return length

    @rule(letters=st.text("ab", min_size=1, max_size=9))
    def start(self, letters):
        identities = identities_of(letters)
        expected = self.held(letters)
        assert self.cache.match(identities) == expected * self.span
        blocks = self.cache.acquire(identities)
        assert len(blocks) == expected
        for i, block in enumerate(blocks):
            written = self.contents[block, self.pool.generation(block)]
            assert written == letters[: (i + 1) * self.span], "another prefix's block was served"
        free = self.pool.num_free
        missing = -(-len(letters) // self.span) - len(blocks)
        try:
            fresh = self.pool.take(missing)
        except OutOfBlocks:
            assert missing > free
            self.pool.give_back(blocks)
            return
        assert missing <= free
        for i, block in enumerate(fresh, start=len(blocks)):
            assert all(block not in owned for _, owned in self.sequences.values()), "a live block was handed out"
            self.contents[block, self.pool.generation(block)] = letters[: (i + 1) * self.span]
        self.count += 1
        self.sequences[f"s{self.count}"] = (letters, blocks + fresh)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def publish(self, data):
        name = data.draw(st.sampled_from(sorted(self.sequences)))
        letters, blocks = self.sequences[name]
        start = data.draw(st.integers(0, len(blocks)))
        swapped = self.cache.publish(identities_of(letters), blocks, start)
        full = len(letters) // self.span
        assert swapped[full:] == blocks[full:]
        for i, block in enumerate(swapped[:full]):
            assert self.contents[block, self.pool.generation(block)] == letters[: (i + 1) * self.span]
        if start == 0:
            assert self.cache.match(identities_of(letters)) == full * self.span
        self.sequences[name] = (letters, swapped)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def finish(self, data):
        name = data.draw(st.sampled_from(sorted(self.sequences)))
        self.pool.give_back(self.sequences.pop(name)[1])

    @rule(data=st.data())
    def damage(self, data):
        self.cache.drop(BlockId(data.draw(st.integers(0, self.pool.num_blocks - 1))))

    @rule()
    def clear(self):
        self.cache.clear()
        assert self.cache.snapshot() == []

    @rule()
    def listen(self):
        stored, removed = self.cache.drain_events()
        assert not set(stored) & self.heard
        assert set(removed) <= self.heard
        self.heard = (self.heard | set(stored)) - set(removed)
        assert self.heard == set(self.cache.snapshot())

    @invariant()
    def is_whole(self):
        self.pool.check_integrity({name: blocks for name, (_, blocks) in self.sequences.items()})
        self.cache.check_integrity()

    def teardown(self):
        for _, blocks in self.sequences.values():
            self.pool.give_back(blocks)
        self.pool.check_integrity({})
        assert self.pool.num_live == 0
        self.pool.take(self.pool.num_blocks)
        assert len(self.cache) == 0


class PoolAndPrefix32(PoolAndPrefix):
    span = 2


quick = settings(max_examples=80, stateful_step_count=30, deadline=None, derandomize=True)
TestPoolAndPrefix = PoolAndPrefix.TestCase
TestPoolAndPrefix.settings = quick
TestPoolAndPrefix32 = PoolAndPrefix32.TestCase
TestPoolAndPrefix32.settings = quick
