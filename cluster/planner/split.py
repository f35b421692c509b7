"""Numbers of prefill and decode workers, their bounds, and how too few are divided. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ...core.request import Role
from .config import PlannerConfig


class Split(NamedTuple):
    """Workers of each role."""

    prefill: int
    decode: int

    @property
    def total(self) -> int:
        """Of both roles."""
        return self.prefill + self.decode

    def of(self, role: Role) -> int:
        """Of one role."""
        return self.prefill if role is Role.PREFILL else self.decode

    def grown(self, role: Role, count: int = 1) -> Split:
        """With `count` more of a role."""
        if role is Role.PREFILL:
            return Split(self.prefill + count, self.decode)
        return Split(self.prefill, self.decode + count)

    def shrunk(self, role: Role) -> Split:
        """With one less of a role."""
        return self.grown(role, -1)

    def moved(self, role: Role) -> Split:
        """With one worker of the other role in this one."""
        other = Role.DECODE if role is Role.PREFILL else Role.PREFILL
        return self.grown(role).shrunk(other)


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bounds of each role and of both together."""

    min_prefill: int
    max_prefill: int
    min_decode: int
    max_decode: int
    fewest: int
    most: int

    @classmethod
    def of(cls, config: PlannerConfig, num_configured: int) -> Bounds:
        """The configured bounds. Without a maximum, workers neither come nor go."""
        least = max(config.min_workers, config.min_prefill_workers + config.min_decode_workers)
        most = num_configured if config.max_workers is None else config.max_workers
        fewest = num_configured if config.max_workers is None else least
        return cls(
            config.min_prefill_workers,
            config.max_prefill_workers,
            config.min_decode_workers,
            config.max_decode_workers,
            fewest,
            max(most, least),
        )

    def least(self, role: Role) -> int:
        """Fewest workers of a role."""
        return self.min_prefill if role is Role.PREFILL else self.min_decode

    def largest(self, role: Role) -> int:
        """Most workers of a role."""
        return self.max_prefill if role is Role.PREFILL else self.max_decode

    def within(self, split: Split) -> Split:
        """The split within the bounds of each role; the total may exceed `most`."""
        return Split(
            min(max(split.prefill, self.min_prefill), self.max_prefill),
            min(max(split.decode, self.min_decode), self.max_decode),
        )


def divided(want: Split, total: int, bounds: Bounds) -> Split:
    """`total` workers, too few for `want`, so that the role with the higher load per worker has the least of it."""
    options = [
        Split(prefill, total - prefill)
        for prefill in range(bounds.min_prefill, total - bounds.min_decode + 1)
        if prefill <= bounds.max_prefill and total - prefill <= bounds.max_decode
    ]
    if not options:
        return want
    return min(options, key=lambda split: (lack(split, want), -split.prefill))


def lack(have: Split, want: Split) -> float:
    """The higher of both roles' ratios of need to workers."""
    return max(want.prefill / max(1, have.prefill), want.decode / max(1, have.decode))


def is_better(after: Split, before: Split, want: Split, hysteresis: float) -> bool:
    """True if `after` lacks less than `before` by more than the hysteresis."""
    return lack(after, want) * (1 + hysteresis) < lack(before, want)
