"""One dispatch of a request to a worker, from its order to the moment when the request left that worker. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from ...core.errors import Overloaded, TwostrokeError
from ...core.request import Epoch
from ...core.timeline import Timeline
from ..routing.candidates import RoutingDecision
from ..routing.facts import WorkerKey

CONFIRMS = "orders.confirm.1"
"""Capability of workers that say `OrderTaken`; those of an older release do not."""


class Left(NamedTuple):
    """Why and when a request left a worker before it was over."""

    at_s: float
    error: TwostrokeError
    drains: bool = False  # the worker leaves on purpose


@dataclass(slots=True, eq=False)
class Dispatch:
    """One dispatch of a request to a worker."""

    epoch: Epoch
    choice: RoutingDecision
    at_s: float
    resumed: tuple[int, ...] = ()  # tokens of each choice that the client had already; empty: none of any
    is_suspect: bool = False  # it was sent as one that may have killed a worker
    is_taken: bool = False  # its worker has confirmed the order of a choice
    prefill: WorkerKey | None = None  # that its worker last said computes a prompt next
    first_token_s: float | None = None
    left: Left | None = None  # None: it is the last one
    timeline: Timeline = field(default_factory=Timeline)  # instants of its worker, if the worker told them
    fetched: dict[str, int] = field(default_factory=dict)  # tokens whose blocks came from other workers, by worker

    @property
    def decode(self) -> WorkerKey:
        """The decode worker, which sends the tokens."""
        return self.choice.winner.decode.key

    @property
    def confirms(self) -> bool:
        """True if its worker confirms orders when it is asked to."""
        return CONFIRMS in self.choice.winner.decode.capabilities

    @property
    def is_resumed(self) -> bool:
        """True if the client had tokens when it was sent."""
        return any(self.resumed)

    @property
    def was_refused(self) -> bool:
        """True if its worker was full."""
        return self.left is not None and isinstance(self.left.error, Overloaded)

    @property
    def may_be_refused(self) -> bool:
        """True if a refusal is no failure: the worker is full, or has another suspect."""
        return self.is_suspect or not self.is_resumed

    @property
    def was_drained(self) -> bool:
        """True if its worker left on purpose."""
        return self.left is not None and self.left.drains

    def begins_with(self, choice: int) -> int:
        """Index of the first token of a choice that this dispatch generates."""
        return self.resumed[choice] if self.resumed else 0
