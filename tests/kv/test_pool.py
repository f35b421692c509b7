"""The block pool: all or nothing, eviction order, generations, and faults that check_integrity must name."""

import pytest

from twostroke.kv.block import BlockId
from twostroke.kv.cache.pool import BlockPool, OutOfBlocks


def test_takes_all_or_nothing():
    pool = BlockPool(4, 16)
    pool.take(3)
    with pytest.raises(OutOfBlocks) as caught:
        pool.take(2)
    assert (caught.value.wanted, caught.value.free) == (2, 1)
    assert pool.num_free == 1
    pool.check_integrity()


def test_gives_the_last_block_of_a_sequence_away_first():
    pool = BlockPool(3, 16)
    blocks = pool.take(3)
    pool.give_back(blocks)
    assert pool.take(3) == blocks[::-1]


def test_evicts_the_least_recently_used_cached_block_after_all_plain_ones():
    pool = BlockPool(4, 16)
    evicted: list[BlockId] = []
    pool.watch_evictions(evicted.append)
    a, b, c, d = pool.take(4)
    pool.mark_cached(a)
    pool.mark_cached(b)
    for block in (a, b, c, d):
        pool.give_back([block])
    pool.retain([a])
    pool.give_back([a])  # used again: now younger than b
    assert pool.num_cached == 2
    assert pool.take(2) == [c, d]
    assert evicted == []
    assert pool.take(2) == [b, a]
    assert evicted == [b, a]
    pool.check_integrity({"one": [a, b, c, d]})


def test_a_block_changes_hands_only_when_it_is_taken():
    pool = BlockPool(1, 16)
    (block,) = pool.take(1)
    first = pool.generation(block)
    pool.retain([block])
    pool.mark_cached(block)
    pool.give_back([block, block])
    pool.retain([block])
    assert pool.generation(block) == first
    pool.give_back([block])
    pool.take(1)
    assert pool.generation(block) == first + 1


def test_counts_balance_with_shared_and_revived_blocks():
    pool = BlockPool(2, 16)
    (block,) = pool.take(1)
    pool.retain([block])
    pool.mark_cached(block)
    pool.give_back([block])
    assert pool.num_live == 1
    pool.give_back([block])
    pool.retain([block])
    assert (pool.allocated_total, pool.freed_total, pool.num_live) == (2, 1, 1)
    pool.check_integrity({"owner": [block]})


def test_nobody_retains_a_free_block_without_contents():
    pool = BlockPool(1, 16)
    blocks = pool.take(1)
    pool.give_back(blocks)
    with pytest.raises(AssertionError, match="holds nothing"):
        pool.retain(blocks)
    with pytest.raises(AssertionError, match="no owner"):
        pool.give_back(blocks)


def test_integrity_names_the_leaked_block_and_its_claimants():
    pool = BlockPool(3, 16)
    a, b = pool.take(2)
    with pytest.raises(AssertionError, match=f"block {b} counts 1 owners but 0 claim it"):
        pool.check_integrity({"request-1": [a]})
    with pytest.raises(AssertionError, match=r"request-1.*request-2"):
        pool.check_integrity({"request-1": [a, b], "request-2": [b]})


@pytest.mark.parametrize("fault", ["owner", "queue", "counter", "list"])
def test_integrity_finds_a_damaged_pool(fault):
    pool = BlockPool(3, 16)
    a, b = pool.take(2)
    pool.mark_cached(a)
    pool.give_back([a])
    pool.check_integrity({"r": [b]})
    if fault == "owner":
        pool._owners[b] = 0
    elif fault == "queue":
        pool._plain[b] = None
    elif fault == "counter":
        pool.freed_total += 1
    else:
        pool._is_cached[a] = 0
    with pytest.raises(AssertionError):
        pool.check_integrity()
