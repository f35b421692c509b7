"""A real core and runner whose steps are taken by hand, and prompts for them."""

import torch

from twostroke.core.request import SequenceKey, TokenLogprobs
from twostroke.decode_worker.policy import combined_policy
from twostroke.engine.core import CoreLimits, EngineCore
from twostroke.engine.link.messages import Ended, Promised, Source, StepTokens, Submit
from twostroke.engine.policy import StepLimits
from twostroke.kv.block import chain
from twostroke.kv.cache.pool import BlockPool
from twostroke.kv.cache.prefix import PrefixCache


class Room:
    """A core and a runner without a thread: steps are taken by hand."""

    def __init__(
        self,
        runner,
        policy=combined_policy,
        num_blocks=64,
        speculation=None,
        *,
        bounds=None,
        caches=True,
        drafter=None,
        **limits,
    ):
        self.runner = runner
        self.drafter = drafter
        self.pool = BlockPool(num_blocks, 16)
        limits = StepLimits(**limits)
        self.core = EngineCore(
            bounds or CoreLimits(),
            self.pool,
            PrefixCache(self.pool, enabled=caches),
            policy(limits),
            eos_ids=[1],
            key=b"cluster",
            speculation=speculation,
        )
        self.tokens: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[TokenLogprobs]] = {}
        self.prompt_logprobs: dict[str, tuple[TokenLogprobs, ...]] = {}
        self.ended: dict[str, Ended] = {}
        self.promised: dict[str, int] = {}

    def send(self, *commands):
        for command in commands:
            self.hear(self.core.handle(command, 0.0))

    def hear(self, events):
        for event in events:
            if isinstance(event, Ended):
                self.ended[event.key.request_id] = event
            elif isinstance(event, Promised):
                self.promised[event.key.request_id] = event.held_tokens
            elif isinstance(event, StepTokens):
                for news in event.news:
                    name = news.key.request_id
                    self.tokens.setdefault(name, []).extend(news.token_ids)
                    self.logprobs.setdefault(name, []).extend(news.logprobs)
                    if news.prompt_logprobs:
                        assert name not in self.prompt_logprobs, "said twice"
                        self.prompt_logprobs[name] = news.prompt_logprobs

    def step(self) -> bool:
        self.hear(self.core.tick(0.0))
        self.guess()
        plan = self.core.plan(0.0)
        if plan is not None:
            self.hear(self.core.apply(plan, self.runner.run(plan), 0.0))
        self.core.check_integrity()
        return plan is not None

    def guess(self):
        """Let the draft model compute what the core asks of it, as engine/loop.py does."""
        work = None if self.drafter is None else self.core.plan_drafts(0.0)
        if work is not None:
            unusable = self.drafter.catch_up(work)
            result = self.drafter.guess(work)
            self.core.take_drafts(work, result._replace(unusable=result.unusable | unusable))
            self.core.check_integrity()

    def run(self, *commands):
        self.send(*commands)
        while self.step():
            pass
        return self


def ids_of(length, seed=1):
    return tuple(torch.randint(3, 160, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def submit(name, prompt, params, source=Source.LOCAL, **more):
    identities = tuple(chain(b"cluster", b"root", prompt[: len(prompt) // 16 * 16]))
    return Submit(SequenceKey(name, 0), source, tuple(prompt), identities, b"root", params, **more)
