"""Entrance of requests: quotas, bounds, and the queue in which they wait while no worker is free. Pure.

    admit: quota ── bounds (the queue's last ones may give way) ── predicted wait against the deadline ──▶ accepted
    wait ──▶ fair queue ── a worker is free ──▶ start

The queue stands here and not in the workers, because here all tenants meet, and a request that waits here can still go
to any worker. Each model has its own queue.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ....core.errors import DeadlineExceeded, Overloaded
from ....core.request import Allowance, Request
from ..state import Timer
from ..surroundings import Driver
from .bounds import Admission, AdmissionLimits, Offer
from .fair_queue import FairQueue, Ticket
from .quotas import Quotas

MOST_BYTES_PER_TOKEN = 16  # of a body; nearly all have fewer, so a body has more tokens than this says


@dataclass(frozen=True, slots=True)
class Announced:
    """What is known of a request before its body is read."""

    tenant: str
    priority: int
    allowance: Allowance | None
    size_bytes: int
    left_s: float  # until its deadline


@dataclass(frozen=True, slots=True)
class _Newcomer:
    ticket: Ticket
    model: str
    allowance: Allowance | None
    answer_ms: float  # that its answer takes at least
    left_s: float


class Entrance:
    """Quotas, admission and queues of one router."""

    def __init__(
        self,
        limits: AdmissionLimits,
        driver: Driver,
        has_room: Callable[[str], bool],
        start: Callable[[str, float], None],
    ) -> None:
        """`has_room(name)`: a worker is free for this request. `start(name, now_s)`: give it to a worker."""
        self.admission = Admission(limits)
        self.quotas = Quotas()
        self._driver = driver
        self._has_room = has_room
        self._start = start
        self._queues: dict[str, FairQueue] = {}  # by model; none is empty
        self._model_by_name: dict[str, str] = {}  # of requests that wait
        self._serving: Timer | None = None

    def __len__(self) -> int:
        return len(self._model_by_name)

    def __contains__(self, name: str) -> bool:
        return name in self._model_by_name

    @property
    def waiting_tokens(self) -> int:
        """Cost of all requests that wait."""
        return sum(queue.cost for queue in self._queues.values())

    def foresee(self, announced: Announced, now_s: float) -> None:
        """Refuse a request by what is known before its body is read, if it would be refused in any case.

        Raises:
            Overloaded, DeadlineExceeded: it would be. It is counted as a refusal.
        """
        tokens = announced.size_bytes // MOST_BYTES_PER_TOKEN
        share = announced.allowance.share if announced.allowance else 1.0
        ticket = Ticket("", announced.tenant, tokens, announced.priority, share)
        model = next(iter(self._queues)) if len(self._queues) == 1 else ""
        self._check(_Newcomer(ticket, model, announced.allowance, 0.0, announced.left_s), now_s)

    def admit(self, name: str, request: Request, answer_ms: float, left_s: float, now_s: float) -> list[str]:
        """Accept a request; returns the names of waiting ones that must give way to it, and be refused before `wait`.

        `answer_ms`: the time that its answer takes at least.

        Raises:
            Overloaded, DeadlineExceeded: it is refused, and nobody gives way.
        """
        ticket = _ticket(name, request)
        victims = self._check(_Newcomer(ticket, request.worker_model, request.allowance, answer_ms, left_s), now_s)
        self.quotas.take(request.allowance, request.num_tokens, now_s)
        return victims

    def accept(self, name: str, request: Request, now_s: float) -> None:
        """Count a request of `admit` as under way; those that give way to it are gone."""
        self.admission.offer(Offer(name, request.owner, request.num_tokens, request.timeout_s), now_s)

    def wait(self, name: str, request: Request, now_s: float) -> None:
        """A request waits for its turn; it may start at once."""
        queue = self._queues.setdefault(request.worker_model, FairQueue())
        queue.add(_ticket(name, request))
        self._model_by_name[name] = request.worker_model
        if len(queue) == 1:  # else no worker was free when the last one came
            self.serve(now_s)
        else:
            self._see(now_s)

    def leave(self, name: str, now_s: float) -> bool:
        """A request does not wait any more. False: it did not."""
        model = self._model_by_name.pop(name, None)
        if model is None:
            return False
        self._queues[model].remove(name)
        self._drop_if_empty(model)
        self._see(now_s)
        return True

    def settled(self, request: Request, generated: int, now_s: float, *, served: bool) -> None:
        """A request is over: its key gets back what it did not use. `served`: a worker had it."""
        used = request.num_choices * len(request.prompt_ids) + generated if served else 0
        unused = max(0, request.num_tokens - used)
        self.quotas.give_back(request.allowance, unused, now_s, requests=0 if served else 1)

    def wake(self) -> None:
        """Workers may be free: serve the queues soon, once however often this is called until then."""
        if self._queues and self._serving is None:
            self._serving = self._driver.later(0.0, self._serve_later)

    def serve(self, now_s: float) -> None:
        """Start the requests whose turn it is while workers are free."""
        for model in list(self._queues):
            queue = self._queues[model]
            while (ticket := queue.first()) is not None and self._has_room(ticket.name):
                queue.take()
                del self._model_by_name[ticket.name]
                self._start(ticket.name, now_s)
            self._drop_if_empty(model)
        self._see(now_s)

    def _serve_later(self, now_s: float) -> None:
        self._serving = None
        self.serve(now_s)

    def _check(self, newcomer: _Newcomer, now_s: float) -> list[str]:
        ticket, queue = newcomer.ticket, self._queues.get(newcomer.model)
        victims: list[Ticket] | None = []
        try:
            if newcomer.left_s <= 0:
                raise DeadlineExceeded("the request's deadline passed before it was admitted")
            self.quotas.check(newcomer.allowance, ticket.cost, now_s)
            num, excess = self.admission.excess(ticket.cost)
            if num or excess:
                victims = queue.displaced_by(ticket, num, excess) if queue else None
                if victims is None:
                    self.admission.check(ticket.cost, now_s)
            if queue:
                before = queue.cost_before(ticket)
                self.admission.check_wait(before, newcomer.answer_ms, newcomer.left_s, now_s)
        except (Overloaded, DeadlineExceeded):
            self.admission.refuse()
            raise
        return [victim.name for victim in victims or ()]

    def _drop_if_empty(self, model: str) -> None:
        if model in self._queues and not self._queues[model]:
            del self._queues[model]

    def _see(self, now_s: float) -> None:
        self.admission.full_rate.see(now_s, is_full=bool(self._queues))


def _ticket(name: str, request: Request) -> Ticket:
    share = request.allowance.share if request.allowance else 1.0
    return Ticket(name, request.owner, request.num_tokens, request.priority, share)
