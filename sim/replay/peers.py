"""Routing policies of other projects, stated again from their documents and formulas; no code of theirs.

Each gets better facts than its own router has: the prefix map follows the workers' real caches, where some of them
estimate what a worker holds from what they sent it. Not stated again: their queues, retries and random temperatures,
which are off by default.
"""

from __future__ import annotations

import random

from ...router.routing.known_worker import Worker
from .policies import ByStage, Question, Stage, load_of

SGLANG_MATCH_RATE = 0.3
SGLANG_ABSOLUTE, SGLANG_RELATIVE = 64, 1.5
DYNAMO_BLOCK_TOKENS = 16
LLMD_PREFIX, LLMD_QUEUE, LLMD_KV = 3.0, 2.0, 2.0


class SglangCacheAware(ByStage):
    """SGLang's `cache_aware`: affinity while the loads are balanced, else the least loaded worker.

    Imbalanced: max - min > 64 and max > 1.5 * min, in requests under way. Balanced: the worker with the longest prefix
    if more than 0.3 of the prompt matches. With disaggregation this chooses the prefill worker, and the decode worker
    is the least loaded one. Source: SGLang Model Gateway, the header of its policy `cache_aware` and its options. One
    difference: where too little matches, that router takes the worker with the smallest tree of what it sent; here it
    is the least loaded one, because the tree is an estimate of a cache that is known here.
    """

    name = "sglang"

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    def pick(self, question: Question) -> Worker:
        """By prefix or by load."""
        loads = [load_of(w) for w in question.workers]
        most, least = max(loads), min(loads)
        if question.stage is not Stage.DECODE and not (
            most - least > SGLANG_ABSOLUTE and most > SGLANG_RELATIVE * least
        ):
            best = max(question.workers, key=lambda w: (question.held(w), -load_of(w)))
            if question.held(best) > SGLANG_MATCH_RATE * question.request.prompt_tokens:
                return best
        return min(question.workers, key=lambda w: (load_of(w), self._chance.random()))


class DynamoKv(ByStage):
    """Dynamo's KV router: lowest `max(raw_prefill_blocks - overlap, 0) + decode_blocks`.

    raw_prefill_blocks: prompt tokens to compute on the worker, this request's included, in blocks; overlap: blocks of
    this prompt that it holds; decode_blocks: blocks of the sequences under way there, this one included. Source: NVIDIA
    Dynamo documentation, "KV Router: cost function" and "Router Guide", overlap weight 1, temperature 0. With
    disaggregation the prefill router counts no decode blocks, and the decode router no overlap.
    """

    name = "dynamo"

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    def pick(self, question: Question) -> Worker:
        """The lowest cost; equal ones at random."""
        return min(question.workers, key=lambda w: (self.cost(question, w), self._chance.random()))

    @staticmethod
    def cost(question: Question, worker: Worker) -> float:
        """Blocks, in the words of the formula."""
        under_way = worker.in_flight.values()
        prompt = question.request.prompt_tokens
        prefill = decode = 0.0
        if question.stage is not Stage.DECODE:
            raw = (sum(d.prefill_tokens for d in under_way) + prompt) / DYNAMO_BLOCK_TOKENS
            prefill = max(raw - question.held(worker) // DYNAMO_BLOCK_TOKENS, 0.0)
        if question.stage is not Stage.PREFILL:
            # The answers' lengths are unknown to that router: it counts the blocks of prompts, and those that grow.
            decode = (prompt + worker.load.running_context_tokens + _not_reported(worker)) / DYNAMO_BLOCK_TOKENS
        return prefill + decode


def _not_reported(worker: Worker) -> int:
    """Prompt tokens of dispatches that the last load report cannot contain."""
    since_s = -1.0 if worker.load_s is None else worker.load_s
    return sum(max(0, d.context_tokens - ANSWER_TOKENS) for d in worker.in_flight.values() if d.at_s > since_s)


ANSWER_TOKENS = 1024  # in `Dispatched.context_tokens` beside the prompt: the production estimate of an answer


class LlmdWeighted(ByStage):
    """llm-d: the highest weighted sum of scores in [0, 1]: prefix 3, queue 2, KV utilisation 2.

    prefix: share of the prompt that the worker holds; queue: (longest - own) / (longest - shortest) queue of waiting
    requests, 1 where all are equal; KV: 1 - share of its blocks in use. Source: llm-d inference scheduler and Gateway
    API Inference Extension documentation, "Scorers" and the default configuration's weights. Queue and KV are those of
    the last load report, as there.
    """

    name = "llm-d"

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    def pick(self, question: Question) -> Worker:
        """The highest score; equal ones at random."""
        return max(question.workers, key=lambda w: (self.score(question, w), self._chance.random()))

    @staticmethod
    def score(question: Question, worker: Worker) -> float:
        """Weighted sum."""
        queues = [w.load.waiting for w in question.workers]
        longest, shortest = max(queues), min(queues)
        queue = 1.0 if longest == shortest else (longest - worker.load.waiting) / (longest - shortest)
        total = worker.load.total_blocks
        kv = 1.0 - (total - worker.load.free_blocks) / total if total else 1.0
        prefix = question.held(worker) / question.request.prompt_tokens
        return LLMD_PREFIX * prefix + LLMD_QUEUE * queue + LLMD_KV * kv
