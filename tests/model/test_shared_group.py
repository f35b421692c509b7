"""Ranks of a group in processes of their own: equal bits at every rank, and an end of every wait."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TextIO

import numpy as np
import pytest
import torch
from support.engines import group_rank
from support.engines.group_rank import GENEROUS_S, REPEATS, SIZES, numbers

from twostroke.core.errors import RankLost, RanksDiffer
from twostroke.kernels.cpu import library as native
from twostroke.kernels.cpu.build import NativeUnavailable
from twostroke.model.parallel.shared_group import SharedMemoryGroup, shared_region

PAGE = 4096


@pytest.fixture(autouse=True)
def _kernels() -> None:
    try:
        native.load()
    except NativeUnavailable as error:
        pytest.skip(str(error))


@dataclass
class RankProcess:
    pid: int
    stdout: TextIO  # ends with the process


@contextmanager
def ranks(size: int, work: str, *, slot_bytes: int = PAGE, silence_s: float = GENEROUS_S) -> Iterator[list]:
    """The processes of a group, forks of one. Only a test of silence has one that can end it."""
    region = shared_region(size, slot_bytes)
    pipes = [os.pipe() for _ in range(size)]
    outs = [out for _, out in pipes]
    given = (region, size, slot_bytes, work, GENEROUS_S, silence_s, *outs)
    command = [sys.executable, "-P", group_rank.__file__, *map(str, given)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, pass_fds=(region, *outs))
    for mine in (region, *outs):
        os.close(mine)
    with ExitStack() as stack:
        reads = [stack.enter_context(os.fdopen(read)) for read, _ in pipes]
        stack.callback(parent.communicate)
        assert parent.stdout is not None
        processes = [
            RankProcess(int(pid), out) for pid, out in zip(parent.stdout.readline().split(), reads, strict=True)
        ]
        try:
            yield processes
        finally:
            for process in processes:
                with suppress(ProcessLookupError):  # it has ended and its parent knows it
                    os.kill(process.pid, signal.SIGKILL)


def said(process: RankProcess) -> str:
    return process.stdout.read()


def in_order(parts: list[np.ndarray]) -> np.ndarray:
    total = parts[0].copy()
    for part in parts[1:]:
        total = total + part
    return total


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_ranks_get_the_sum_in_the_order_of_ranks_whatever_the_delays(size: int) -> None:
    with ranks(size, "sums") as processes:
        answers = [said(process).splitlines() for process in processes]
    assert all(answer == answers[0] for answer in answers)
    assert len(answers[0]) == REPEATS
    for call, line in enumerate(answers[0]):
        kind = torch.bfloat16 if call % 3 == 2 else torch.float32
        given = [torch.from_numpy(numbers(rank, call, SIZES[call % len(SIZES)])).to(kind) for rank in range(size)]
        total = torch.from_numpy(in_order([x.float().numpy() for x in given])).to(kind)
        wide = torch.cat(given).repeat(3, 1)
        agreed = [str(call - 7 * rank) for rank in range(size)]
        assert line.split() == [str(call), group_rank._digest(wide), group_rank._digest(total), *agreed], call
    backwards = in_order([numbers(rank, 6, 4097) for rank in reversed(range(size))])
    assert size == 2 or not np.array_equal(backwards, in_order([numbers(rank, 6, 4097) for rank in range(size)]))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_and_a_frozen_rank_end_the_wait_of_the_others(number: int) -> None:
    with ranks(3, "one_sum", silence_s=1.0) as processes:
        for process in processes:
            assert process.stdout.readline() == "met\n"
        os.kill(processes[2].pid, number)
        for process in processes[:2]:
            assert said(process) == "RankLost rank 2 of 3 shows no sign of life True\n"


def test_a_rank_that_leaves_ends_the_wait_of_the_others() -> None:
    with ranks(2, "leave") as processes:
        assert said(processes[0]) == "RankLost rank 1 of 2 has left its group\n"


def test_a_rank_that_ends_its_step_early_is_noticed_by_all_and_they_go_on() -> None:
    with ranks(3, "differ") as processes:
        answers = [said(process) for process in processes]
    assert answers[0] == answers[1] == answers[2]
    assert answers[0].splitlines() == [
        f"0 {[9.0] * 8}", "1 the ranks of this model made different calls", f"2 {[9.0] * 8}", "[5, 5, 5]",
    ]  # fmt: skip


def test_a_rank_that_lives_and_does_not_call_ends_the_wait_at_its_deadline() -> None:
    region = shared_region(2, PAGE)
    here, other = (SharedMemoryGroup(region, rank, 2, PAGE, timeout_s=0.05) for rank in range(2))
    os.close(region)
    with pytest.raises(RankLost, match="rank 1 of 2 did not do its part in time"):
        here.all_reduce(torch.ones(3))
    assert other.lost_rank() == 1
    with pytest.raises(RankLost):
        other.agree(0)
    for each in (here, other):
        each.close()
        each.fail(0)  # nothing is left to fail
        assert each.lost_rank() is None


def test_a_rank_that_was_declared_gone_is_gone_for_all() -> None:
    region = shared_region(2, PAGE)
    groups = [SharedMemoryGroup(region, rank, 2, PAGE) for rank in range(2)]
    os.close(region)
    groups[0].fail(1)
    for group in groups:
        with pytest.raises(RankLost, match="rank 1"):
            group.all_gather(torch.ones(1, 3), 6)
        group.close()


def test_a_group_of_one_rank_changes_nothing() -> None:
    region = shared_region(1, PAGE)
    group = SharedMemoryGroup(region, 0, 1, PAGE)
    os.close(region)
    x = torch.randn(3000)
    assert torch.equal(group.all_reduce(x.clone()), x)
    wide = torch.randn(2, 5000)  # a row that is wider than a slot
    assert torch.equal(group.all_gather(wide, 5000), wide)
    assert torch.equal(group.all_gather(wide, 4990), wide[:, :4990])  # the last columns are padding
    counts = torch.tensor([3, 0, 1 << 30], dtype=torch.int32)
    assert torch.equal(group.all_reduce(counts.clone()), counts)
    assert group.agree(-(1 << 62)) == [-(1 << 62)]
    with pytest.raises(RanksDiffer):
        group.check(native.GROUP_DIFFERS)
    group.close()


def test_the_memory_has_no_name_in_a_file_system() -> None:
    region = shared_region(2, 1 << 20)
    assert "memfd:" in os.readlink(f"/proc/self/fd/{region}")
    assert os.fstat(region).st_nlink == 0
    assert not os.get_inheritable(region)
    os.close(region)
