"""Blocks.Fetch: which requests are malformed, which blocks are in which frame, and a departing worker that waits."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from twostroke.core.clock import MonotonicClock
from twostroke.core.request import CacheScope, SequenceKey
from twostroke.engine.facts import FaceFacts, ModelFacts
from twostroke.engine.link.messages import BlocksFetched, Reading
from twostroke.kv.block import BlockIdentity
from twostroke.kv.codec import Codec
from twostroke.kv.handover.frames import Frame, decode_envelope
from twostroke.kv.keys import PromptHasher
from twostroke.kv.section import SectionData
from twostroke.kv.spec import WindowedLayers, attention_spec
from twostroke.protos.handover_pb2 import FetchRequest
from twostroke.worker.blocks.departing import Departing
from twostroke.worker.blocks.fetch import MAX_IDENTITIES, FetchAnswer, FetchPart, FetchService, select, why_malformed

SPEC = attention_spec(num_layers=1, kv_heads=1, head_dim=8, codec=Codec.BF16)
MODEL = ModelFacts("m", "", 100, 1024, frozenset({1}), b"w" * 16, b"class", "here", True, SPEC)
FRAME_BYTES = 2 * 16 * SPEC.bytes_per_token  # of two blocks
FACTS = FaceFacts("d", MODEL, PromptHasher(b"k" * 32, b"w" * 16, b"class"), 7, 10, 16, FRAME_BYTES, 4, 8, 64)
NAMES = tuple(BlockIdentity(bytes([n]) * 16) for n in range(5))
KEY = SequenceKey("r", 1)


def wanted(**changes: Any) -> FetchRequest:
    return FetchRequest(**{"identities": NAMES, "first_token": 32, "isolation_domain": "tests"} | changes)


def found(num_blocks: int) -> BlocksFetched:
    """What the engine says of blocks that are held."""
    rows = np.zeros((1, 1, 16 * num_blocks, 16), np.uint8)
    planes = SectionData(
        "main", "k", 0, 1, 0, 1, int(Codec.BF16), 16, rows, None, np.zeros((1, 1, num_blocks), np.uint64)
    )
    return BlocksFetched(1, num_blocks, (planes,) if num_blocks else ())


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, ""),
        ({"identities": [*NAMES, b"short"]}, "an identity is not 16 bytes"),
        ({"first_token": 8}, "first_token is 8; must be a multiple of 16"),
        ({"identities": NAMES[:1] * MAX_IDENTITIES}, ""),
        ({"identities": NAMES[:1] * (MAX_IDENTITIES + 1)}, "65537 identities; at most 65536 at once"),
    ],
)
def test_a_malformed_request_is_told_why(changes: dict[str, Any], why: str) -> None:
    assert why_malformed(wanted(**changes)) == why


def test_wanted_layers_and_heads_are_cut_out_with_their_digests() -> None:
    payload = np.arange(4 * 3 * 16 * 2, dtype=np.uint16).astype(np.uint8).reshape(4, 3, 16, 2)
    digests = np.arange(12, dtype=np.uint64).reshape(4, 3, 1)
    section = SectionData("main", "k", 2, 4, 1, 3, int(Codec.BF16), 2, payload, None, digests)
    (cut,) = select([section], wanted(layer_start=3, layer_count=2, head_start=2, head_count=1))
    assert (cut.layer_start, cut.layer_count, cut.head_start, cut.head_count) == (3, 2, 2, 1)
    assert np.array_equal(cut.payload, payload[1:3, 1:2])
    assert np.array_equal(cut.digests, digests[1:3, 1:2])


def test_blocks_are_read_from_the_chains_of_the_request_s_own_domain() -> None:
    roots = [FetchAnswer(wanted(isolation_domain=name), FACTS, Counter()).root for name in ("tests", "others")]
    assert roots == [FACTS.namer.root(CacheScope(name, b"")) for name in ("tests", "others")]
    assert roots[0] != roots[1]


@pytest.mark.parametrize(
    ("held", "frames"),
    [
        (5, [(32, NAMES[:2], False), (64, NAMES[2:4], False), (96, NAMES[4:], True)]),
        (3, [(32, NAMES[:2], False), (64, NAMES[2:3], True)]),
        (2, [(32, NAMES[:2], False)]),  # what follows is asked for, and not held
        (1, [(32, NAMES[:1], True)]),
        (0, []),
    ],
)
def test_frames_hold_the_leading_blocks_and_the_last_one_says_so(
    held: int, frames: list[tuple[int, tuple[bytes, ...], bool]]
) -> None:
    answer, sent, left = FetchAnswer(wanted(), FACTS, Counter()), [], held
    while (part := answer.next_part()) is not None:
        here = min(left, len(part.identities))
        left -= here
        envelope = answer.frame(found(here))
        if envelope is not None:
            frame = decode_envelope(envelope)
            assert isinstance(frame, Frame)
            assert frame.header.sequence == len(sent) + 1
            sent.append((frame.header.token_start, tuple(frame.header.identities), frame.header.last))
    assert sent == frames


def test_windows_are_left_out_before_those_of_the_last_block_that_is_held() -> None:
    spec = attention_spec(2, 1, 8, Codec.BF16).with_windowed(WindowedLayers((0,), 16))
    facts = replace(FACTS, model=replace(MODEL, kv_spec=spec), frame_bytes=5 * 16 * spec.bytes_per_token)
    names = tuple(BlockIdentity(bytes([n]) * 16) for n in range(20))
    answer = FetchAnswer(wanted(identities=names, first_token=64, only_windows=True), facts, Counter())
    part, parts = answer.next_part(), []
    assert part == FetchPart(names, 64, Reading.NOTHING)
    answer.frame(BlocksFetched(1, 18, ()))
    while (part := answer.next_part()) is not None:
        parts.append((part.first_token, len(part.identities), part.how))
        answer.frame(found(len(part.identities)))
    # Up to token 352; tokens from 256 on are seen from there, rounded to the largest block.
    assert parts == [
        (64, 5, Reading.WITHOUT_WINDOWS),
        (144, 5, Reading.WITHOUT_WINDOWS),
        (224, 2, Reading.WITHOUT_WINDOWS),
        (256, 5, Reading.ALL),
        (336, 1, Reading.ALL),
    ]


# ------------------------------------------------------------------ a worker that departs


class Ticks:
    """A clock that stands still, and notices who asks it again and again."""

    def __init__(self) -> None:
        self.num_read = 0

    def now_s(self) -> float:
        self.num_read += 1
        assert self.num_read < 100, "it does not wait"
        return 5.0


async def held(identities: Any, first_token: int, root: bytes, how: Any) -> BlocksFetched:
    for _ in range(3):
        await asyncio.sleep(0.0)  # others go on meanwhile
    return found(len(identities))


def serving(departing: Departing) -> FetchService:
    return FetchService(FACTS, SimpleNamespace(fetch=held), Counter(), departing)  # type: ignore[arg-type]


REQUEST = wanted(request_id=KEY.request_id, choice=KEY.choice).SerializeToString()


async def test_a_departing_worker_waits_until_its_blocks_are_fetched_as_a_whole() -> None:
    departing, context = Departing(Ticks()), SimpleNamespace()
    departing.gave_back([KEY])
    waiting = asyncio.create_task(departing.wait(3600.0))
    await asyncio.sleep(0.0)  # it waits
    broken = serving(departing).fetch(REQUEST, context)
    await anext(broken)
    assert departing.departure.waits_until_s(5.0) == float("inf")
    await asyncio.sleep(0.0)
    await broken.aclose()
    assert departing.departure.waits_until_s(5.0) == 5.0 + departing.departure.quiet_s, "it may come again"
    await asyncio.sleep(0.0)
    assert not waiting.done()
    assert len([frame async for frame in serving(departing).fetch(REQUEST, context)]) == 3
    async with asyncio.timeout(60.0):
        assert await waiting == 0


async def test_a_fetch_that_does_not_end_is_awaited_for_the_given_time() -> None:
    departing = Departing(MonotonicClock())
    departing.gave_back([KEY])
    departing.fetch_began(KEY)
    async with asyncio.timeout(60.0):
        assert await departing.wait(0.05) == 1
