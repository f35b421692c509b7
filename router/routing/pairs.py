"""Pairs of a prefill and a decode worker that can hand over to each other, best first, and the refused ones. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

from ...kv.handover.pairing import HandoverSide, why_refused

MAX_REFUSED = 16  # refused pairs that are kept for a report


class Named(HandoverSide, Protocol):
    """A worker, as it announced itself."""

    @property
    def worker_id(self) -> str:
        """Name of the worker."""
        ...


W = TypeVar("W", bound=Named)


class RefusedPair(NamedTuple):
    """A prefill and a decode worker that cannot hand over to each other."""

    prefill: str
    decode: str
    field: str  # of their announcements, that speaks against it
    reason: str


class Pairs(NamedTuple, Generic[W]):
    """Pairs in the order of their decode workers."""

    possible: list[tuple[W, W]]  # prefill, decode
    refused: list[RefusedPair]  # at most MAX_REFUSED


def pairs_of(prefill: Sequence[W], decode: Sequence[W], most: int) -> Pairs[W]:
    """The first `most` decode workers that can pair, each with its first `most` prefill workers.

    A worker that pairs with no other takes no place from those that do.
    """
    found: Pairs[W] = Pairs([], [])
    num_decode = 0
    for d in decode:
        mine: list[tuple[W, W]] = []
        for p in prefill:
            refused = why_refused(p, d)
            if refused is None:
                mine.append((p, d))
            elif len(found.refused) < MAX_REFUSED:
                found.refused.append(RefusedPair(p.worker_id, d.worker_id, refused.param or "", refused.message))
            if len(mine) == most:
                break
        found.possible.extend(mine)
        num_decode += bool(mine)
        if num_decode == most:
            break
    return found
