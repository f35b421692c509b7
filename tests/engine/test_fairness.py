"""Short prompts behind long ones, in random crowds: begun within two steps; and the long ones end within their bound.

The promise holds where seats and blocks are there, and while the short prompts that wait leave something of half a
step: beyond that it is a queue of short prompts, not a long one in the way.
"""

from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from twostroke.core.request import SamplingParams, SequenceKey
from twostroke.decode_worker.policy import combined_policy, decode_policy
from twostroke.engine.core import CoreLimits, EngineCore
from twostroke.engine.link.messages import Offered, PeerBound, Source, Submit
from twostroke.engine.plan import StepPlan, StepResult
from twostroke.engine.policy import StepLimits
from twostroke.kv.cache.pool import BlockPool
from twostroke.kv.cache.prefix import PrefixCache
from twostroke.kv.spec import HASH_BLOCK_TOKENS
from twostroke.prefill_worker.policy import prefill_policy

SHORT = 32
CROWDS = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@dataclass
class Prompt:
    key: SequenceKey
    length: int
    came: int  # in which step, counted
    ahead: int  # prompt tokens before it, its own included
    num_ahead: int
    tails: int  # tokens at the ends of long prompts that pass as short ones soon: what is left of them counts
    computed: int = 0
    begun: int | None = None
    done: int | None = None


class Crowd:
    """A core whose steps cost nothing; peers bind at once. Generated tokens decode on beside the prompts."""

    def __init__(self, policy, batch: int, source: Source) -> None:
        pool = BlockPool(6000, 16)
        self.policy = policy(StepLimits(max_num_seqs=256, max_batch_tokens=batch, max_waiting_tokens=1 << 20))
        self.core = EngineCore(CoreLimits(), pool, PrefixCache(pool), self.policy, eos_ids=[], key=b"cluster")
        self.source = source
        self.steps = 0
        self.prompts: dict[SequenceKey, Prompt] = {}
        # Beside decodes; alone there is more.
        self.budget = self.policy.budget(1).prefill_tokens
        self.half = self.budget // 2 - self.budget // 2 % HASH_BLOCK_TOKENS

    def submit(self, length: int, max_tokens: int = 1) -> Prompt:
        waiting = [p for p in self.prompts.values() if p.done is None]
        key = SequenceKey(f"r{len(self.prompts)}", 0)
        ahead = sum(p.length for p in waiting) + length
        bound = max(self.policy.limits.max_batch_tokens // 2, 64)
        left = [p.length - p.computed for p in waiting if p.length > bound]
        tails = sum(min(size, bound) for size in left if size <= bound + 3 * self.budget)
        prompt = self.prompts[key] = Prompt(key, length, self.steps, ahead, len(waiting), tails)
        ids = tuple(len(self.prompts) * 10_000 + place for place in range(length))
        self.core.handle(Submit(key, self.source, ids, (), b"root", SamplingParams(max_tokens)), 0.0)
        return prompt

    def short_backlog(self) -> int:
        budget = self.policy.limits.max_batch_tokens
        short = [p for p in self.prompts.values() if p.done is None and p.length <= max(budget // 2, 64)]
        return sum(p.length for p in short)

    def step(self) -> StepPlan | None:
        for event in self.core.tick(0.0):
            if isinstance(event, Offered):
                self.core.handle(PeerBound(event.key), 0.0)
        plan = self.core.plan(0.0)
        self.steps += 1
        if plan is None:
            return None
        for work in plan.sequences:
            prompt = self.prompts[work.key]
            prompt.begun = self.steps if prompt.begun is None else prompt.begun
            prompt.computed = work.end
            if work.samples and prompt.done is None:
                prompt.done = self.steps
        tokens = tuple((7,) if work.samples else () for work in plan.sequences)
        self.core.apply(plan, StepResult(plan.step, tokens), 0.0)
        return plan

    def steps_at_most(self, prompt: Prompt) -> int:
        """The other half of each step, in order of arrival; two steps more per prompt: to begin, and for its end."""
        return -(-prompt.ahead // (self.budget - self.half)) + 2 * (prompt.num_ahead + 2)


POLICIES = {
    "combined": (combined_policy, Source.LOCAL),
    "decode": (decode_policy, Source.LOCAL),
    "prefill": (prefill_policy, Source.FOR_PEER),
    "combined, for a peer": (combined_policy, Source.FOR_PEER),
}
ARRIVALS = st.lists(
    st.one_of(
        st.tuples(st.just("long"), st.integers(65, 4000)),
        st.tuples(st.just("short"), st.integers(1, SHORT)),
        st.tuples(st.just("short"), st.just(SHORT)),
        st.tuples(st.just("steps"), st.integers(1, 6)),
    ),
    min_size=4,
    max_size=24,
)


@pytest.mark.parametrize("name", POLICIES)
@CROWDS
@given(batch=st.sampled_from([64, 128, 250, 256, 512, 1024]), num_decodes=st.integers(0, 6), arrivals=ARRIVALS)
def test_a_short_prompt_is_begun_within_two_steps_and_a_long_one_ends_within_its_bound(
    name, batch, num_decodes, arrivals
):
    policy, source = POLICIES[name]
    crowd = Crowd(policy, batch, source)
    if source is Source.LOCAL:
        for _ in range(num_decodes):
            crowd.submit(5, max_tokens=10_000)
        while any(p.done is None for p in crowd.prompts.values()):
            crowd.step()
    shorts, offers = [], 0
    for kind, size in [*arrivals, ("steps", 6)]:
        if kind == "steps":
            for _ in range(size):
                crowd.step()
                offers = 0
        elif kind == "long":
            crowd.submit(size)
        elif crowd.short_backlog() + min(size, 16) <= crowd.half and (offers < 1 or source is Source.LOCAL):
            shorts.append(crowd.submit(size))
            offers += 1
    limit = max(crowd.steps_at_most(prompt) + prompt.came for prompt in crowd.prompts.values()) if crowd.prompts else 0
    while any(p.done is None for p in crowd.prompts.values()):
        crowd.step()
        assert crowd.steps <= limit, "somebody starves"
    for prompt in shorts:
        assert prompt.begun - prompt.came <= 2 + -(-prompt.tails // crowd.half), f"{prompt} behind {crowd.prompts}"
    for prompt in crowd.prompts.values():
        assert prompt.done - prompt.came <= crowd.steps_at_most(prompt), f"{prompt} behind {crowd.prompts}"


@pytest.mark.parametrize("name", POLICIES)
def test_a_stream_of_short_prompts_takes_half_of_every_step_and_no_more(name):
    policy, source = POLICIES[name]
    crowd = Crowd(policy, 256, source)
    if source is Source.LOCAL:
        crowd.submit(5, max_tokens=10_000)
        crowd.step()
    long = crowd.submit(4000)
    while long.done is None:
        for _ in range(8):
            crowd.submit(SHORT)
        crowd.step()
        assert crowd.steps < 400
    assert long.done - long.came <= -(-4000 // (crowd.budget - crowd.half)) + 1
