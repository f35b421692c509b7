"""Quotas of API keys: requests and tokens per minute, as token buckets. Pure.

A bucket holds one minute's worth and fills evenly. A request is taken when its bucket holds its cost, or is full; so
one that costs more than a minute's worth passes after a pause, and the bucket owes the rest. Tokens that were expected
and not used come back when the request ends.
"""

from __future__ import annotations

from dataclasses import dataclass

from ....core.errors import QuotaExceeded
from ....core.request import Allowance

MAX_BUCKETS = 10_000  # of keys with work in the last minute; more are full again first
_MINUTE_S = 60.0


@dataclass(slots=True)
class _Bucket:
    per_minute: float
    level: float
    at_s: float

    def fill(self, per_minute: float, now_s: float) -> None:
        """Advance to a time; the quota may have changed since."""
        rate = per_minute / _MINUTE_S
        self.per_minute = per_minute
        self.level = min(per_minute, self.level + rate * max(0.0, now_s - self.at_s))
        self.at_s = max(self.at_s, now_s)

    def wait_s(self, cost: float) -> float:
        """Time until a cost may be taken; 0: now."""
        lacking = min(cost, self.per_minute) - self.level
        return max(0.0, lacking) * _MINUTE_S / self.per_minute


class Quotas:
    """Buckets of all keys that have quotas."""

    def __init__(self) -> None:
        self._buckets: dict[tuple[str, str], _Bucket] = {}

    def __len__(self) -> int:
        return len(self._buckets)

    def check(self, allowance: Allowance | None, tokens: int, now_s: float) -> None:
        """Check that a request of this cost may be taken now. Takes nothing.

        Raises:
            QuotaExceeded: its key has used up its quota; `retry_after_s` is when it may be taken.
        """
        for what, per_minute, cost in _quotas(allowance, tokens):
            wait_s = self._bucket(allowance, what, per_minute, now_s).wait_s(cost)
            if wait_s > 0:
                raise QuotaExceeded(
                    f"this key's {per_minute:g} {what} per minute are used up; {cost} more are free in {wait_s:.1f} s",
                    retry_after_s=wait_s,
                )

    def take(self, allowance: Allowance | None, tokens: int, now_s: float) -> None:
        """Count a request that was checked."""
        for what, per_minute, cost in _quotas(allowance, tokens):
            self._bucket(allowance, what, per_minute, now_s).level -= cost
        self._forget(now_s)

    def give_back(self, allowance: Allowance | None, tokens: int, now_s: float, *, requests: int = 0) -> None:
        """Return tokens that were taken and not used, and `requests` that were not served after all."""
        for what, per_minute, _ in _quotas(allowance, tokens):
            bucket = self._bucket(allowance, what, per_minute, now_s)
            bucket.level = min(per_minute, bucket.level + (tokens if what == "tokens" else requests))

    def _bucket(self, allowance: Allowance | None, what: str, per_minute: float, now_s: float) -> _Bucket:
        assert allowance is not None
        key = (allowance.key, what)
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = _Bucket(per_minute, per_minute, now_s)
        bucket.fill(per_minute, now_s)
        return bucket

    def _forget(self, now_s: float) -> None:
        """Drop full buckets when there are many: a new one is full, too."""
        if len(self._buckets) > MAX_BUCKETS:
            for key, bucket in list(self._buckets.items()):
                bucket.fill(bucket.per_minute, now_s)
                if bucket.level >= bucket.per_minute:
                    del self._buckets[key]


def _quotas(allowance: Allowance | None, tokens: int) -> list[tuple[str, float, int]]:
    """Quotas of a key: what they count, how many per minute, and the cost of this request."""
    if allowance is None:
        return []
    found = [("requests", allowance.requests_per_minute, 1), ("tokens", allowance.tokens_per_minute, tokens)]
    return [(what, per_minute, cost) for what, per_minute, cost in found if per_minute is not None]
