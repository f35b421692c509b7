"""List and watch of one Service's EndpointSlices: what is asked next, and which addresses are known. Pure.

    list ──▶ watch from its version ──▶ events ──▶ the server ends the watch: watch again from the last version
     ▲                                     │
     ├── 410, that version is forgotten ◀──┤   at once; without an event since the last 410, after a wait
     └── no answer, a break, silence ◀─────┘   after a wait; the last known addresses stay

Waits double up to a bound and are spread by a random number that the driver draws: after an outage of the API server
not all processes of a cluster ask in the same instant.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .slices import Slice, Wanted, addresses_of

SHORT_WATCH_S = 1.0  # a watch that ends sooner without an event counts as a failure: who cuts it would do so again


@dataclass(frozen=True, slots=True)
class Waits:
    """Waits before an attempt that follows a failure."""

    first_s: float = 0.25
    longest_s: float = 15.0

    def wait_s(self, failures: int, draw: float) -> float:
        """Seconds after so many failures in a row (1 or more); `draw` in [0, 1) spreads them from half to 1.5 times."""
        return float(min(self.longest_s, self.first_s * 2 ** min(failures - 1, 20)) * (0.5 + draw))


@dataclass(frozen=True, slots=True)
class List:
    """Ask for all slices, after a wait."""

    after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Watch:
    """Ask for the changes since a version, after a wait."""

    version: str
    after_s: float = 0.0


class Watching:
    """What is known of one Service. Every method that ends an attempt returns the next one."""

    def __init__(self, wanted: Wanted, waits: Waits | None = None) -> None:
        self.addresses: frozenset[str] = frozenset()
        self._wanted = wanted
        self._waits = waits or Waits()
        self._slices: dict[str, Slice] = {}
        self._version = ""
        self._failures = 0  # in a row
        self._has_news = False  # an event has come since the last attempt began
        self._was_expired = False  # without progress since

    def listed(self, slices: Iterable[Slice], version: str) -> Watch:
        """All slices are these. The answer takes the place of all that was known."""
        self._slices = {each.name: each for each in slices}
        self._version = version
        self._has_news = False
        self._count()
        return Watch(version)

    def changed(self, each: Slice, version: str) -> None:
        """A slice is new or differs."""
        self._slices[each.name] = each
        self._progress(version)

    def deleted(self, name: str, version: str) -> None:
        """A slice is gone."""
        self._slices.pop(name, None)
        self._progress(version)

    def bookmarked(self, version: str) -> None:
        """Nothing has changed up to this version."""
        self._progress(version)

    def ended(self, lasted_s: float, draw: float) -> Watch:
        """The server has ended a watch, as it was asked to: nothing is lost."""
        if lasted_s < SHORT_WATCH_S and not self._has_news:
            return Watch(self._version, self._wait_s(draw))
        self._rest()
        self._has_news = False
        return Watch(self._version)

    def expired(self, draw: float) -> List:
        """The server has forgotten the version of the watch (410 Gone)."""
        if self._was_expired:
            return List(self._wait_s(draw))
        self._was_expired = True
        return List()

    def failed(self, draw: float) -> List:
        """No answer, a refusal, a broken or a silent connection. What is known stays."""
        return List(self._wait_s(draw))

    def _progress(self, version: str) -> None:
        self._version = version
        self._has_news = True
        self._rest()
        self._count()

    def _rest(self) -> None:
        self._failures = 0
        self._was_expired = False

    def _wait_s(self, draw: float) -> float:
        self._failures += 1
        return self._waits.wait_s(self._failures, draw)

    def _count(self) -> None:
        self.addresses = addresses_of(self._slices.values(), self._wanted)
