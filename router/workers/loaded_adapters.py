"""Which adapters a newcomer is to have, learnt from what workers announce. Pure: no network, no clock.

Workers are the ones who know what they hold, and every router hears all of them: so routers agree without speaking to
each other, and one that starts learns from the workers that are there. An adapter comes when a worker that was known
gains a name that it was asked to hold, and goes when one loses it; a process that starts anew has lost nothing, it has
not been given it yet. What the configuration of a worker names is its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..routing.facts import AdapterFacts, WorkerFacts

MAX_ADAPTERS = 4096  # that are remembered


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to load under a name."""

    path: str
    digest: bytes


class LoadedAdapters:
    """Adapters that the cluster has been given, by name."""

    def __init__(self) -> None:
        self._wanted: dict[str, Wanted] = {}

    @property
    def wanted(self) -> Mapping[str, Wanted]:
        """What a worker that comes is to have."""
        return self._wanted

    def heard(self, before: WorkerFacts | None, after: WorkerFacts, *, is_learning: bool) -> bool:
        """Take an announcement. True: a newcomer taught something, so that others may lack it.

        `before`: what was known of this worker id; `is_learning`: this router has just started.
        """
        if before is not None and before.key == after.key:
            for lost in set(before.adapters) - set(after.adapters):
                self.gone(lost.name, lost.digest)
            for gained in set(after.adapters) - set(before.adapters):
                self._take(gained)
            return False
        unknown = [held for held in after.adapters if held.asked and held.name not in self._wanted]
        if is_learning:
            for held in unknown:
                self._take(held)
        return is_learning and bool(unknown)

    def gone(self, name: str, digest: bytes | None = None) -> None:
        """Forget a name; with `digest`, only if it is this adapter's."""
        known = self._wanted.get(name)
        if known is not None and digest in (None, known.digest):
            del self._wanted[name]

    def _take(self, held: AdapterFacts) -> None:
        if held.asked and (held.name in self._wanted or len(self._wanted) < MAX_ADAPTERS):
            self._wanted[held.name] = Wanted(held.path, held.digest)
