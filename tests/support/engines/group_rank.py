"""Ranks of a group, forked by one process: `group_rank.py REGION SIZE SLOT_BYTES WORK TIMEOUT_S SILENCE_S FD…`.

One process imports torch, forks the ranks and prints their process ids. WORK is one of the functions below; a rank
writes a line per result to its FD, and the test compares the lines of all ranks.
"""

import hashlib
import os
import sys
import time

import numpy as np
import torch

from twostroke.core.errors import RanksDiffer
from twostroke.model.parallel.shared_group import SharedMemoryGroup

SIZES = (1, 15, 16, 17, 63, 1000, 4097)
REPEATS = 100
GENEROUS_S = 120.0


def numbers(rank: int, call: int, count: int) -> np.ndarray:
    """Numbers whose sum depends on the order of the additions."""
    draw = np.random.default_rng((rank, call))
    return (draw.standard_normal(count) * np.exp(4 * draw.standard_normal(count))).astype(np.float32)


def _digest(x: torch.Tensor) -> str:
    return hashlib.blake2b(x.contiguous().view(torch.uint8).numpy().tobytes(), digest_size=16).hexdigest()


def sums(group: SharedMemoryGroup) -> None:
    """Sums and gathers of many sizes, after delays that differ between ranks."""
    delays = np.random.default_rng(1000 + group.rank)
    for call in range(REPEATS):
        count = SIZES[call % len(SIZES)]
        dtype = torch.bfloat16 if call % 3 == 2 else torch.float32
        if delays.random() < 0.3:
            time.sleep(delays.random() * 0.003)
        x = torch.from_numpy(numbers(group.rank, call, count)).to(dtype)
        wide = group.all_gather(x.view(1, -1).repeat(3, 1), group.size * count)
        arrays = group.gather_bytes(x.view(torch.uint8).numpy().reshape(-1, 2), call % group.size)
        assert (arrays is None) == (group.rank != call % group.size)
        if arrays is not None:
            assert np.array_equal(np.concatenate(arrays).reshape(-1), wide[0].view(torch.uint8).numpy())
        print(call, _digest(wide), _digest(group.all_reduce(x)), *group.agree(call - 7 * group.rank))


def one_sum(group: SharedMemoryGroup) -> None:
    """Meet once, and then wait for the others in the next sum, unless this is the rank that gets lost."""
    group.agree(0)
    print("met", flush=True)
    if group.rank == group.size - 1:
        time.sleep(GENEROUS_S)
    began_s = time.monotonic()
    try:
        group.all_reduce(torch.ones(4))
    except Exception as error:
        print(type(error).__name__, error, time.monotonic() - began_s < GENEROUS_S / 2)


def leave(group: SharedMemoryGroup) -> None:
    """The last rank leaves without another call."""
    group.agree(0)
    if group.rank != group.size - 1:
        one_sum_failure(group)


def one_sum_failure(group: SharedMemoryGroup) -> None:
    try:
        group.all_reduce(torch.ones(4))
    except Exception as error:
        print(type(error).__name__, error)


def differ(group: SharedMemoryGroup) -> None:
    """Rank 1 ends its step early; all get an error, and go on together."""
    for step in range(3):
        x = torch.ones(8)
        try:
            if group.rank == 1 and step == 1:
                group.agree(-1)
            else:
                group.all_reduce(x)
                group.all_reduce(x)
            print(step, x.tolist())
        except RanksDiffer as error:
            print(step, error)
    print(group.agree(5))


def run_rank(rank: int, given: list[str], out: int) -> None:
    region, size, slot_bytes = map(int, given[:3])
    timeout_s, silence_s = map(float, given[4:6])
    os.dup2(out, sys.stdout.fileno())
    mine = SharedMemoryGroup(region, rank, size, slot_bytes, timeout_s=timeout_s, silence_s=silence_s)
    os.close(region)
    globals()[given[3]](mine)
    mine.close()
    sys.stdout.flush()


def main(given: list[str], outs: list[int]) -> None:
    torch.set_num_threads(1)
    pids = []
    for rank, out in enumerate(outs):
        pid = os.fork()
        if pid == 0:
            for other in outs[:rank] + outs[rank + 1 :]:
                os.close(other)
            code = 1
            try:
                run_rank(rank, given, out)
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    for out in outs:
        os.close(out)
    print(*pids, flush=True)
    for pid in pids:
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main(sys.argv[1:7], [*map(int, sys.argv[7:])])
