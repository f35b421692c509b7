"""How long sampled blocks stay, and when they are used again."""

from twostroke.core.buckets import RESIDENCY_S
from twostroke.core.tally import Spread
from twostroke.kv.cache.residency import MAX_WATCHED, Residency


def counted(residency: Residency) -> dict[str, tuple[int, float]]:
    return {name: (sum(spread.counts), spread.total) for name, spread in residency.spreads}


def test_a_block_that_is_found_and_then_evicted_leaves_all_three():
    residency = Residency(8)
    residency.taken([3])
    residency.now_s = 1.0
    residency.published([3])
    residency.now_s = 4.0
    residency.found([3])
    residency.now_s = 9.0
    residency.taken([3])
    assert counted(residency) == {
        "block_lifetime_s": (1, 9.0),
        "block_idle_s": (1, 5.0),
        "block_reuse_gap_s": (1, 4.0),
    }


def test_a_block_that_nobody_could_find_was_not_evicted():
    residency = Residency(8)
    residency.taken([3])
    residency.now_s = 9.0
    residency.taken([3])
    residency.published([3])
    residency.now_s = 11.0
    residency.taken([3])
    assert counted(residency)["block_lifetime_s"] == (1, 2.0)


def test_a_sample_of_a_large_pool_is_watched():
    residency = Residency(100_000)
    blocks = list(range(100_000))
    residency.taken(blocks)
    residency.published(blocks)
    residency.now_s = 0.5
    residency.taken(blocks)
    watched, total = counted(residency)["block_lifetime_s"]
    assert MAX_WATCHED // 2 < watched <= MAX_WATCHED
    assert total == watched * 0.5
    spread = dict(residency.spreads)["block_lifetime_s"]
    assert spread == Spread(tuple(watched * (bound == 0.5) for bound in (*RESIDENCY_S, None)), total)


def test_the_sample_is_spread_over_the_pool():
    residency = Residency(1000, max_watched=10)
    for start in range(0, 1000, 100):
        residency.now_s = 0.0
        residency.taken(range(start, start + 100))
        residency.published(range(start, start + 100))
        residency.now_s = 2.0
        residency.taken(range(start, start + 100))
        assert counted(residency)["block_lifetime_s"] == (1 + start // 100, 2.0 * (1 + start // 100))
