"""How things are timed on a GPU: interleaved rounds between events, a cold L2 before each, medians. Knows no kernel."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch

_WARM_UPS = 3


def interleaved_seconds(actions: Mapping[str, Callable[[], object]], rounds: int = 20) -> dict[str, list[float]]:
    """Device times of each action, taken in turn so that a drift of clocks meets all alike.

    The L2 cache is overwritten before each: a step of a real model finds it full of other layers. That takes long
    enough for the host to be ahead, so that no launch is timed.
    """
    flush = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    for action in actions.values():
        for _ in range(_WARM_UPS):
            action()
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            action()
            end.record()
            events[name].append((start, end))
        torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) / 1e3 for start, end in pairs] for name, pairs in events.items()}


def limits() -> dict[str, float]:
    """What this machine does at best: bytes per second read and copied (both ways), bf16 operations per second."""
    numbers = torch.ones(1 << 30, dtype=torch.float32, device="cuda")
    target = torch.empty_like(numbers)
    size = numbers.numel() * 4
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    actions: dict[str, Callable[[], object]] = {
        "read": numbers.sum,
        "copy": lambda: target.copy_(numbers),
        "matmul": lambda: a @ b,
    }
    best = {name: statistics.median(times) for name, times in interleaved_seconds(actions, rounds=7).items()}
    return {
        "read_bytes_per_s": size / best["read"],
        "copy_bytes_per_s": 2 * size / best["copy"],
        "bf16_flops_per_s": 2 * n**3 / best["matmul"],
    }
