"""What a job asks of the worker's fetches: blocks of its prompt that other workers hold. Knows no stream, no engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ..core.request import CacheScope, SequenceKey
from ..engine.link.messages import Submit
from ..kv.handover.sources import BlockSource, FetchedBlocks


@dataclass(frozen=True, slots=True)
class Lacked:
    """A prompt whose blocks are fetched into this worker's prefix cache before the rest of it is computed."""

    key: SequenceKey  # of the request, in the cluster
    scope: CacheScope
    submit: Submit  # the job's own sequence, which follows
    sources: tuple[BlockSource, ...]  # ranked


class UnderWay(Protocol):
    """A fetch that has begun."""

    def cancel(self) -> None:
        """Fetch no more; its blocks are given back. No effect after its end."""
        ...


BeginReturn = Callable[[Lacked, Callable[[FetchedBlocks], None]], UnderWay | None]
"""Begin to fetch, and tell once what is cached now, never from inside the call. None: no source can help."""


def no_returns(lacked: Lacked, over: Callable[[FetchedBlocks], None]) -> UnderWay | None:
    """For a worker that fetches nothing."""
    del lacked, over
    return None
