"""What routers are told of a cache, by number: a change that is not told as a change leaves a gap."""

from __future__ import annotations

from twostroke.engine.cache_manager import KvCacheManager
from twostroke.engine.link.messages import CacheDelta, CacheSnapshot
from twostroke.kv.block import BlockIdentity
from twostroke.kv.cache.pool import BlockPool
from twostroke.kv.cache.prefix import PrefixCache

NAMES = [BlockIdentity(bytes([n] * 16)) for n in range(6)]


def test_a_snapshot_after_too_many_changes_is_news_to_whoever_heard_the_last_one() -> None:
    pool = BlockPool(8, 16)
    cache = PrefixCache(pool, max_pending_events=2)
    holdings = KvCacheManager(pool, cache, b"k")
    blocks = pool.take(6)
    cache.publish(NAMES[:1], blocks[:1])
    first = holdings.news()
    assert first == CacheDelta(1, (NAMES[0],), ())
    cache.publish(NAMES[:5], blocks[:5], 1)
    second = holdings.news()
    assert isinstance(second, CacheSnapshot)
    assert (second.sequence, set(second.identities)) == (2, set(NAMES[:5]))
    cache.publish(NAMES, blocks, 5)
    assert holdings.news() == CacheDelta(3, (NAMES[5],), ())
    assert holdings.news() is None
