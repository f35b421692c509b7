"""The engine's beat: what waits counts as what is expected to be computed."""

from twostroke.core.request import SamplingParams, SequenceKey
from twostroke.decode_worker.policy import combined_policy
from twostroke.engine.core import CoreLimits, EngineCore
from twostroke.engine.link.messages import Source, Submit
from twostroke.engine.plan import StepPlan, StepResult
from twostroke.engine.policy import StepLimits
from twostroke.kv.block import BlockIdentity
from twostroke.kv.cache.pool import BlockPool
from twostroke.kv.cache.prefix import PrefixCache


def core_of() -> EngineCore:
    pool = BlockPool(64, 16)
    policy = combined_policy(StepLimits(max_batch_tokens=64, max_num_seqs=4))
    return EngineCore(CoreLimits(), pool, PrefixCache(pool), policy, eos_ids=[0], key=b"cluster")


def submit(name: str, length: int) -> Submit:
    identities = tuple(BlockIdentity(bytes([place + 1]) * 16) for place in range(length // 16))
    return Submit(SequenceKey(name, 0), Source.LOCAL, (5,) * length, identities, b"root", SamplingParams(4))


def step(core: EngineCore) -> StepPlan | None:
    core.tick(0.0)
    plan = core.plan(0.0)
    if plan is not None:
        core.apply(plan, StepResult(plan.step, tuple((7,) if s.samples else () for s in plan.sequences)), 0.0)
    return plan


def test_queued_tokens_and_pairs_follow_the_chunks():
    core = core_of()
    core.handle(submit("a", 160), 0.0)
    load = core.load(0.0)
    assert (load.queued_prefill_tokens, load.queued_prefill_pairs) == (160, 160 * 160 / 2)
    step(core)  # 64 of them
    load = core.load(0.0)
    assert (load.queued_prefill_tokens, load.queued_prefill_pairs) == (96, 96 * (64 + 96 / 2))


def test_a_cached_prefix_of_a_waiting_prompt_is_no_work():
    core = core_of()
    core.handle(submit("a", 160), 0.0)
    while core.num_live:
        step(core)
    core.handle(submit("b", 176), 0.0)  # ten of its eleven blocks are cached
    load = core.load(0.0)
    assert (load.queued_prefill_tokens, load.queued_prefill_pairs) == (16, 16 * (160 + 16 / 2))
