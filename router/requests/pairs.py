"""Transport and measured speed of each pair of a prefill and a decode worker, as their hand-overs report them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

MAX_PAIRS = 1024  # the pair used longest ago is forgotten beyond it
WEIGHT = 0.2  # of the newest hand-over in a pair's speed


class PairKey(NamedTuple):
    """Names of the two workers."""

    prefill_worker: str
    decode_worker: str


@dataclass(slots=True)
class PairState:
    """Facts about one pair."""

    transport: str = "none"  # of planes, in the last hand-over
    reason: str = ""  # why it is not shared memory, where decode offered it
    bytes_per_s: float = 0.0  # moving average over the hand-overs by this transport; 0.0: none was large enough to tell
    handovers: int = 0
    bytes_moved: int = 0


class Pairs:
    """All pairs that handed over since this router began, the one used last at the end."""

    def __init__(self) -> None:
        self._state_by_pair: dict[PairKey, PairState] = {}

    def observe(self, pair: PairKey, report: Mapping[str, Any]) -> PairState | None:
        """Add the report of a request's hand-overs (the fields of HandoverReport). None: no bytes moved."""
        if not report["bytes_moved"]:
            return None
        state = self._state_by_pair.pop(pair, None) or PairState()
        self._state_by_pair[pair] = state
        while len(self._state_by_pair) > MAX_PAIRS:
            del self._state_by_pair[next(iter(self._state_by_pair))]
        if state.transport != report["transport"]:
            state.transport, state.bytes_per_s = report["transport"], 0.0
        state.reason = report["transport_reason"]
        state.handovers += 1
        state.bytes_moved += report["bytes_moved"]
        speed = report["bytes_per_s"]
        if speed:
            state.bytes_per_s += (speed - state.bytes_per_s) * (WEIGHT if state.bytes_per_s else 1.0)
        return state

    def keep(self, workers: frozenset[str]) -> None:
        """Forget the pairs with a worker that is not one of `workers`."""
        gone = [pair for pair in self._state_by_pair if not workers.issuperset(pair)]
        for pair in gone:
            del self._state_by_pair[pair]

    def facts(self) -> list[dict[str, Any]]:
        """One JSON-able value per pair, sorted by names: the fields of `PairKey` and `PairState`."""
        return [{**pair._asdict(), **asdict(state)} for pair, state in sorted(self._state_by_pair.items())]

    def speeds(self) -> dict[tuple[str, str, str], float]:
        """Bytes per second by (prefill worker, decode worker, transport)."""
        return {(*pair, state.transport): state.bytes_per_s for pair, state in self._state_by_pair.items()}
