"""Interfaces of the request lifecycle: the driver that carries out decisions, and the observer of events. Pure.

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
from ..routing.candidates import PolicyLimits
from ..routing.facts import ModelFacts, WorkerKey
from .admission.bounds import AdmissionLimits
from .state import RequestState, Timer

Order = worker_pb2.Submit | worker_pb2.CancelRequest


class Driver(Protocol):
    """Carries out the decisions of the lifecycle."""

    def send(self, key: WorkerKey, order: Order) -> bool:
        """Queue an order to a worker. False: it has no session, or its queue is full."""
        ...

    def later(self, delay_s: float, act: Callable[[float], None]) -> Timer:
        """Call `act` once with the time, after the delay; never before this call has returned."""
        ...

    def identities(self, request: Request, model: ModelFacts) -> Sequence[BlockIdentity]:
        """Block identities of the request's prompt, equal to those of the workers of this model."""
        ...


class Observer(Protocol):
    """Receives the events of the lifecycle, for metrics, logs and transcripts. Decides nothing."""

    def choosing(self) -> AbstractContextManager[object]:
        """Context that is entered while workers are chosen, to measure the time."""
        ...

    def refused(self, request: Request, error: TwostrokeError) -> None:
        """A request was not admitted."""
        ...

    def dispatched(self, run: RequestState) -> None:
        """A worker was chosen; its orders will be sent next."""
        ...

    def dropped(self, name: str, reason: str) -> None:
        """Tokens or an end from a worker were dropped."""
        ...

    def heard(self, run: RequestState, epoch: Epoch, num_tokens: int) -> None:
        """Tokens or an end (0 tokens) of this epoch were taken."""
        ...

    def first_token(self, run: RequestState, predicted_ms: float, took_ms: float) -> None:
        """The first token of a request arrived; both times count from its last dispatch."""
        ...

    def usage_differs(self, run: RequestState, said: int, had: int) -> None:
        """A worker's token count of a choice (`said`) differs from the delivered tokens (`had`)."""
        ...

    def sent_again(self, run: RequestState, error: TwostrokeError) -> None:
        """A request left its worker and is routed again."""
        ...

    def settled(self, run: RequestState) -> None:
        """A request is settled; `run.error` is set if it failed."""
        ...


@dataclass(frozen=True, slots=True)
class LifeLimits:
    """Bounds for every request."""

    worker_patience_s: float = 2.0  # longest wait for a worker that is known
    worker_return_s: float = 30.0  # longest wait for a lost decode worker to come back
    slow_client_s: float = 10.0  # longest time that a client may leave its buffer of pieces full
    buffer_pieces: int = 1024
    admission: AdmissionLimits = field(default_factory=AdmissionLimits)
    policy: PolicyLimits = field(default_factory=PolicyLimits)
    has_buddies: bool = False  # another worker keeps a copy of each stream's KV
