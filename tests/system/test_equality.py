"""Disaggregated text is the text in one piece: the same tokens for 216 mixed prompts, a third in each cache dtype.

The oracle is one combined worker without a prefix cache that serves the requests one at a time. The other side is two
prefill and two decode workers under concurrent load, with chunked prefill, prefix caches and hand-overs.
"""

import asyncio
import random
from typing import Any

import pytest

from twostroke import AsyncClient, Client
from twostroke.kv.spec import HASH_BLOCK_TOKENS

NUM_PROMPTS = 72
CONCURRENCY = 24
LENGTHS = (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 130, 257, 400)


def mixed_prompts(vocab_size: int, seed: str) -> list[dict[str, Any]]:
    """Odd lengths, shared prefixes, greedy and seeded sampling with every filter."""
    chance = random.Random(seed)
    shared = [[chance.randrange(10, vocab_size) for _ in range(300)] for _ in range(4)]
    prompts = []
    for number in range(NUM_PROMPTS):
        length = chance.choice(LENGTHS)
        if number % 3 == 0:
            ids = shared[number % 4][:length] + [
                chance.randrange(10, vocab_size) for _ in range(chance.randrange(1, 20))
            ]
        else:
            ids = [chance.randrange(10, vocab_size) for _ in range(length)]
        sampling: dict[str, Any] = {"temperature": 0.0}
        if number % 2:
            sampling = {"temperature": chance.choice((0.3, 0.8, 1.3)), "seed": chance.randrange(2**31)}
            sampling |= chance.choice(({}, {"top_k": 20}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.8}))
        if number % 5 == 0:
            sampling |= chance.choice(
                (
                    {"repetition_penalty": 1.2},
                    {"frequency_penalty": 0.8, "presence_penalty": 0.5},
                    {"min_p": 0.02, "bad_words": ["def", " the"], "logit_bias": {40: 3.0}},
                )
            )
        sampling["request_id"] = f"{seed}-{number}"
        if number % 6 == 1:  # too long to end by itself
            sampling["structured_outputs"] = {"regex": "([a-z]{1,8} ){200}"}
        else:
            sampling["ignore_eos"] = True
        prompts.append({"prompt": ids, "max_tokens": chance.choice((1, 2, 5, 18)), **sampling})
    return prompts


async def _all_at_once(address: str, prompts: list[dict[str, Any]]) -> list[tuple[int, ...]]:
    gate = asyncio.Semaphore(CONCURRENCY)
    async with AsyncClient(address, timeout_s=300) as client:

        async def one(given: dict[str, Any]) -> tuple[int, ...]:
            async with gate:
                return tuple((await client.generate(**given)).choices[0].token_ids)

        return list(await asyncio.gather(*(one(dict(given)) for given in prompts)))


def assert_all_were_handed_over(client: Client, prompts: list[dict[str, Any]]) -> None:
    """Every prompt's KV came from a prefill worker, but where no whole block was missing or no second token wanted.

    On a machine that is slow enough, a worker is silent for longer than its lease. A few hand-overs may end so, or be
    ordered again without their peer.
    """
    explained = [client.explain(given["request_id"]) for given in prompts]
    needed = num_silent = 0
    for given, found in zip(prompts, explained, strict=True):
        report = found["handover"]
        if given["max_tokens"] == 1:
            continue  # the first token comes before the KV, and is the last
        if found["tokens"]["prompt"] - report["tokens_held"] < HASH_BLOCK_TOKENS:
            assert found["kv_bytes_moved"] == 0, found
            assert report["local_reason"] in ("under_a_block_missing", "ordered"), found
        elif report["local_reason"] in ("peer_silent", "ordered"):
            num_silent += 1
        else:
            assert found["kv_bytes_moved"] > 0, str(report)
            assert found["prefill_worker"], found
            needed += 1
    assert needed > len(prompts) // 3
    assert num_silent < needed // 8
    moved = [found["kv_bytes_moved"] for found in explained if found["kv_bytes_moved"]]
    counters = client.cluster()["counters"]
    if not num_silent:
        assert (counters["handovers"], counters["kv_bytes_moved"]) == (len(moved), sum(moved))


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("patient_leases")
@pytest.mark.parametrize(
    "dtype", ["fp8", *(pytest.param(name, marks=pytest.mark.campaign) for name in ("bfloat16", "float32"))]
)
def test_disaggregated_equals_one_piece_token_for_token(run_cluster, dtype: str):
    prompts = mixed_prompts(4096, seed=dtype)
    common = {"cluster__launcher": "inprocess", "step__num_threads": 1, "cache__dtype": dtype, "cache__tokens": 16384}
    whole = {"cluster__prefill": 0, "cluster__decode": 1, "cache__prefix_caching": False}
    with run_cluster(**common, **whole) as one_piece, Client(one_piece.grpc, timeout_s=300) as client:
        expected = [tuple(client.generate(**given).choices[0].token_ids) for given in prompts]
        counters = client.cluster()["counters"]
    assert all(len(tokens) == given["max_tokens"] for tokens, given in zip(expected, prompts, strict=True))
    assert (counters["handovers"], counters["kv_bytes_moved"]) == (0, 0)
    apart = {"cluster__prefill": 2, "cluster__decode": 2, "step__max_num_batched_tokens": 128}
    apart["router__local_prefill"] = False  # every prompt that can be handed over is
    with run_cluster(**common, **apart) as cluster:
        got = asyncio.run(_all_at_once(cluster.grpc, prompts))
        with Client(cluster.grpc) as client:
            assert_all_were_handed_over(client, prompts)
    different = [n for n, (a, b) in enumerate(zip(expected, got, strict=True)) if a != b]
    assert not different, [(n, prompts[n], expected[n], got[n]) for n in different[:3]]
