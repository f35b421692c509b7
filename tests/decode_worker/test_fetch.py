"""One fetch of cached blocks, from the stream to the engine: what is read, stored, counted and ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from twostroke.core.request import CacheScope, Epoch, SequenceKey
from twostroke.decode_worker.fetch import KvFetch
from twostroke.engine.link.messages import WriteKv
from twostroke.kv.block import BlockIdentity
from twostroke.kv.codec import Codec
from twostroke.kv.handover.carrier import Check
from twostroke.kv.handover.fetching import MAX_WRITING, BlockFetch, Wanted
from twostroke.kv.handover.frames import FrameLabel, encode_frame
from twostroke.kv.handover.machine import Fetched, Label
from twostroke.kv.section import SectionData
from twostroke.protos import handover_pb2

NAMES = tuple(BlockIdentity(bytes([n]) * 16) for n in range(12))
FIRST = 32  # tokens before them
PLANES = SectionData(
    "main",
    "k",
    0,
    1,
    0,
    1,
    int(Codec.BF16),
    16,
    np.zeros((1, 1, 16, 16), np.uint8),
    None,
    np.zeros((1, 1, 1), np.uint64),
)
ORDER = SimpleNamespace(key=SequenceKey("r", 1), engine_key=SequenceKey("e", 0), scope=CacheScope("tests", b""))


class Host:
    """A stream whose envelopes and verdicts are the test's."""

    def __init__(self) -> None:
        self.hear: Callable[[bytes | None], None]
        self.sent: list[bytes] = []
        self.closed: list[bool] = []
        self.is_held = False
        self.is_intact = True
        self._soon: list[Callable[[], None]] = []

    def now_s(self) -> float:
        return 0.0

    def after(self, delay_s: float, act: Callable[[], None]) -> Any:
        if not delay_s:
            self._soon.append(act)
        return SimpleNamespace(cancel=lambda: None)

    def listen(self, hear: Callable[[bytes | None], None]) -> None:
        self.hear = hear

    def send(self, envelope: bytes) -> None:
        self.sent.append(envelope)

    def close(self, *, now: bool) -> None:
        self.closed.append(now)

    def check(self, check: Check, answered: Callable[[bool], None]) -> None:
        answered(self.is_intact)

    def hold(self, is_held: bool) -> None:
        self.is_held = is_held

    def trace(self, action: Any) -> None: ...

    def begin(self) -> None:
        self._soon.pop()()


class Run:
    """A fetch that has asked."""

    def __init__(self) -> None:
        self.host, self.over = Host(), list[Fetched]()
        self.counters, self.stored = Counter[str](), list[WriteKv]()
        tools: Any = SimpleNamespace(
            counters=self.counters, dispatcher=SimpleNamespace(send=self.stored.append), digest_key=0, kv_spec=None
        )
        machine = BlockFetch(Wanted(NAMES, FIRST, b"class"), 60.0, 600.0, 0.0)
        self.fetch = KvFetch(machine, self.host, ORDER, tools, self.over.append)
        self.host.begin()

    def block(self, number: int, *, is_last: bool = False) -> None:
        """The frame of one block arrives."""
        label = FrameLabel(
            Label("", 0, Epoch(0, 0)), number + 1, b"class", FIRST + 16 * number, 16, NAMES[number : number + 1]
        )
        self.host.hear(encode_frame(label, [PLANES], is_last=is_last))

    def written(self, number: int) -> None:
        self.fetch.written(FIRST + 16 * number, 16)


@pytest.fixture
def run() -> Run:
    return Run()


def test_it_asks_for_the_chain_on_behalf_of_its_sequence(run: Run) -> None:
    (envelope,) = run.host.sent
    asked = handover_pb2.FetchRequest.FromString(envelope)
    assert (tuple(asked.identities), asked.first_token) == (NAMES, FIRST)
    assert (asked.request_id, asked.choice, asked.isolation_domain) == ("r", 1, "tests")


def test_all_blocks_are_stored_and_counted(run: Run) -> None:
    for number in range(len(NAMES)):
        run.block(number)
        run.written(number)
    assert [(write.key, write.token_start, write.token_count) for write in run.stored] == [
        (ORDER.engine_key, FIRST + 16 * number, 16) for number in range(len(NAMES))
    ]
    assert [fetched.end for fetched in run.over] == ["complete"]
    assert run.host.closed == [False]
    assert (run.counters["fetch_complete"], run.counters["fetched_blocks"]) == (1, len(NAMES))


def test_while_many_frames_wait_to_be_stored_no_further_one_is_read(run: Run) -> None:
    held = []
    for number in range(MAX_WRITING):
        run.block(number)
        held.append(run.host.is_held)
    assert held == [False] * (MAX_WRITING - 1) + [True]
    run.written(0)
    assert not run.host.is_held
    run.block(MAX_WRITING, is_last=True)
    assert not run.host.is_held, "the stream's end is read"


@pytest.mark.parametrize(
    ("envelope", "is_intact", "end"),
    [(None, True, "closed"), (b"garbage", True, "protocol"), (b"", False, "corrupted")],
)
def test_what_ends_it_early_keeps_what_is_stored(run: Run, envelope: bytes | None, is_intact: bool, end: str) -> None:
    run.block(0)
    run.host.is_intact = is_intact
    if envelope == b"":
        run.block(1)
    else:
        run.host.hear(envelope)
    assert (run.over, run.host.closed) == ([], [True])
    run.written(0)
    (fetched,) = run.over
    assert (fetched.end, fetched.stored_upto) == (end, FIRST + 16)
    assert (run.counters["fetched_blocks"], run.counters["kv_corrupted_frames"]) == (1, int(not is_intact))


def test_after_a_cancel_nothing_more_is_checked_stored_or_told(run: Run) -> None:
    run.block(0)
    run.fetch.cancel()
    assert run.host.closed == [True]
    run.host.is_intact = False
    run.block(1)  # it was on its way
    run.written(0)
    assert (len(run.stored), run.over, run.counters) == (1, [], {})
