"""A worker with swap space and a pool that is too small for its requests: the same text, and it says what it did."""

from twostroke.core.request import Role
from twostroke.kv.config import CacheConfig


async def _texts(hand, make_prompt) -> list[str]:
    sampling = {"max_tokens": 70, "ignore_eos": True}
    answers = [await hand.submit(f"r{i}", make_prompt(20 + 3 * i, i), sampling=sampling) for i in range(4)]
    return [(await answer.ended()).text for answer in answers]


async def test_requests_that_do_not_fit_together_are_swapped(start_worker, router_of, make_prompt, all_free):
    large = await start_worker(Role.COMBINED)
    small = await start_worker(Role.COMBINED, cache=CacheConfig(tokens=192, swap_space=0.001))
    expected = await _texts(await router_of(large), make_prompt)
    assert await _texts(await router_of(small), make_prompt) == expected
    await all_free(small)
    counters = dict(small.dispatcher.last_load.counters)
    assert counters["preemptions_swap"] > 0
    bytes_per_token = 2 * 2 * 2 * 17  # layers, K and V, heads, e4m3 and its exponent
    assert counters["swap_blocks"] == small.settings.cache.swap_bytes // (16 * bytes_per_token)
