"""gloo between two processes under the link machines: the same bytes arrive, and each fault ends in an abort."""

from __future__ import annotations

import multiprocessing
import os
import signal

import pytest
import torch
from support.engines.paired_link import Destination, serve_source

SLOTS, SLOT_BYTES = 3, 1 << 20
PATIENCE_S = 60.0


@pytest.fixture
def source():
    """Start the source in a process of its own; returns it and the pipe of its control stream."""
    made = []

    def start(port: int, transfers: int):
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=serve_source, args=(theirs, port, transfers, (SLOTS, SLOT_BYTES), PATIENCE_S))
        process.start()
        theirs.close()
        made.append(process)
        return process, ours

    yield start
    for process in made:
        process.kill()
        process.join()


@pytest.fixture
def destination():
    made = []

    def make(join_s: float = PATIENCE_S, patience_s: float = PATIENCE_S) -> Destination:
        made.append(Destination(SLOTS, SLOT_BYTES, join_s, patience_s))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_planes_arrive_whole_and_in_order_in_few_slots(source, destination) -> None:
    ours = destination()
    process, pipe = source(ours.port, transfers=20)
    got = ours.receive(pipe, count=20)
    for transfer, planes in enumerate(got, 1):
        wanted = torch.arange(len(planes), dtype=torch.int64).mul(transfer).to(torch.uint8)
        assert torch.equal(planes, wanted), transfer
    assert ours.end.quarantined == frozenset()
    process.join(30)
    assert process.exitcode == 0, "the source did not get all its slots back"


def test_a_source_that_is_killed_aborts_the_link_and_frees_all_memory(source, destination) -> None:
    ours = destination()
    process, pipe = source(ours.port, transfers=1000)
    ours.receive(pipe, count=2)
    os.kill(process.pid, signal.SIGSTOP)
    ours.post_one_more()
    assert ours.end.quarantined
    process.kill()
    assert ours.until_aborted()
    assert ours.end.quarantined == frozenset()
    assert ours.freed, "the posted receive was in quarantine"


def test_a_source_that_freezes_is_given_up_after_the_patience_and_cannot_write_later(source, destination) -> None:
    ours = destination(patience_s=1.0)
    process, pipe = source(ours.port, transfers=1000)
    ours.receive(pipe, count=2)
    os.kill(process.pid, signal.SIGSTOP)
    ours.post_one_more()
    assert ours.until_aborted()
    assert ours.freed, "the posted receive was in quarantine"
    assert ours.end.quarantined == frozenset()
    ours.memory.fill_(7)
    pipe.close()
    os.kill(process.pid, signal.SIGCONT)
    process.join(5.0)  # time to write, if it could
    assert bool((ours.memory == 7).all()), "a frozen peer wrote after the abort"


def test_a_source_that_never_joins_fails_the_link_and_nothing_else(destination) -> None:
    ours = destination(join_s=0.5)
    assert ours.until_aborted()
    assert ours.channel.is_open is False
