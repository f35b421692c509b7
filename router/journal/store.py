"""Where other routers find the resumable requests of a router that died. Knows no Redis."""

from __future__ import annotations

from typing import Any, Protocol

from .journal import Entry
from .stored import Stored


class Claim(Protocol):
    """A stored request, before it is taken over."""

    stored: Stored

    async def take(self) -> bool:
        """Become its owner. False: another router was quicker, or the store does not answer."""
        ...


class JournalStore(Protocol):
    """A store of resumable requests, written behind. Its failures cost resumability and nothing else."""

    def changed(self, entry: Entry) -> None:
        """A request of ours has begun, has a new piece, or is over; it is written with the next batch."""
        ...

    async def find(self, tenant: str, request_id: str) -> Claim | None:
        """A tenant's request of any router; None: it is not there.

        Raises:
            Unavailable: the store does not answer, and may have it.
        """
        ...

    def own(self, entry: Entry, claim: Any) -> None:
        """Write on behind what was stored of a request that was taken over by this claim."""
        ...

    def num_safe(self, entry: Entry) -> int | None:
        """Number of a request's pieces that are stored; None: all that will be, or the store does not answer."""
        ...

    async def forget(self, tenant: str, request_id: str) -> bool:
        """Delete a request; nothing of it is written any more. False: the store does not answer, and may have it."""
        ...

    async def close(self) -> None:
        """Write what is not written yet, if that is quick, and disconnect."""
        ...


class NoStore:
    """Memory only: requests of a router that died are lost."""

    def changed(self, entry: Entry) -> None:
        """Nothing is written."""

    async def find(self, tenant: str, request_id: str) -> Claim | None:
        """Nothing is there."""
        return None

    def own(self, entry: Entry, claim: Any) -> None:
        """There are no claims."""

    def num_safe(self, entry: Entry) -> int | None:
        """Nothing will be stored."""
        return None

    async def forget(self, tenant: str, request_id: str) -> bool:
        """Nothing is there."""
        return True

    async def close(self) -> None:
        """Nothing is open."""
