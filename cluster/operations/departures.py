"""Workers that an operator sends away, and takes back while they still drain."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from ...core.errors import InvalidRequest
from .changes import Changes, Retired, Say


@dataclass(slots=True)
class _Departure:
    """One worker that goes. Who holds the lock decides whether it stays."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    stays: bool = False


class Departures:
    """Of one cluster, without those that the planner or a rolling restart ends: others took their place."""

    def __init__(self, changes: Changes) -> None:
        self._changes = changes
        self._going: dict[str, _Departure] = {}

    async def send_away(self, name: str, timeout_s: float, say: Say) -> Retired | None:
        """Let a worker drain for `timeout_s`, end it, and forget it. None: it was taken back meanwhile.

        Raises:
            InvalidRequest: no worker of this cluster has this name, or it goes already.
        """
        self._changes.let_go(name)
        departure = self._going[name] = _Departure()
        try:
            retired = await self._changes.drain(name, timeout_s, say)
            async with departure.lock:  # somebody may be taking it back at this moment
                if departure.stays:
                    return None
                del self._going[name]
        finally:
            self._going.pop(name, None)
        await self._changes.end(name)
        return retired

    async def take_back(self, name: str) -> None:
        """Have a worker that drains stay.

        Raises:
            InvalidRequest: no operator's drain of it is under way.
            Unavailable: it ends already.
        """
        departure = self._going.get(name)
        if departure is None:
            going = ", ".join(sorted(self._going)) or "none"
            raise InvalidRequest(
                f"{name} does not drain for an operator, so there is nothing to take back; those that do: {going}. One "
                "that has ended comes back when the planner wants one, or with `twostroke down` and `up`"
            )
        async with departure.lock:
            if self._going.get(name) is not departure:
                raise InvalidRequest(f"{name} has ended its work and goes")
            await self._changes.undrain(name)
            departure.stays = True
