"""Workers that differ in ranks, physical blocks and codecs hand over; a pair that cannot is refused with its reason."""

import itertools
import sys

import pytest
from support.clusters.real_cluster import real_cluster

from twostroke.core.request import Request, Role, SamplingParams
from twostroke.engine.config import StepConfig
from twostroke.kv.config import CacheConfig

LIMIT_S = 150.0
FREE = {"deterministic": False}  # the TP size is part of the numerics class
RANKS = [(1, 2), (2, 1), (4, 2)]
CODECS = [("float32", "float32"), ("fp8", "fp8"), ("fp8", "float32")]


@pytest.fixture(autouse=True)
def _linux() -> None:
    if sys.platform != "linux":
        pytest.skip("ranks share memory on Linux only")


def with_cache(block_tokens: int, codec: str, transport: str = "auto") -> dict[str, object]:
    cache = CacheConfig(tokens=8192, frame_bytes=8192, block_size=block_tokens, dtype=codec, transport=transport)
    return {"model": FREE, "cache": cache, "step": StepConfig(max_num_batched_tokens=64)}


IN_SUITE = (((1, 2), ("fp8", "float32")),)


@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(pair, marks=[] if pair in IN_SUITE else [pytest.mark.campaign], id=str(pair))
        for pair in itertools.product(RANKS, CODECS)
    ],
)
async def test_their_tokens_are_those_of_one_rank_with_the_same_codecs(
    pair, start_worker, router_of, make_prompt, all_free
):
    ranks, (source, destination) = pair
    answers = []
    for sizes, blocks, transport in (((1, 1), 16, "auto"), (ranks, 64, "auto"), (ranks, 32, "grpc")):
        prefill = await start_worker(Role.PREFILL, num_ranks=sizes[0], **with_cache(16, source, transport))
        decode = await start_worker(Role.DECODE, num_ranks=sizes[1], **with_cache(blocks, destination, transport))
        assert (prefill.info().tensor_parallel_size, decode.info().tensor_parallel_size) == sizes
        hand = await router_of(decode)
        told = [
            await hand.submit(f"r{i}", make_prompt(100 + i, i), [prefill], sampling={"max_tokens": 20})
            for i in range(2)
        ]
        answers.append([(await answer.ended(LIMIT_S)).token_ids for answer in told])
        assert [answer.end.handover.tokens_moved for answer in told] == [100, 101]
        assert {answer.end.handover.transport for answer in told} == {"grpc" if transport == "grpc" else "shm"}
        await all_free(prefill, decode)
    assert answers[0] == answers[1] == answers[2]


async def test_an_impossible_peer_refuses_and_the_next_one_computes(start_worker, router_of, make_prompt, all_free):
    """In deterministic mode a prefill worker of two ranks is no peer of one rank."""
    unlike = await start_worker(Role.PREFILL, num_ranks=2)
    alike, decode = await start_worker(Role.PREFILL), await start_worker(Role.DECODE)
    hand = await router_of(decode)
    told = [await hand.submit(f"r{i}", make_prompt(60, i), [unlike, alike]) for i in range(3)]
    for answer in told:
        end = (await answer.ended(LIMIT_S)).end
        assert (end.handover.prefill_worker, end.handover.tokens_moved) == (alike.settings.worker_id, 60)
        assert len(answer.token_ids) == 8
    assert unlike.counters["handovers_refused"] == 3
    await all_free(unlike, alike, decode)


async def test_a_router_sends_nothing_to_a_pair_that_cannot_and_says_why(start_worker, make_prompt, all_free):
    async with real_cluster(start_worker, local_prefill=False) as cluster:
        unlike = await cluster.add(Role.PREFILL, num_ranks=2)
        alike, decode = [await cluster.add(role) for role in (Role.PREFILL, Role.DECODE)]
        sampling = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
        for number in range(4):
            asked = Request(f"r{number}", "tiny", tuple(make_prompt(60, number)), sampling, 1, "tenant", timeout_s=60.0)
            assert len(await cluster.generate(asked)) == 8
            found = cluster.flow.explain(asked.owner, asked.request_id)
            assert found["prefill_worker"] == alike.settings.worker_id
            (refused,) = found["choice"]["refused_pairs"]
            assert (refused["prefill_worker"], refused["decode_worker"], refused["field"]) == (
                unlike.settings.worker_id,
                decode.settings.worker_id,
                "numerics_class",
            )
            assert "model.deterministic" in refused["reason"]
        assert unlike.counters["handovers_refused"] == 0
        shown = {w["worker_id"]: w["tensor_parallel_size"] for w in cluster.flow.cluster()["workers"]}
        assert shown[unlike.settings.worker_id] == 2
        await all_free(unlike, alike, decode)
