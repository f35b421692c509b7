"""The guard's scorer on a tiny model, and the guard beside a real engine's steps."""

import asyncio

import pytest

from twostroke.core.clock import MonotonicClock
from twostroke.core.request import SamplingParams, SequenceKey
from twostroke.decode_worker.policy import combined_policy
from twostroke.engine.core import CoreLimits, EngineCore
from twostroke.engine.guard.idle import IdleGuard
from twostroke.engine.guard.machine import CodecGuard, GuardLimits, Part
from twostroke.engine.link.messages import LoadNews, Source, StepTokens, Stop, Submit
from twostroke.engine.link.thread_link import ThreadLink
from twostroke.engine.loop import Engine
from twostroke.engine.policy import StepLimits
from twostroke.kv.cache.pool import BlockPool
from twostroke.kv.cache.prefix import PrefixCache
from twostroke.model.codec_guard import WIDE, CodecScorer

PROMPT = tuple((7 * place) % 150 + 2 for place in range(100))
TIMEOUT_S = 60


def scorer(runner, codec: str) -> CodecScorer:
    return CodecScorer(runner, codec, runner.spec.kv_spec(WIDE), 128)


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_parts_of_a_sample_score_as_the_whole_of_it(write_tiny, make_runner, kernels: str) -> None:
    it = scorer(make_runner(write_tiny({}), kv_dtype="int8_channel", kernels=kernels), "int8_channel")
    whole = it.score(Part(PROMPT, 0, 68))
    assert whole.num_rows == 32
    assert whole.total > 0
    it.score(Part(tuple(reversed(PROMPT)), 0, 68))  # another sample in between
    parts = [it.score(Part(PROMPT[:end], start, 68)) for start, end in ((0, 64), (64, 70), (70, 100))]
    assert [part.num_rows for part in parts] == [0, 2, 30]
    assert sum(part.total for part in parts) == pytest.approx(whole.total, rel=1e-9)


def test_the_wide_codec_does_not_diverge_from_itself_and_a_coarse_one_does_more(write_tiny, make_runner) -> None:
    found = {}
    for codec in ("bfloat16", "int8", "fp8", "fp8_e5m2"):
        found[codec] = scorer(make_runner(write_tiny({}), kv_dtype=codec), codec).score(Part(PROMPT, 0, 68)).total
    assert found["bfloat16"] == 0
    assert 0 < found["int8"] < found["fp8"] < found["fp8_e5m2"]


@pytest.mark.parametrize(("bound", "exceeded"), [(1e-12, 1), (50.0, 0)])
async def test_an_engine_scores_sampled_prompts_when_it_is_idle(write_tiny, make_runner, bound, exceeded) -> None:
    runner = make_runner(write_tiny({}), kv_dtype="int8")
    limits = GuardLimits(bound, sampled_share=1.0, max_tokens=128, idle_s=0.0, busy_share=1.0)
    guard = IdleGuard(CodecGuard(limits, MonotonicClock().now_s()), scorer(runner, "int8"), MonotonicClock())
    told = {}
    for name, watched in (("plain", None), ("guarded", guard)):
        link, pool = ThreadLink(), BlockPool(64, 16)
        policy = combined_policy(StepLimits())
        core = EngineCore(CoreLimits(), pool, PrefixCache(pool), policy, eos_ids=[1], key=b"cluster")
        engine = Engine(core, runner, runner.store, link, MonotonicClock(), guard=watched)
        engine.start()
        params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
        # Of an adapter, which the guard does not compute. It is refused: the engine has no room for it.
        adapted = SamplingParams(max_tokens=10_000)
        link.send(Submit(SequenceKey(name, 0), Source.LOCAL, PROMPT, (), b"root", adapted, adapter_slot=1))
        keys = [SequenceKey(f"{name}{i}", 0) for i in range(4)]
        for i, key in enumerate(keys):
            link.send(Submit(key, Source.LOCAL, PROMPT[i:], (), b"root", params))
        tokens: dict[SequenceKey, list[int]] = {key: [] for key in keys}
        counters: dict[str, int] = {}
        async with asyncio.timeout(TIMEOUT_S):
            while min(map(len, tokens.values())) < 8 or (watched and counters.get("kv_guard_scored", 0) < 4):
                for event in await link.receive():
                    if isinstance(event, StepTokens):
                        for news in event.news:
                            tokens[news.key] += news.token_ids
                    if isinstance(event, LoadNews):
                        counters, spreads = dict(event.counters), dict(event.spreads)
        told[name] = list(tokens.values())
        link.send(Stop())
        assert await asyncio.to_thread(engine.join, TIMEOUT_S)
    assert told["plain"] == told["guarded"]
    assert (counters["kv_guard_exceeded"], counters["kv_guard_dropped"]) == (exceeded, 0)
    assert sum(spreads["kv_guard_nats"].counts) == 4
    assert spreads["kv_guard_nats"].total > 0
