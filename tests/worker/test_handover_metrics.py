"""A worker's /metrics tells what its hand-overs counted, on both sides and while they run."""

import asyncio
from collections import Counter
from dataclasses import fields
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.engines.frames import damaged, is_frame

from twostroke.core.metrics import HANDOVER_STREAMS, SIDES
from twostroke.core.request import Role
from twostroke.kv.config import CacheConfig
from twostroke.kv.handover.exported import CountersExport
from twostroke.kv.handover.machine import Counters
from twostroke.kv.handover.transports.grpc import ServerStream

PREFIX = "twostroke_handover_"
README = Path(__file__).parents[2] / "deploy" / "README.md"


async def scraped(worker):
    """The hand-over counters of a worker's /metrics, by side and name, and the help texts."""
    async with httpx.AsyncClient() as client:
        text = (await client.get(f"http://{worker.metrics_address}/metrics")).text
    values, helps = {side: {} for side in SIDES}, {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if "side" in sample.labels and sample.name.endswith("_total"):
                name = sample.name.removeprefix(PREFIX).removesuffix("_total")
                values[sample.labels["side"]][name] = sample.value
                helps[name] = family.documentation
    return values, helps


@pytest.fixture
def damage_second_frame(monkeypatch):
    return lambda rings: _damage_second_frame(monkeypatch, rings)


def _damage_second_frame(monkeypatch, rings):
    send, seen = ServerStream.send, []

    async def damaging(stream, envelope):
        if is_frame(envelope):
            seen.append(envelope)
            if len(seen) == 2:
                envelope = damaged(envelope, rings())
        await send(stream, envelope)

    monkeypatch.setattr(ServerStream, "send", damaging)


def test_every_counter_is_exported_and_documented():
    assert HANDOVER_STREAMS.keys() == {field.name for field in fields(Counters)} | {"mismatches"}
    text = README.read_text()
    for name in HANDOVER_STREAMS:
        assert f"_{name}_total`" in text


@pytest.fixture(params=["grpc", "shm"])
async def pair(start_worker, request):
    cache = CacheConfig(tokens=8192, frame_bytes=8192, transport=request.param)
    return [await start_worker(role, cache=cache) for role in (Role.PREFILL, Role.DECODE)]


async def test_both_sides_of_a_real_handover_are_in_metrics(
    pair, router_of, make_prompt, all_free, damage_second_frame
):
    prefill, decode = pair
    is_shared = decode.settings.cache.transport == "shm"
    hand = await router_of(decode)
    for worker in (prefill, decode):
        values, helps = await scraped(worker)
        assert values == {side: dict.fromkeys(HANDOVER_STREAMS, 0.0) for side in SIDES}  # there before anything happens
        assert helps == {name: metric.help for name, metric in HANDOVER_STREAMS.items()}
    damage_second_frame(lambda: decode.faces.rings)
    answer = await (await hand.submit("r", make_prompt(320), [prefill])).ended()
    assert answer.end.handover.refetched_blocks > 0
    await all_free(prefill, decode)
    async with asyncio.timeout(60):
        while prefill.faces.prefill.num_running:
            await asyncio.sleep(0.01)
    sent, received = (await scraped(prefill))[0], (await scraped(decode))[0]
    assert sent["decode"] == received["prefill"] == dict.fromkeys(HANDOVER_STREAMS, 0.0)
    prefills, decodes = sent["prefill"], received["decode"]
    assert prefills["frames"] == decodes["frames"] > 2
    assert 0 < prefills["frame_bytes"] < decodes["frame_bytes"]  # the headers
    assert decodes["frame_bytes"] == answer.end.handover.bytes_moved
    assert (prefills["refetches"], decodes["refetches"]) == (1, 1)
    assert (prefills["mismatches"], decodes["mismatches"]) == (0, 1)
    assert prefills["messages_sent"] >= decodes["messages_received"] > decodes["frames"]
    assert decodes["messages_sent"] >= prefills["messages_received"] > 1
    for name, whole in (("shared_frames", "frames"), ("shared_bytes", "frame_bytes")):
        assert [side[name] for side in (prefills, decodes)] == [
            side[whole] if is_shared else 0 for side in (prefills, decodes)
        ]
    for name in ("duplicates", "stale", "gaps"):
        assert prefills[name] == decodes[name] == 0


@pytest.mark.parametrize("side", SIDES)
def test_what_a_handover_counts_is_added_once_whenever_it_is_told(side):
    totals, hand_overs = Counter(other=3), [Counters(), Counters()]
    exports = [CountersExport(counters, side, totals) for counters in hand_overs]
    for growth in (2, 0, 5):
        for counters, export in zip(hand_overs, exports, strict=True):
            for field in fields(Counters):
                setattr(counters, field.name, getattr(counters, field.name) + growth)
            export.update()
            export.update()
    assert totals == {"other": 3} | {f"handover_{side}_{field.name}": 14 for field in fields(Counters)}
