"""The interface of routing policies that are compared with the production one, and the plain ones among them.

A policy sees what a router knows: workers with their last load reports and its own dispatches (`known_worker.py`), and
the prefix map's answer. It names workers; everything else is the production lifecycle.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import NamedTuple, Protocol

from ...core.request import Role
from ...router.routing.candidates import RequestFacts
from ...router.routing.known_worker import Worker


class Stage(Enum):
    """What the worker is wanted for."""

    WHOLE = "whole"  # prompt and answer
    PREFILL = "prefill"
    DECODE = "decode"


class Question(NamedTuple):
    """One choice to make."""

    request: RequestFacts
    stage: Stage
    workers: Sequence[Worker]  # not empty, by name
    held_tokens: Mapping[str, int]  # leading tokens of the prompt by worker, predictions included; absent: none

    def held(self, worker: Worker) -> int:
        """Leading tokens of the prompt that a worker holds, or soon will."""
        return min(self.held_tokens.get(worker.facts.worker_id, 0), self.request.prompt_tokens)


class Query(NamedTuple):
    """A request that asks for workers."""

    request: RequestFacts
    workers: Sequence[Worker]  # all live ones, by name; one decodes
    held_tokens: Mapping[str, int]  # as in `Question`


class Route(NamedTuple):
    """The chosen workers."""

    decode: Worker
    prefill: Worker | None  # None: the decode worker computes the prompt


class RoutingPolicy(Protocol):
    """A policy that is compared with the production one."""

    name: str

    def route(self, query: Query) -> Route:
        """The workers for a request."""
        ...


class ByStage(ABC):
    """A policy that picks one worker per stage."""

    name: str

    @abstractmethod
    def pick(self, question: Question) -> Worker:
        """The worker for a stage of a request."""

    def route(self, query: Query) -> Route:
        """One pick per stage."""
        request, held = query.request, query.held_tokens
        picked = {
            stage: self.pick(Question(request, stage, those, held)) for stage, those in stages(query.workers).items()
        }
        decode = picked[Stage.DECODE] if Stage.DECODE in picked else picked[Stage.WHOLE]
        return Route(decode, picked.get(Stage.PREFILL))


def stages(workers: Sequence[Worker]) -> dict[Stage, list[Worker]]:
    """Stages that a request goes through in such a cluster, and the workers for each.

    A cluster with prefill workers uses them for every prompt: that is how the compared routers do it.
    """
    prefill = [w for w in workers if w.role is Role.PREFILL]
    decode = [w for w in workers if w.role is not Role.PREFILL]
    if prefill and any(w.role is Role.DECODE for w in decode):
        return {Stage.PREFILL: prefill, Stage.DECODE: [w for w in decode if w.role is Role.DECODE]}
    return {Stage.WHOLE: decode}


def load_of(worker: Worker) -> int:
    """Requests under way on a worker, as its router counts them."""
    return len(worker.in_flight)


class RoundRobin(ByStage):
    """Each worker in turn."""

    name = "round-robin"

    def __init__(self) -> None:
        self._next: dict[Stage, int] = {}

    def pick(self, question: Question) -> Worker:
        """The next worker in the order of names."""
        place = self._next.get(question.stage, 0)
        self._next[question.stage] = place + 1
        return question.workers[place % len(question.workers)]


class LeastLoaded(ByStage):
    """The worker with the fewest requests under way."""

    name = "least-loaded"

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    def pick(self, question: Question) -> Worker:
        """The fewest requests; equal ones at random."""
        return min(question.workers, key=lambda w: (load_of(w), self._chance.random()))


class PowerOfTwo(ByStage):
    """The less loaded of two random workers. Source: Mitzenmacher 2001."""

    name = "power-of-two"

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    def pick(self, question: Question) -> Worker:
        """Two different ones, if there are two."""
        two = self._chance.sample(list(question.workers), min(2, len(question.workers)))
        return min(two, key=load_of)


class PrefixOnly(ByStage):
    """The worker that holds most of the prompt, whatever its load; equal ones by fewest requests."""

    name = "prefix-only"

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    def pick(self, question: Question) -> Worker:
        """The longest held prefix."""
        return min(question.workers, key=lambda w: (-question.held(w), load_of(w), self._chance.random()))
