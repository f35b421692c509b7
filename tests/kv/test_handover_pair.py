"""Sender and receiver over one unreliable stream pair, with real envelopes, under a virtual clock and a seed.

Whatever the stream does, both machines end, every block is released, and decode never stores a wrong token's KV.
"""

import heapq
import itertools
import random
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest

from twostroke.core.errors import InvalidRequest
from twostroke.core.lease import HANDOVER_LEASE
from twostroke.core.request import Epoch
from twostroke.kv.codec import Codec
from twostroke.kv.digest import frame_digests, places
from twostroke.kv.handover.damage import verify_frame
from twostroke.kv.handover.frames import (
    Frame,
    FrameLabel,
    SectionData,
    WireError,
    decode_envelope,
    encode_frame,
    encode_message,
)
from twostroke.kv.handover.machine import (
    Abort,
    AskBind,
    Close,
    Complete,
    EngineBound,
    EngineNotYet,
    GotFirstToken,
    Label,
    Lost,
    Read,
    ReleaseBlocks,
    Send,
    SendFrame,
    Write,
)
from twostroke.kv.handover.receiver import FrameArrived, Receiver
from twostroke.kv.handover.sender import Sender
from twostroke.protos import common_pb2
from twostroke.protos import handover_pb2 as pb

KEY = 99
LABEL = Label("r", 0, Epoch(1, 1))
TIMEOUT_S = 20.0
FIRST_TOKEN = 4242


@dataclass
class Faults:
    """Probabilities per message, or per run."""

    delay_s: float = 0.01
    damage: float = 0.0  # of a frame's planes
    drop: float = 0.0
    duplicate: float = 0.0
    truncate: float = 0.0
    flip: float = 0.0  # a bit anywhere
    crash: float = 0.0  # of either side, once per run
    freeze: float = 0.0
    cancel: float = 0.0
    fail: float = 0.0
    not_yet: float = 0.3


@dataclass
class Side:
    machine: Receiver | Sender | None = None
    alive: bool = True
    frozen_until_s: float = 0.0
    inbox_open: bool = True
    closed_out: bool = False
    last_arrival_s: float = 0.0  # streams are ordered: nothing overtakes
    waiting: list = field(default_factory=list)


def planes(start: int, count: int) -> SectionData:
    """KV whose content names its token: one layer, one head, rows of four bytes."""
    tokens = np.arange(start, start + count, dtype=np.uint32)
    payload = tokens.view(np.uint8).reshape(1, 1, count, 4).copy()
    blocks = start // 16 + np.arange(-(-count // 16))
    digests = frame_digests(payload, None, places([[[0]]], 0, [[0]], blocks), KEY, 16)
    return SectionData("main", "k", 0, 1, 0, 1, int(Codec.FP32), 4, payload, None, digests)


class Run:
    """One hand-over from opening to silence."""

    def __init__(self, seed: int, faults: Faults) -> None:
        self.random = random.Random(seed)
        self.faults = faults
        self.now_s = 0.0
        self.events: list = []
        self.ties = itertools.count()
        self.up, self.down = Side(), Side()  # the ends: `up` is prefill's, messages go up to it
        self.num_tokens = self.random.randint(1, 400)
        self.held = self.random.randrange(0, self.num_tokens, 16)
        self.slots = self.random.randint(1, 4)
        order = pb.Open(
            prompt_ids=range(self.num_tokens),
            held_tokens=self.held,
            frame_slots=self.slots,
            timeout_ms=int(TIMEOUT_S * 1000),
            windows_from=self.random.choice((0, self.random.randrange(0, self.num_tokens, 16))),
        )
        self.windows_from = order.windows_from
        self.down.machine = self.receiver = Receiver(LABEL, order, HANDOVER_LEASE, TIMEOUT_S, 0.0)
        self.sender: Sender | None = None
        self.store = {token: token for token in range(self.held)}  # decode's KV by position
        self.frames: dict[int, tuple[Frame, bool]] = {}
        self.under_way = 0
        self.ends: dict[str, list] = {"decode": [], "prefill": []}
        self.first_tokens: list[int] = []
        self.computed = 0

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def soon(self) -> float:
        return self.random.random() * self.faults.delay_s * 3

    def at(self, delay_s: float, side: Side, act) -> None:
        heapq.heappush(self.events, (self.now_s + delay_s, next(self.ties), side, act))

    # ---------------------------------------------------------------- the loop

    def play(self) -> None:
        self.at(0, self.down, lambda: self.do(self.down, self.receiver.opened(self.now_s)))
        for side in (self.up, self.down):
            if self.chance(self.faults.crash):
                self.at(self.random.random(), side, lambda side=side: self.crash(side))
            if self.chance(self.faults.freeze):
                self.at(self.random.random(), side, lambda side=side: self.freeze(side))
        if self.chance(self.faults.cancel):
            self.at(
                self.random.random(), self.down, lambda: self.do(self.down, self.receiver.cancel("gone", self.now_s))
            )
        while self.events:
            self.now_s, _, side, act = heapq.heappop(self.events)
            assert self.now_s < TIMEOUT_S + 10, "it does not end"
            if not side.alive:
                continue
            if self.now_s < side.frozen_until_s:
                self.at(side.frozen_until_s - self.now_s, side, act)
                continue
            act()
            self.check()

    def arm(self, side: Side) -> None:
        """A timer, set anew after everything that happened."""
        machine = side.machine
        due_s = None if machine is None else machine.next_deadline_s
        if due_s is not None:

            def fire():
                if machine.next_deadline_s is not None and machine.next_deadline_s <= self.now_s:
                    self.do(side, machine.tick(self.now_s))

            self.at(max(0.0, due_s - self.now_s), side, fire)

    def crash(self, side: Side) -> None:
        side.alive = False
        self.transmit(side, None)

    def freeze(self, side: Side) -> None:
        side.frozen_until_s = self.now_s + self.random.choice([0.3, 1.0, 5.0])

    def check(self) -> None:
        if self.sender is not None and not self.sender.is_over:
            assert len(self.sender._reading) + self.sender._unfreed <= self.slots
        upto = self.receiver.stored_upto
        assert all(self.store.get(token) == token for token in range(upto)), "stored, but not this prompt's KV"

    # ---------------------------------------------------------------- the stream

    def transmit(self, source: Side, envelope: bytes | None) -> None:
        """One envelope to the other side; None: the end of the stream."""
        target = self.up if source is self.down else self.down
        if source.closed_out:
            return
        source.closed_out = envelope is None
        faults = self.faults
        copies = [envelope]
        if envelope is not None:
            if self.chance(faults.drop):
                return
            if self.chance(faults.duplicate):
                copies.append(envelope)
            if self.chance(faults.truncate):
                copies[0] = envelope[: self.random.randrange(len(envelope))]
            elif self.chance(faults.flip):
                copies[0] = self.flipped(envelope, 0)
            elif envelope[3] == 2 and self.chance(faults.damage):
                # rows of four bytes: the planes are the last part of a frame
                copies[0] = self.flipped(envelope, len(envelope) - 4)
        for copy in copies:
            target.last_arrival_s = max(target.last_arrival_s, self.now_s + self.soon())
            self.at(target.last_arrival_s - self.now_s, target, lambda copy=copy: self.arrive(target, copy))

    def flipped(self, envelope: bytes, first: int) -> bytes:
        damaged = bytearray(envelope)
        damaged[self.random.randrange(first, len(damaged))] ^= 1 << self.random.randrange(8)
        return bytes(damaged)

    def arrive(self, side: Side, envelope: bytes | None) -> None:
        if not side.inbox_open:
            return
        if envelope is None:
            side.inbox_open = False
        if side.machine is None:
            self.accept(envelope)
            return
        machine = side.machine
        if envelope is None:
            self.do(side, machine.closed(self.now_s))
            return
        try:
            received = decode_envelope(envelope)
        except WireError as error:
            self.do(side, machine.garbled(self.now_s, str(error)))
            return
        if isinstance(received, Frame):
            is_intact = verify_frame(received, KEY)
            start, end = received.header.token_start, received.header.token_start + received.header.token_count
            assert not start < self.windows_from < end, "windowed layers are in a part of a frame"
            self.frames[received.header.sequence] = (received, is_intact)
            arrived = FrameArrived.of(received.header, is_intact=is_intact, num_bytes=len(envelope))
            self.do(side, machine.on_frame(arrived, self.now_s))
        else:
            self.do(side, machine.on_message(received, self.now_s))

    def accept(self, envelope: bytes | None) -> None:
        """The service: a first message that is no order closes the stream."""
        try:
            if envelope is None:
                raise WireError("nothing")
            self.sender = Sender(decode_envelope(envelope), 32, 8, HANDOVER_LEASE, self.now_s)
        except (WireError, InvalidRequest):
            self.up.inbox_open = False
            self.transmit(self.up, None)
            return
        self.up.machine = self.sender
        self.at(self.soon(), self.up, lambda: self.do(self.up, self.sender.started(0, self.now_s)))
        if self.chance(self.faults.fail):
            error = common_pb2.Error(code="overloaded")
            self.at(self.random.random(), self.up, lambda: self.do(self.up, self.sender.failed(error, self.now_s)))
        self.arm(self.up)

    # ---------------------------------------------------------------- the workers

    def do(self, side: Side, actions) -> None:
        for action in actions:
            self.act(side, action)
        self.arm(self.up)
        self.arm(self.down)

    def act(self, side: Side, action) -> None:
        match action:
            case Send(message):
                self.transmit(side, encode_message(message))
            case AskBind():
                self.at(self.soon(), self.down, self.answer_bind)
            case Write(sequence, start, count):
                frame, is_intact = self.frames[sequence]
                assert is_intact, "a damaged frame was to be stored"
                self.at(self.soon(), self.down, lambda: self.store_frame(frame, start, count))
            case GotFirstToken(token_id):
                self.first_tokens.append(token_id)
            case Complete() | Lost():
                self.ends["decode"].append(action)
            case EngineBound():
                self.at(self.soon(), self.up, self.compute)
            case EngineNotYet():
                pass
            case Read(start, count):
                self.at(
                    self.soon(),
                    self.up,
                    lambda: self.do(self.up, self.sender.frame_read(start, count, 4 * count, self.now_s)),
                )
            case SendFrame(sequence, start, count, is_last):
                label = FrameLabel(self.sender.label, sequence, b"", start, count)
                self.transmit(self.up, encode_frame(label, [planes(start, count)], is_last=is_last))
            case ReleaseBlocks() | Abort():
                self.ends["prefill"].append(action)
            case Close(now):
                self.transmit(side, None)
                if now:
                    side.inbox_open = False
            case _:
                raise AssertionError(action)

    def answer_bind(self) -> None:
        if self.chance(self.faults.not_yet):
            self.do(self.down, self.receiver.not_yet(self.now_s))
            self.at(self.random.random(), self.down, lambda: self.do(self.down, self.receiver.bound(self.now_s)))
        else:
            self.do(self.down, self.receiver.bound(self.now_s))

    def store_frame(self, frame: Frame, start: int, count: int) -> None:
        tokens = frame.sections[0].payload.reshape(-1).view(np.uint32)
        self.store.update(zip(range(start, start + count), tokens.tolist(), strict=True))
        self.do(self.down, self.receiver.written(start, count, self.now_s))

    def compute(self) -> None:
        self.computed = min(self.num_tokens, self.computed + self.random.randint(1, 50))
        self.do(self.up, self.sender.progress(self.computed, self.now_s))
        if self.computed < self.num_tokens:
            self.at(self.soon(), self.up, self.compute)
        else:
            self.at(
                self.soon(),
                self.up,
                lambda: self.do(self.up, self.sender.first_token(pb.FirstToken(token_id=FIRST_TOKEN), self.now_s)),
            )


def play(seed: int, faults: Faults) -> Run:
    run = Run(seed, faults)
    run.play()
    decode, prefill = run.ends["decode"], run.ends["prefill"]
    if run.down.alive:
        assert run.receiver.is_over
        assert len(decode) == (run.receiver.state != "cancelled")
        if decode and isinstance(decode[0], Complete):
            assert run.store == {token: token for token in range(run.num_tokens)}
            assert run.first_tokens == [FIRST_TOKEN]
        assert run.first_tokens in ([], [FIRST_TOKEN])
    if run.up.alive and run.sender is not None:
        assert run.sender.is_over
        assert len(prefill) == 1, "the blocks go back exactly once"
        if isinstance(prefill[0], ReleaseBlocks) and run.down.alive and run.receiver.state != "cancelled":
            assert not isinstance(decode[0], Lost) or decode[0].first_token is None
    return run


def outcomes(runs: list[Run]) -> Counter:
    return Counter(run.receiver.state.value for run in runs)


def test_a_good_stream_always_completes():
    runs = [play(seed, Faults()) for seed in range(60)]
    assert outcomes(runs) == {"complete": 60}
    assert all(isinstance(run.ends["prefill"][0], ReleaseBlocks) for run in runs)
    assert any(run.receiver.counters.frames > 6 for run in runs)


def test_damaged_frames_are_fetched_again_or_the_hand_over_is_lost():
    runs = [play(seed, Faults(damage=0.25)) for seed in range(100)]
    assert outcomes(runs).keys() == {"complete", "lost"}
    assert any(run.receiver.counters.refetches and run.receiver.state == "complete" for run in runs)
    lost = [run.ends["decode"][0].reason for run in runs if run.receiver.state == "lost"]
    assert set(lost) == {"corrupted"}


@pytest.mark.parametrize(
    "faults",
    [
        Faults(drop=0.05),
        Faults(duplicate=0.3),
        Faults(truncate=0.03),
        Faults(flip=0.1),
        Faults(crash=0.5, delay_s=0.1),
        Faults(freeze=0.5, delay_s=0.1),
        Faults(cancel=0.7, delay_s=0.1),
        Faults(fail=0.7, delay_s=0.1),
        Faults(delay_s=0.9),
        Faults(0.1, 0.1, 0.02, 0.1, 0.01, 0.02, 0.1, 0.1, 0.1, 0.1),
    ],
    ids=["drop", "duplicate", "truncate", "flip", "crash", "freeze", "cancel", "fail", "slow", "all"],
)
def test_every_run_ends_and_gives_everything_back(faults):
    runs = [play(seed, faults) for seed in range(60)]
    seen = outcomes(runs)
    assert seen["complete"], "the faults leave nothing to test"
    if not faults.duplicate or faults.drop:
        assert len(seen) > 1, "the faults never bit"
    else:
        assert sum(run.receiver.counters.duplicates for run in runs) > 60


def test_a_run_is_the_same_twice():
    faults = Faults(0.1, 0.1, 0.02, 0.1, 0.01, 0.02, 0.1, 0.1, 0.1, 0.1)
    first, second = play(7, faults), play(7, faults)
    assert (first.now_s, first.ends) == (second.now_s, second.ends)
