"""Steps of a whole runner without a scheduler, for a rank that is a thread or a process."""

from collections.abc import Sequence
from pathlib import Path

import torch

from twostroke.checkpoint.shards import Shard
from twostroke.core.request import SamplingParams, SequenceKey
from twostroke.engine.plan import SequenceStep, StepPlan, StepResult
from twostroke.kv.block import BlockId
from twostroke.model.loader import RunnerOptions, load_runner
from twostroke.model.parallel.torch_collectives import join_gloo
from twostroke.model.resolved import ResolvedModel
from twostroke.model.runner import Runner

BLOCKS_EACH = 8  # of 16 tokens, per sequence


def run(runner: Runner, prompts: Sequence[Sequence[int]], params: SamplingParams, count: int) -> list[StepResult]:
    """All prompts in one step, then `count - 1` steps of one token each."""
    texts, computed = [list(prompt) for prompt in prompts], [0] * len(prompts)
    results = []
    for number in range(count):
        steps = []
        for i, (text, start) in enumerate(zip(texts, computed, strict=True)):
            table = tuple(BlockId(BLOCKS_EACH * i + place) for place in range(BLOCKS_EACH))
            num_prompt = len(prompts[i])
            targets = tuple(text[1:num_prompt]) if params.prompt_logprobs is not None and not start else ()
            ids, is_prompt = tuple(text[start:]), len(text) == num_prompt
            step = SequenceStep(SequenceKey(str(i), 0), start, ids, table, (1,) * len(table), True, params, number)
            steps.append(step._replace(seals_tail=is_prompt, targets=targets))
            computed[i] = len(text)
        results.append(runner.run(StepPlan(number, tuple(steps))))
        for i, tokens in enumerate(results[-1].tokens):
            texts[i] += tokens
    return results


def run_by_gloo(
    rendezvous: Path,
    shard: Shard,
    model: ResolvedModel,
    options: RunnerOptions,
    work: tuple[Sequence[Sequence[int]], SamplingParams, int],
) -> list[StepResult]:
    """`run` on a rank that is a process of its own."""
    from torch.distributed import FileStore

    torch.set_num_threads(1)
    ranks = join_gloo(FileStore(str(rendezvous), shard.size), shard, timeout_s=120)
    return run(load_runner(model, options, ranks), *work)
