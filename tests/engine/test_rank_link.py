"""Plans and store operations reach every rank in order, and a message that is not the next one ends the receiver."""

import random
import socket
import struct
import threading
import zlib

import numpy as np
import pytest
from support.engines.plans import Life

from twostroke.core.errors import RankLost
from twostroke.core.request import SequenceKey
from twostroke.engine.link import rank_link
from twostroke.engine.link.rank_link import LinkEnded, RankReceiver, RankSender
from twostroke.engine.link.wire import WireError
from twostroke.engine.plan import StepPlan
from twostroke.engine.store_ops import FetchOp, SwapInOp, SwapOutOp, WriteOp
from twostroke.kv.section import SectionData

SWAP_OUT = SwapOutOp(SequenceKey("r", 1), 16, 32, (4, 5, 6), (1, 1, 2), (0, 7, 8), (0, 3, 3))


def linked(num_ranks: int) -> tuple[RankSender, list[RankReceiver]]:
    pairs = [socket.socketpair() for _ in range(num_ranks)]
    return RankSender([here for here, _ in pairs]), [RankReceiver(there) for _, there in pairs]


def never() -> None:
    """A look that finds nothing."""


@pytest.mark.parametrize("seed", range(5))
def test_plans_and_operations_arrive_in_order_at_every_rank(seed: int) -> None:
    draw = random.Random(seed)
    sender, receivers = linked(3)
    lives = [Life(f"r{n}", draw) for n in range(4)]
    sender.send_warm_up()
    sent: list[object] = [None]
    for step in range(30):
        if draw.random() < 0.3:
            op = SwapInOp(*(getattr(SWAP_OUT, name) for name in SwapInOp.__slots__))
            sender.send_operations([op] * 3)
            sent.append(op)
        plan = StepPlan(step, tuple(life.step() for life in lives if draw.random() < 0.8))
        sender.send_plan(plan)
        sent.append(plan)
    for receiver in receivers:
        assert [receiver.receive(never) for _ in sent] == sent
    sender.close()
    for receiver in receivers:
        with pytest.raises(LinkEnded):
            receiver.receive(never)
        receiver.close()


def test_an_operation_may_be_larger_than_the_sockets_buffers_and_other_for_each_rank() -> None:
    sender, receivers = linked(2)
    planes = np.arange(3 << 20, dtype=np.uint8).reshape(2, 1, 3, 1 << 19)
    digests = np.arange(2, dtype=np.uint64).reshape(2, 1, 1)
    ops = [
        WriteOp(
            *(SequenceKey("r", 0), 0, 3, (9,), (rank,)),
            (SectionData("main", "k", *(0, 2), rank, 1, 3, 1 << 19, planes, None, digests),),
        )
        for rank in (1, 2)
    ]
    sending = threading.Thread(target=lambda: sender.send_operations(ops))
    sending.start()
    for rank, receiver in enumerate(receivers, 1):
        got = receiver.receive(never)
        assert isinstance(got, WriteOp)
        assert (got.generations, got.sections[0].head_start) == ((rank,), rank)
        assert np.array_equal(got.sections[0].payload, planes)
    sending.join()


@pytest.mark.parametrize("change", ["repeated", "skipped", "damaged", "cut", "unknown", "no operation"])
def test_a_message_that_is_not_the_next_one_is_refused(change: str) -> None:
    here, there = socket.socketpair()
    tap, end = socket.socketpair()
    sender, receiver = RankSender([here]), RankReceiver(end)
    messages = []
    for number in range(3):
        sender.send_operations([FetchOp(number, 0, 16, (1,), (1,))])
        messages.append(there.recv(1 << 16))
    tap.sendall(messages[0])
    assert receiver.receive(never) == FetchOp(0, 0, 16, (1,), (1,))
    head = struct.Struct("<IIQ")
    bad = {
        "repeated": messages[0],
        "skipped": messages[2],
        "damaged": messages[1][:-1] + b"\xff",
        "cut": messages[1][:-1],
        "unknown": head.pack(2, zlib.crc32(b"xN"), 2) + b"xN",
        "no operation": head.pack(2, zlib.crc32(b"vT"), 2) + b"vT",
    }
    tap.sendall(bad[change])
    tap.close()
    with pytest.raises(LinkEnded if change == "cut" else WireError):
        receiver.receive(never)


def test_a_rank_that_is_gone_or_reads_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    sender, receivers = linked(2)
    receivers[1].close()
    with pytest.raises(RankLost, match="rank 2"):
        sender.send_warm_up()
    monkeypatch.setattr(rank_link, "SEND_TIMEOUT_S", 0.05)
    sender, receivers = linked(1)
    large = WriteOp(SequenceKey("r", 0), 0, 3, (9,) * 1_000_000, (), ())
    with pytest.raises(RankLost, match="rank 1"):
        sender.send_operations([large])
    receivers[0].close()


def test_an_idle_receiver_looks_after_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_link, "LOOK_S", 0.01)
    sender, (receiver,) = linked(1)
    looks: list[int] = []

    def look() -> None:
        looks.append(1)
        if len(looks) == 3:
            raise RankLost("rank 0 is gone")

    with pytest.raises(RankLost, match="rank 0 is gone"):
        receiver.receive(look)
    assert len(looks) == 3
    sender.close()
