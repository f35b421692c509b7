"""Cordoned GPUs that workers reported before they left, for `status`. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .facts import GpuFacts

MAX_CORDONED = 256


class Cordoned(NamedTuple):
    """A cordoned GPU."""

    gpu: GpuFacts
    worker_id: str  # the worker that computed on it
    at_s: float


class CordonedGpus:
    """Cordoned GPUs by UUID, until a worker reports that its GPU is in use again."""

    def __init__(self) -> None:
        self._found: dict[str, Cordoned] = {}

    def see(self, worker_id: str, gpus: Iterable[GpuFacts], now_s: float) -> None:
        """A worker reported its GPUs."""
        for gpu in gpus:
            if gpu.verdict != "cordon":
                self._found.pop(gpu.uuid, None)
            elif gpu.uuid in self._found:
                self._found[gpu.uuid] = self._found[gpu.uuid]._replace(gpu=gpu)
            else:
                self._found[gpu.uuid] = Cordoned(gpu, worker_id, now_s)
                while len(self._found) > MAX_CORDONED:
                    del self._found[next(iter(self._found))]

    def all(self) -> list[Cordoned]:
        """All of them, oldest first."""
        return list(self._found.values())
