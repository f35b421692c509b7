"""GPUs of a plan: which have faults, which are cordoned, and which are spare. Pure.

A worker whose GPU is cordoned moves to a spare GPU. Without one it is not started again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

MAX_FAULTS = 3  # within FAULT_WINDOW_S: one more, and the GPU is cordoned
FAULT_WINDOW_S = 3600.0


class Devices:
    """GPUs of this machine by their index, as the plan counts them."""

    def __init__(self, spare: Iterable[int] = ()) -> None:
        """`spare`: GPUs on which the plan has no worker."""
        self._spare = deque(spare)
        self._cordoned: dict[int, str] = {}
        self._faults: dict[int, deque[float]] = {}

    @property
    def cordoned(self) -> dict[int, str]:
        """Cordoned GPUs with the reason."""
        return dict(self._cordoned)

    @property
    def spare(self) -> tuple[int, ...]:
        """GPUs without a worker."""
        return tuple(self._spare)

    def faulted(self, gpu: int, now_s: float) -> bool:
        """A worker ended because its GPU spoiled its work. True: too often; the caller cordons the GPU."""
        faults = self._faults.setdefault(gpu, deque(maxlen=MAX_FAULTS + 1))
        faults.append(now_s)
        return len(faults) > MAX_FAULTS and now_s - faults[0] <= FAULT_WINDOW_S

    def cordon(self, gpu: int, reason: str) -> int | None:
        """Use a GPU never again; returns a spare one for its worker, or None."""
        self._cordoned.setdefault(gpu, reason)
        return self._spare.popleft() if self._spare else None

    def take(self, gpu: int) -> None:
        """A worker of a further place uses a GPU; if it is spare, it is so no more."""
        if gpu in self._spare:
            self._spare.remove(gpu)

    def give_back(self, gpu: int) -> None:
        """A GPU has no worker any more. It is spare, unless it is cordoned."""
        if gpu not in self._cordoned and gpu not in self._spare:
            self._spare.append(gpu)
