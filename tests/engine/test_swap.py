"""Preemption with the real runner: a pool far too small gives the same tokens as a large one, recomputed or swapped."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from twostroke.core.clock import MonotonicClock
from twostroke.core.request import FinishReason, SamplingParams, SequenceKey
from twostroke.decode_worker.policy import combined_policy
from twostroke.engine.core import CoreLimits, EngineCore
from twostroke.engine.link.messages import CancelSequence, Ended, LoadNews, Source, StepTokens, Stop, Submit
from twostroke.engine.link.thread_link import ThreadLink
from twostroke.engine.loop import Engine
from twostroke.engine.policy import StepLimits
from twostroke.kv.cache.pool import BlockPool
from twostroke.kv.cache.prefix import PrefixCache
from twostroke.kv.section import HeldTokens
from twostroke.kv.store.host_store import HostStore
from twostroke.model.runner import Runner

TIMEOUT_S = 60
MakeRunner = Callable[..., Runner]


@pytest.fixture(scope="module")
def tiny(write_tiny: Callable[[dict[str, object]], Path]) -> Path:
    return write_tiny({})


class Damaging(HostStore):
    """Host memory in which one bit of every second copy flips."""

    copies = 0

    def swap_out(self, held: HeldTokens, host: HeldTokens) -> None:
        super().swap_out(held, host)
        self.copies += 1
        if self.copies % 2:
            last = host.end - 1
            block = host.block_table[last // self._host.block_tokens]
            self._host.components[1].payload_view[0, block, 0, last % self._host.block_tokens, 0] ^= 1


def submit(name: str, length: int) -> Submit:
    ids = tuple((7 * place * length) % 150 + 2 for place in range(length))
    greedy = length % 2 == 0
    params = SamplingParams(70, 0.0 if greedy else 0.9, seed=5, ignore_eos=True)
    return Submit(SequenceKey(name, 0), Source.LOCAL, ids, (), b"root", params)


WORK = [submit("a", 30), submit("b", 41), submit("c", 24), submit("d", 17)]


async def serve(runner: Runner, num_blocks: int, host: HostStore | None, num_host: int, *, prefix: bool, cancel: str):
    """Tokens, ends and last counters of WORK on an engine with that many blocks; `cancel` goes once swaps begin."""
    link, pool = ThreadLink(), BlockPool(num_blocks, 16)
    cache = PrefixCache(pool, enabled=prefix)
    policy = combined_policy(StepLimits(8, 64))
    core = EngineCore(CoreLimits(None, num_host), pool, cache, policy, eos_ids=[1], key=b"cluster")
    engine = Engine(core, runner, runner.store, link, MonotonicClock(), host=host)
    for command in WORK:
        link.send(command)
    engine.start()
    tokens: dict[str, list[int]] = {command.key.request_id: [] for command in WORK}
    ends: dict[str, FinishReason] = {}
    counters: dict[str, int] = {}
    async with asyncio.timeout(TIMEOUT_S):
        while batch := await link.receive():
            for event in batch:
                match event:
                    case StepTokens():
                        for news in event.news:
                            assert news.first_index == len(tokens[news.key.request_id])
                            tokens[news.key.request_id] += news.token_ids
                    case Ended():
                        ends[event.key.request_id] = event.reason
                    case LoadNews():
                        counters = dict(event.counters)
            if cancel and len(tokens[cancel]) > 20:
                link.send(CancelSequence(SequenceKey(cancel, 0)))
                cancel = ""
            if len(ends) == len(WORK):
                link.send(Stop())
    assert engine.join(TIMEOUT_S)
    assert not engine.is_broken
    core.check_integrity()
    assert pool.num_live == 0
    assert counters.get("swap_blocks_in_use", 0) == 0
    return tokens, ends, counters


@pytest.fixture
def run(make_runner: MakeRunner, tiny: Path):
    def begin(
        kv: str, num_blocks: int, num_host: int = 0, *, kind: type[HostStore] = HostStore, prefix=True, cancel=""
    ):
        runner = make_runner(tiny, num_blocks=num_blocks, kv_dtype=kv)
        host = kind(runner.store, runner.store.on_host(num_host)) if num_host else None
        return asyncio.run(serve(runner, num_blocks, host, num_host, prefix=prefix, cancel=cancel))

    return begin


@pytest.mark.parametrize("kv", ["fp8", "bfloat16"])
def test_the_tokens_are_those_of_a_large_pool(run, kv):
    tokens, _, counters = run(kv, 64)
    assert counters["preemptions"] == 0
    assert {len(t) for t in tokens.values()} == {70}

    recomputed, _, counters = run(kv, 12)
    assert counters["preemptions_recompute"] > 0
    assert recomputed == tokens

    swapped, _, counters = run(kv, 12, 16)
    assert counters["preemptions_swap"] > 0
    assert counters["preemptions_recompute"] == 0
    assert counters.get("swaps_failed", 0) == 0
    assert swapped == tokens

    mixed, _, counters = run(kv, 12, 6)
    assert counters["preemptions_swap"] > 0
    assert counters["swaps_refused"] > 0
    assert mixed == tokens

    private, _, counters = run(kv, 12, 16, prefix=False)
    assert counters["preemptions_swap"] > 0
    assert private == tokens


@pytest.mark.parametrize("kv", ["fp8", "bfloat16"])
def test_what_comes_back_damaged_is_computed_again(run, kv):
    tokens, _, _ = run(kv, 64)
    damaged, ends, counters = run(kv, 12, 16, kind=Damaging)
    assert counters["swaps_failed"] > 0
    assert damaged == tokens
    assert set(ends.values()) == {FinishReason.LENGTH}


def test_a_cancel_among_swaps_frees_everything(run):
    tokens, _, _ = run("fp8", 64)
    others, ends, counters = run("fp8", 12, 16, cancel="d")
    assert ends["d"] is FinishReason.CANCELLED
    assert counters["preemptions_swap"] > 0
    assert all(others[name] == tokens[name] for name in "abc")
