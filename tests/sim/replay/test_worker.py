"""The simulated worker beside the production engine core, on one trace and with the same step times."""

import statistics
from pathlib import Path

import pytest

from twostroke.core.request import Role, SamplingParams, SequenceKey
from twostroke.engine.core import CoreLimits, EngineCore
from twostroke.engine.link.messages import Source, Submit
from twostroke.engine.plan import StepPlan, StepResult
from twostroke.engine.step_times import StepTimeModel
from twostroke.kv.block import BlockIdentity
from twostroke.kv.cache.pool import BlockPool
from twostroke.kv.cache.prefix import PrefixCache
from twostroke.sim.replay.clock import VirtualClock
from twostroke.sim.replay.job import Job
from twostroke.sim.replay.spec import policy_of
from twostroke.sim.replay.trace import Ask, read_trace
from twostroke.sim.replay.worker import SimWorker, WorkerFrame
from twostroke.sim.scale.machine import H200_8B

TRACE = read_trace(Path(__file__).parent / "traces" / "mooncake_conversation_200.jsonl")
UNIT = TRACE.block_tokens
POLICY = policy_of(Role.COMBINED, H200_8B)


def asks_of(count: int, rate_per_s: float) -> list[Ask]:
    """Requests with short answers: the production core does work per token."""
    short = [a for a in TRACE.asks if a.prompt_tokens < 20_000][:count]
    return [
        Ask(place / rate_per_s, a.prompt_tokens, min(a.answer_tokens, 40 + place % 7), a.identities)
        for place, a in enumerate(short)
    ]


def production(asks: list[Ask]) -> tuple[list[float], list[float]]:
    """Times of first tokens and of ends, by the production core."""
    pool = BlockPool(H200_8B.kv_capacity_tokens // 16, 16)
    core = EngineCore(CoreLimits(), pool, PrefixCache(pool), POLICY, eos_ids=[], key=b"cluster")
    pace = StepTimeModel()
    first, end, now_s, place = [0.0] * len(asks), [0.0] * len(asks), 0.0, 0
    while place < len(asks) or core.num_live:
        while place < len(asks) and asks[place].arrived_s <= now_s:
            ask = asks[place]
            identities = tuple(BlockIdentity(i[:14] + bytes([n, 1])) for i in ask.identities for n in range(UNIT // 16))
            key, params = SequenceKey(str(place), 0), SamplingParams(max_tokens=ask.answer_tokens)
            core.handle(Submit(key, Source.LOCAL, (7,) * ask.prompt_tokens, identities, b"root", params), now_s)
            place += 1
        core.tick(now_s)
        plan = core.plan(now_s)
        core.drain()
        if plan is None:
            now_s = asks[place].arrived_s
            continue
        took_s = step_s(plan)
        pace.observe(plan, took_s * 1e3)
        core.set_times(pace.times)
        now_s += took_s
        for step in plan.sequences:
            number = int(step.key.request_id)
            if step.samples and not step.num_generated:
                first[number] = now_s
            end[number] = now_s
        core.apply(plan, StepResult(plan.step, tuple((9,) if s.samples else () for s in plan.sequences)), now_s)
    return first, end


def step_s(plan: StepPlan) -> float:
    prompts = [s for s in plan.sequences if not s.num_generated]
    decodes = [s for s in plan.sequences if s.num_generated]
    took_s = sum(H200_8B.prefill_s(s.num_tokens, s.start) for s in prompts)
    return took_s + (H200_8B.step_s(len(decodes), sum(s.start for s in decodes)) if decodes else 0.0)


def simulated(asks: list[Ask]) -> tuple[list[float], list[float]]:
    clock, first, end = VirtualClock(), [0.0] * len(asks), [0.0] * len(asks)

    def tell(_, report):
        for job in report.first:
            first[job.rank] = clock.now_s
        for job in report.ended:
            end[job.rank] = clock.now_s

    worker = SimWorker(WorkerFrame("w", Role.COMBINED, H200_8B, POLICY, UNIT, clock, lambda _: 0.0), tell)
    for place, ask in enumerate(asks):
        job = Job(str(place), place, ask.prompt_tokens, ask.answer_tokens, ask.identities, worker)
        worker.coming.append(job)
        clock.at(ask.arrived_s, lambda _, job=job: worker.submit(job))
    clock.run(lambda: all(end))
    worker.cache.pool.check_integrity()
    worker.cache.prefix.check_integrity()
    assert worker.cache.pool.num_live == 0
    return first, end


@pytest.mark.parametrize("rate_per_s", [0.7, 1.5])
def test_the_coarse_worker_agrees_with_the_production_core(rate_per_s: float):
    asks = asks_of(60, rate_per_s)
    real_first, real_end = production(asks)
    first, end = simulated(asks)
    ttft = [f - a.arrived_s for f, a in zip(first, asks, strict=True)]
    real_ttft = [f - a.arrived_s for f, a in zip(real_first, asks, strict=True)]
    assert min(ttft) > 0
    assert statistics.fmean(ttft) == pytest.approx(statistics.fmean(real_ttft), rel=0.03)
    assert statistics.median(ttft) == pytest.approx(statistics.median(real_ttft), rel=0.05)
    assert statistics.fmean(end) == pytest.approx(statistics.fmean(real_end), rel=0.02)
