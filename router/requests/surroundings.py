"""What the life of a request needs around it: somebody who carries decisions out, and somebody who hears of them. Pure.

Two implementations of each: router/requests/dispatch.py under asyncio, sim/router.py in virtual time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from ...core.errors import TwostrokeError
from ...core.request import Epoch, Request
from ...kv.block import BlockIdentity
from ...protos import worker_pb2
from ..routing.facts import ModelFacts, WorkerKey
from ..routing.policy import PolicyLimits
from .admission import AdmissionLimits
from .run import RequestState, Timer

Order = worker_pb2.Submit | worker_pb2.CancelRequest


class Driver(Protocol):
    """What carries out the decisions."""

    def send(self, key: WorkerKey, order: Order) -> bool:
        """Queue an order to a worker. False: it has no session, or its queue is full."""
        ...

    def later(self, delay_s: float, act: Callable[[float], None]) -> Timer:
        """Call `act` with the time, once, after the delay; never before this call returned."""
        ...

    def identities(self, request: Request, model: ModelFacts) -> Sequence[BlockIdentity]:
        """The chain of the request's prompt, as workers of this model name its blocks."""
        ...


class Observer(Protocol):
    """Hears what happens, for metrics, logs and transcripts. Decides nothing."""

    def choosing(self) -> AbstractContextManager[object]:
        """Entered while a worker is chosen."""
        ...

    def refused(self, request: Request, error: TwostrokeError) -> None:
        """A request was not admitted."""
        ...

    def dispatched(self, run: RequestState) -> None:
        """A worker was chosen; its orders are about to leave."""
        ...

    def dropped(self, name: str, reason: str) -> None:
        """Something that a worker sent was not taken."""
        ...

    def heard(self, run: RequestState, epoch: Epoch, num_tokens: int) -> None:
        """Tokens or an end (0 tokens) of this epoch were taken."""
        ...

    def first_token(self, run: RequestState, predicted_ms: float, took_ms: float) -> None:
        """The first token of a request is there, counted from its last dispatch."""
        ...

    def usage_differs(self, run: RequestState, said: int, had: int) -> None:
        """A worker counted other tokens of a choice than arrived."""
        ...

    def sent_again(self, run: RequestState, error: TwostrokeError) -> None:
        """A request left its worker and is routed again."""
        ...

    def settled(self, run: RequestState) -> None:
        """The workers owe a request nothing any more; `run.error` says whether it failed."""
        ...


@dataclass(frozen=True, slots=True)
class LifeLimits:
    """Bounds on every request's life."""

    worker_patience_s: float = 2.0  # how long a request waits for a worker that may come
    slow_client_s: float = 10.0  # how long a client may leave its buffer of pieces full
    buffer_pieces: int = 1024
    admission: AdmissionLimits = field(default_factory=AdmissionLimits)
    policy: PolicyLimits = field(default_factory=PolicyLimits)
