"""One request on its simulated workers, and what a worker tells of it. Plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from ...kv.block import BlockId, BlockIdentity
from ...router.routing.facts import LoadFacts

if TYPE_CHECKING:
    from .worker import SimWorker


@dataclass(slots=True, eq=False)
class Job:
    """One request on its workers."""

    name: str
    rank: int  # order of arrival
    prompt_tokens: int  # to be computed before the next token: after a preemption those that it generated too
    answer_tokens: int  # of the whole answer
    identities: tuple[BlockIdentity, ...]  # of full blocks
    decode: SimWorker
    is_for_peer: bool = False  # another worker than `decode` computes its prompt
    emitted: int = 0
    num_computed: int = 0
    likely_cached: int = 0  # when it arrived: an estimate
    cached_tokens: int | None = None  # found where its prompt was first computed; None: not begun
    blocks: list[BlockId] = field(default_factory=list)
    num_published: int = 0
    bound: list[BlockId] = field(default_factory=list)  # on the decode worker, while a peer computes
    missing_tokens: int = 0  # that the decode worker did not hold when it bound
    begun_step: int = 0  # while decoding: steps of its worker when it began
    life: int = 0  # rises when events planned for it are void

    @property
    def num_remaining(self) -> int:
        """Tokens of its prompt that are not computed."""
        return self.prompt_tokens - self.num_computed

    @property
    def num_expected(self) -> int:
        """Estimate of the tokens to be computed, made while it waits."""
        return self.num_remaining if self.num_computed else self.num_remaining - self.likely_cached


def rank_of(job: Job) -> int:
    """Key of the order of arrival."""
    return job.rank


class Report(NamedTuple):
    """What a worker tells the router after a step."""

    first: list[Job]  # have their first token
    ended: list[Job]
    stored: list[BlockIdentity]
    removed: list[BlockIdentity]
    load: LoadFacts | None
