"""The core, one thing at a time."""

import numpy as np
import pytest

from twostroke.core.request import FinishReason, SamplingParams, SequenceKey
from twostroke.decode_worker.policy import combined_policy
from twostroke.engine.core import CoreLimits, EngineCore
from twostroke.engine.link.messages import (
    Bind,
    BlocksFetched,
    CacheDelta,
    CancelSequence,
    Ended,
    FetchBlocks,
    KvRead,
    Offered,
    PeerBound,
    PeerNotYet,
    PrefillLocally,
    ReadKv,
    Release,
    Source,
    Stop,
    Submit,
    WriteKv,
)
from twostroke.engine.plan import StepResult
from twostroke.engine.policy import StepLimits
from twostroke.engine.step_times import StepTimes
from twostroke.kv.block import chain
from twostroke.kv.cache.pool import BlockPool
from twostroke.kv.cache.prefix import PrefixCache
from twostroke.kv.section import SectionData
from twostroke.kv.spec import WindowedLayers
from twostroke.kv.windows import first_needed

EOS, KEY, ROOT = 0, b"cluster", b"root"


def small_core(num_blocks: int = 8, **limits) -> EngineCore:
    pool = BlockPool(num_blocks, 16)
    policy = combined_policy(StepLimits(**limits))
    return EngineCore(CoreLimits(), pool, PrefixCache(pool), policy, eos_ids=[EOS], key=KEY)


def local(name: str, length: int = 20, max_tokens: int = 4) -> Submit:
    prompt = tuple(range(3, 3 + length))
    return Submit(SequenceKey(name, 0), Source.LOCAL, prompt, (), ROOT, SamplingParams(max_tokens))


def test_a_cancel_during_a_step_keeps_the_blocks_until_its_end():
    core = small_core()
    core.handle(local("a"), 0.0)
    core.tick(0.0)
    plan = core.plan(0.0)
    free = core.load(0.0).free_blocks
    assert core.handle(CancelSequence(SequenceKey("a", 0)), 0.0) == []
    assert core.load(0.0).free_blocks == free
    out = core.apply(plan, StepResult(plan.step, ((5,),)), 0.0)
    assert [type(item) for item in out] == [Ended, CacheDelta]
    assert out[0].reason is FinishReason.CANCELLED
    assert core.load(0.0).free_blocks == 8


def test_a_sequence_whose_numbers_are_not_finite_ends_with_a_type_and_publishes_nothing():
    core = small_core()
    core.handle(local("a", 40), 0.0)
    core.tick(0.0)
    plan = core.plan(0.0)
    (ended,) = core.apply(plan, StepResult(plan.step, ((),), frozenset({plan.sequences[0].key})), 0.0)
    assert (ended.reason, ended.error_code) == (FinishReason.ERROR, "non_finite_kv")
    assert core.load(0.0).cached_blocks == 0


def test_too_long_says_the_numbers():
    core = small_core(num_blocks=4)
    (ended,) = core.handle(local("a", 60, 30), 0.0)
    assert ended.error_code == "context_length_exceeded"
    assert "90 tokens" in ended.error_message
    assert "6 KV blocks of 16" in ended.error_message


@pytest.mark.parametrize("kind", [Bind, PeerBound, PeerNotYet, Release, CancelSequence])
def test_commands_for_nobody_are_counted(kind):
    core = small_core()
    assert core.handle(kind(SequenceKey("gone", 0)), 0.0) == []
    assert core.counters["command_for_unknown_sequence"] == 1


def test_a_key_can_be_used_again_after_its_end():
    core = small_core()
    core.handle(local("a"), 0.0)
    core.handle(local("a"), 0.0)
    assert core.counters["duplicate_submit"] == 1
    core.handle(CancelSequence(SequenceKey("a", 0)), 0.0)
    assert core.handle(local("a"), 0.0) == []
    assert core.num_live == 1


def test_reads_of_what_is_gone_are_answered():
    core = small_core()
    assert core.handle(ReadKv(SequenceKey("gone", 0), 0, 16), 0.0) == [KvRead(SequenceKey("gone", 0), 0, 16, None)]
    assert core.handle(FetchBlocks(3, (b"x" * 16,), 0, ROOT), 0.0) == [BlocksFetched(3, 0, ())]


def test_offers_are_made_once():
    core = small_core()
    core.handle(Submit(SequenceKey("a", 0), Source.FOR_PEER, (4,) * 20, (), ROOT, SamplingParams(4)), 0.0)
    assert core.tick(0.0) == [Offered(SequenceKey("a", 0), 0)]
    assert core.tick(0.0) == []


def test_what_came_without_a_gap_stays_cached_when_a_bound_sequence_is_released():
    core, key, prompt = small_core(), SequenceKey("a", 0), tuple(range(3, 68))
    names = tuple(chain(KEY, ROOT, prompt[:64]))
    core.handle(Submit(key, Source.PEER, prompt, names, ROOT, SamplingParams(1)), 0.0)
    core.tick(0.0)
    core.handle(Bind(key), 0.0)
    for start in (0, 16, 48):  # the third block is missing
        core.handle(WriteKv(key, start, 16, ()), 0.0)
    out = [*core.handle(Release(key), 0.0), *core.tick(0.0)]
    assert [item.reason for item in out if isinstance(item, Ended)] == [FinishReason.STOP]
    assert [item.stored for item in out if isinstance(item, CacheDelta)] == [names[:2]]
    assert (core.num_live, core.load(0.0).free_blocks, core.load(0.0).cached_blocks) == (0, 8, 2)


def test_stop_ends_everything_and_takes_nothing_in():
    core = small_core()
    core.handle(local("a"), 0.0)
    core.handle(local("b"), 0.0)
    assert [item.reason for item in core.handle(Stop(), 0.0)] == [FinishReason.CANCELLED] * 2
    assert [item.reason for item in core.handle(local("c"), 0.0)] == [FinishReason.CANCELLED]
    assert core.num_live == 0


@pytest.mark.parametrize(("prompt_logprobs", "num_tokens"), [(None, 160), (3, 32)])
def test_a_prompt_whose_logprobs_are_wanted_gets_a_chunk_by_its_own_price(prompt_logprobs, num_tokens):
    core = small_core(num_blocks=64, target_ms=60.0)
    core.handle(local("decoding"), 0.0)
    core.tick(0.0)
    plan = core.plan(0.0)
    core.apply(plan, StepResult(plan.step, ((5,),)), 0.0)
    params = SamplingParams(4, prompt_logprobs=prompt_logprobs)
    prompt = tuple(range(100, 500))
    core.handle(Submit(SequenceKey("long", 0), Source.LOCAL, prompt, (), ROOT, params), 0.0)
    core.tick(0.0)
    core.set_times(StepTimes(20.0, 0.25, 0.0, 0.4))
    decode, chunk = core.plan(0.0).sequences
    assert (decode.num_tokens, chunk.num_tokens) == (1, num_tokens)


# ------------------------------------------------------------------ prefixes under way


def named(name: str, prompt: tuple[int, ...], source: Source = Source.LOCAL) -> Submit:
    identities = tuple(chain(KEY, ROOT, prompt[: len(prompt) // 16 * 16]))
    return Submit(SequenceKey(name, 0), source, prompt, identities, ROOT, SamplingParams(4))


def stepped(core: EngineCore) -> list[tuple[str, int]]:
    """Run one step that ends no sequence; returns whose tokens it computed, and how many."""
    core.tick(0.0)
    plan = core.plan(0.0)
    core.apply(plan, StepResult(plan.step, tuple((5,) if step.samples else () for step in plan.sequences)), 0.0)
    return [(step.key.request_id, step.num_tokens) for step in plan.sequences]


@pytest.mark.parametrize("finds_prefixes", [True, False])
def test_what_another_prompt_computes_is_waited_for_only_if_it_can_be_found(finds_prefixes):
    pool = BlockPool(64, 16)
    prefix = PrefixCache(pool, enabled=finds_prefixes)
    policy = combined_policy(StepLimits(max_batch_tokens=512))
    core = EngineCore(CoreLimits(), pool, prefix, policy, eos_ids=[EOS], key=KEY)
    prompt = tuple(range(3, 203))
    core.handle(named("first", prompt), 0.0)
    core.handle(named("second", prompt), 0.0)
    computed = {name for name, _ in stepped(core)}
    assert computed == ({"first"} if finds_prefixes else {"first", "second"})


def test_a_prompt_waits_for_no_block_that_is_behind_the_one_who_has_it():
    """A block without its windowed layers is of no use to a prompt that ends in it, and nobody computes it again."""
    pool = BlockPool(256, 16)
    windowed = WindowedLayers((0,), 32)
    policy = combined_policy(StepLimits(max_batch_tokens=256))
    prefix = PrefixCache(pool, windowed=windowed)
    core = EngineCore(CoreLimits(), pool, prefix, policy, eos_ids=[EOS], key=KEY)
    prompt = tuple(range(3, 1603))
    key = SequenceKey("long", 0)
    core.handle(named("long", prompt, Source.PEER), 0.0)
    core.tick(0.0)
    core.handle(Bind(key), 0.0)
    first, held = first_needed(windowed, 640), 640
    bare = SectionData("main", "k", 1, 1, 1, 0, 1, 16, np.zeros(0, np.uint8), None, np.zeros(0, np.uint64))
    core.handle(WriteKv(key, 0, first, (bare,)), 0.0)
    core.handle(WriteKv(key, first, held - first, ()), 0.0)
    core.handle(PrefillLocally(key, held, None), 0.0)
    assert stepped(core) == [("long", 256)]
    core.handle(named("short", (*prompt[:64], *range(2000, 2030))), 0.0)
    assert "short" in dict(stepped(core))
