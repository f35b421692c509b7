"""The fall-back of a worker's cache to a wider codec: the size of its pool, and the way there."""

import pytest

from twostroke.engine.guard.fallback import CacheBytes, CodecChange, Stage, why_not, wider_pool
from twostroke.kv.sizing import PoolSize

MIB = 1 << 20
POOL = PoolSize(100, 16, 100 * 16 * 136, "as decided", num_swap_blocks=40)
INT8, WIDE = CacheBytes("int8", 136), CacheBytes("bfloat16", 256)


def test_the_wider_pool_takes_no_more_bytes_than_the_one_before():
    pool = wider_pool(POOL, INT8, WIDE)
    assert pool.num_blocks == 100 * 136 // 256 == 53
    assert pool.pool_bytes == 53 * 16 * 256 <= POOL.pool_bytes
    assert pool.num_swap_blocks == 40 * 136 // 256 == 21
    assert (
        "0.2 MiB of the pool in int8 ÷ (256 bytes/token in bfloat16 × 16 tokens/block) = 53 blocks" in pool.arithmetic
    )


def test_the_blocks_of_a_draft_model_count_on_both_sides_and_are_not_swapped():
    pool = wider_pool(
        PoolSize(100, 16, 100 * 16 * 200, "", num_swap_blocks=40), CacheBytes("int8", 136, 64), CacheBytes("b", 256, 64)
    )
    assert pool.num_blocks == 100 * 200 // 320
    assert pool.pool_bytes == pool.num_blocks * 16 * 320
    assert pool.num_swap_blocks == 21


def test_a_codec_that_is_no_wider_gets_no_more_blocks():
    pool = wider_pool(POOL, INT8, CacheBytes("int4", 72))
    assert (pool.num_blocks, pool.pool_bytes, pool.num_swap_blocks) == (100, 100 * 16 * 72, 40)


@pytest.mark.parametrize(("context", "fits"), [(53 * 16, True), (53 * 16 + 1, False)])
def test_a_pool_that_cannot_hold_the_longest_context_is_refused_with_the_arithmetic(context, fits):
    why = why_not(wider_pool(POOL, INT8, WIDE), context)
    assert not why if fits else ("848 tokens" in why and "53 blocks" in why and "model.max_model_len" in why)


def test_a_change_passes_its_stages_once():
    change = CodecChange("int8", "bfloat16")
    assert (change.changes_to, change.fell_back_from, change.is_under_way) == ("", "", False)
    assert change.exceeded(is_ending=False)
    assert not change.exceeded(is_ending=False)  # the verdict is told with every beat
    assert (change.stage, change.changes_to) == (Stage.DRAINING, "bfloat16")
    change.emptied()
    assert (change.builds, change.fell_back_from, change.changes_to) == ("bfloat16", "int8", "bfloat16")
    change.built()
    assert (change.stage, change.fell_back_from, change.changes_to) == (Stage.CHANGED, "int8", "")
    assert not change.exceeded(is_ending=False)


def test_a_worker_that_ends_does_not_begin_and_may_later():
    change = CodecChange("int8", "bfloat16")
    assert not change.exceeded(is_ending=True)
    assert change.stage is Stage.WATCHING
    assert change.exceeded(is_ending=False)  # its drain was undone


def test_where_the_wider_pool_fails_the_codec_before_comes_back_and_then_nothing():
    change = CodecChange("int8", "bfloat16")
    change.exceeded(is_ending=False)
    change.emptied()
    assert change.failed("no memory")
    assert (change.builds, change.fell_back_from, change.is_under_way) == ("int8", "", True)
    change.built()
    assert (change.stage, change.reason, change.changes_to) == (Stage.KEPT, "no memory", "")
    assert not change.exceeded(is_ending=False)


def test_a_worker_that_can_make_neither_pool_ends():
    change = CodecChange("int8", "bfloat16")
    change.exceeded(is_ending=False)
    change.emptied()
    assert change.failed("no memory")
    assert not change.failed("still none")
    assert (change.stage, change.is_under_way, change.fell_back_from) == (Stage.LOST, False, "")
