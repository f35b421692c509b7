"""How long a draining worker keeps the blocks of what it gave back. Pure: knows no clock, no stream, no engine.

    drain ── runs end by themselves ──▶ hand back ── fetches of what was given back ──▶ leave
            │◀───── hand_back_after_s ─────▶│◀── until all is fetched, nobody asks, or the deadline ──▶│

Who continues a request here asks for its blocks (Blocks.Fetch) at once, since its router sends it on at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ...core.request import SequenceKey

HAND_BACK_S = 1.5  # least time of a drain's grace that is left when running work is handed back
HAND_BACK_SHARE = 0.2  # at most, of a short grace
MOVE_SHARE = 0.5  # most of a grace that is kept for moving blocks
QUIET_S = 1.0  # without a fetch for so long, nobody wants the rest: it is computed, or was never needed


def hand_back_after_s(grace_s: float, kv_bytes: int, bytes_per_s: float) -> float:
    """When a drain of `grace_s` hands back what still runs, so that its `kv_bytes` can be fetched in time.

    `bytes_per_s`: of the link as measured; 0: not known, then only the least time is kept.
    """
    kept_s = min(HAND_BACK_S, grace_s * HAND_BACK_SHARE)
    if bytes_per_s > 0:
        kept_s = min(kept_s + kv_bytes / bytes_per_s, max(kept_s, grace_s * MOVE_SHARE))
    return grace_s - kept_s


class Departure:
    """What was given back and not fetched yet, and the fetches under way."""

    def __init__(self, quiet_s: float = QUIET_S) -> None:
        self.quiet_s = quiet_s
        self._left: set[SequenceKey] = set()
        self._running: Counter[SequenceKey] = Counter()
        self._changed_s = 0.0

    def gave_back(self, keys: Iterable[SequenceKey], now_s: float) -> None:
        """These choices go on at other workers."""
        self._left.update(keys)
        self._changed_s = now_s

    def fetch_began(self, key: SequenceKey, now_s: float) -> None:
        """Blocks are asked for on behalf of a choice; or of nobody who waits, with an empty key: not counted."""
        if not key.request_id:
            return
        self._running[key] += 1
        self._changed_s = now_s

    def fetch_ended(self, key: SequenceKey, now_s: float, *, is_whole: bool) -> None:
        """A fetch is over. `is_whole`: all that is here and was asked for has been sent."""
        if not key.request_id:
            return
        self._running[key] -= 1
        if not self._running[key]:
            del self._running[key]
        self._changed_s = now_s
        if is_whole:
            self._left.discard(key)

    def waits_until_s(self, now_s: float) -> float | None:
        """Time until which to wait for a change, if none comes before; None: the worker may leave."""
        if self._running:
            return float("inf")
        until_s = self._changed_s + self.quiet_s
        return until_s if self._left and now_s < until_s else None

    @property
    def num_left(self) -> int:
        """Choices whose blocks nobody has fetched."""
        return len(self._left)
