"""The router of a replay: the production lifecycle, queue, fleet, roster and prefix map, driven in virtual time.

A compared policy replaces the choice alone: its chooser names workers at once on arrival, as those routers do. Tokens
come in two messages per request, the first one and the rest, because their number changes no decision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from ...core.errors import TwostrokeError
from ...core.request import Epoch, FinishReason, Request, Role, SamplingParams
from ...core.timeline import Instant, Timeline
from ...kv.block import BlockIdentity
from ...kv.messages import finish_to_wire
from ...kv.spec import HASH_BLOCK_TOKENS
from ...protos import common_pb2, worker_pb2
from ...router.requests.admission.bounds import AdmissionLimits
from ...router.requests.choosing import Chooser
from ...router.requests.lifecycle import Lifecycle
from ...router.requests.roster import Roster
from ...router.requests.state import RequestState
from ...router.requests.surroundings import LifeLimits, Order
from ...router.routing.candidates import Candidate, RoutingDecision, Terms
from ...router.routing.facts import ModelFacts, WorkerFacts, WorkerKey
from ...router.routing.fleet import Fleet, FleetChange, FleetLimits
from ...router.routing.prefixes import PrefixMap
from ...router.routing.views import views_of
from .clock import Planned, VirtualClock
from .job import Report
from .policies import Query, RoutingPolicy
from .trace import Ask

MODEL = "m"
NEVER_S = 1e9
TICK_S = 0.2
MAX_ANSWER_TOKENS = 4096  # that clients allow; an answer that is longer has its own length as limit


class TraceMap(PrefixMap):
    """The production prefix map, whose blocks are those of a trace; it answers in hash blocks of 16 tokens."""

    def __init__(self, block_tokens: int) -> None:
        super().__init__()
        self._scale = block_tokens // HASH_BLOCK_TOKENS

    def _match(
        self, identities: Sequence[BlockIdentity], candidates: int, tables: tuple[dict[bytes, int], ...]
    ) -> dict[str, int]:
        return {name: n * self._scale for name, n in super()._match(identities, candidates, tables).items()}


class ReplayRouter:
    """One router of a replay. Implements `Driver`, `Observer` and `Wires`."""

    def __init__(
        self, clock: VirtualClock, block_tokens: int, send: Callable[[WorkerKey, worker_pb2.Submit], None]
    ) -> None:
        """`send` carries an order to its worker."""
        self.clock = clock
        self.block_tokens = block_tokens
        self.prefixes = TraceMap(block_tokens)
        self.fleet = Fleet(FleetLimits(NEVER_S, NEVER_S, NEVER_S))
        self.roster = Roster(self.fleet, self.prefixes, self)
        bounds = AdmissionLimits(max_requests=1 << 40, max_tokens=1 << 60, max_wait_s=NEVER_S)
        self.limits = LifeLimits(buffer_pieces=1 << 30, admission=bounds)
        self.life = Lifecycle(1, self.limits, self.roster, self, self)
        self.errors: list[str] = []
        self._send = send
        self._sequence: dict[str, int] = {}
        self._facts: dict[str, WorkerFacts] = {}
        self._room_tokens = 0  # of a worker that decodes
        self._epoch: dict[str, worker_pb2.Epoch] = {}
        self._identities: dict[str, Sequence[BlockIdentity]] = {}
        self._run_by_id: dict[str, RequestState] = {}
        self._tick(0.0)

    def choose_by(self, policy: RoutingPolicy, *, waits: bool) -> None:
        """Another policy than the production one chooses.

        `waits`: its requests wait here while all workers are full.
        """
        self.life._chooser = _PolicyChooser(self, policy, waits=waits)

    def add_worker(self, facts: WorkerFacts) -> None:
        """A worker announces itself, opens its session and sends its empty snapshot."""
        self._facts[facts.worker_id] = facts
        if facts.role is not Role.PREFILL:
            self._room_tokens = facts.num_kv_tokens
        self.roster.announced(facts, 0.0)
        self.roster.session_up(facts.key, facts, 0.0)
        self.roster.watching(facts.key)
        self.prefixes.snapshot(facts.worker_id, 1, b"", last=True)
        self._sequence[facts.worker_id] = 1

    def arrive(self, request_id: str, ask: Ask, now_s: float) -> None:
        """A client's request arrives."""
        timeline = Timeline()
        timeline.mark(Instant.ARRIVED, now_s)
        most = max(ask.answer_tokens, min(MAX_ANSWER_TOKENS, self._room_tokens - ask.prompt_tokens))
        request = Request(
            request_id,
            MODEL,
            (0,) * ask.prompt_tokens,
            SamplingParams(max_tokens=most),
            num_choices=1,
            isolation_domain="t",
            timeout_s=NEVER_S,
            is_bounded=False,
        )
        self._identities[request_id] = ask.identities
        run = self.life.admit(request, timeline, now_s)
        self._run_by_id[request_id] = run
        self.life.begin(run, now_s)

    def hear(self, worker_id: str, report: Report, now_s: float) -> None:
        """A worker's report arrives."""
        key = self._facts[worker_id].key
        self.roster.beat(key, None, now_s)
        if report.stored or report.removed:
            self._sequence[worker_id] += 1
            stored, removed = b"".join(report.stored), b"".join(report.removed)
            self.prefixes.delta(worker_id, self._sequence[worker_id], stored, removed)
        for job in report.first:  # of a prompt that a peer computed, the decode worker tells the token
            first = worker_pb2.StepOutput()
            first.tokens.add(request_id=job.name, epoch=self._epoch[job.name], token_ids=(0,))
            self.life.take_step(self._facts[job.decode.name].key, first, now_s)
        output = worker_pb2.StepOutput()
        for job in report.ended:
            epoch = self._epoch[job.name]
            if job.answer_tokens > 1:
                rest = (0,) * (job.answer_tokens - 1)
                output.tokens.add(request_id=job.name, epoch=epoch, first_index=1, token_ids=rest)
            usage = common_pb2.Usage(completion_tokens=job.answer_tokens, cached_tokens=job.cached_tokens or 0)
            output.ends.add(request_id=job.name, epoch=epoch, reason=finish_to_wire(FinishReason.LENGTH), usage=usage)
        if report.ended:
            self.life.take_step(key, output, now_s)
        for job in report.ended:
            self._conclude(job.name)
        if report.load is not None:
            self.fleet.loaded(key, report.load, self._facts[worker_id].role, now_s)
            self.life.workers_changed()

    def _conclude(self, name: str) -> None:
        request_id = name.partition("@")[0]
        run = self._run_by_id.pop(request_id)
        while run.take_piece() is not None:
            pass
        self.life.conclude(run)
        del self._epoch[name], self._identities[request_id]

    def _tick(self, now_s: float) -> None:
        self.prefixes.tick(now_s)
        self.life.tick(now_s)
        self.clock.later(TICK_S, self._tick)

    # ------------------------------------------------------------------ Driver, Wires

    def send(self, key: WorkerKey, order: Order) -> bool:
        """Implements `Driver.send`."""
        if isinstance(order, worker_pb2.Submit):
            self._epoch[order.request_id] = order.epoch
            self._send(key, order)
        return True

    def later(self, delay_s: float, act: Callable[[float], None]) -> Planned:
        """Implements `Driver.later`."""
        return self.clock.later(delay_s, act)

    def identities(self, request: Request, model: ModelFacts) -> Sequence[BlockIdentity]:
        """Implements `Driver.identities`: those of the trace."""
        return self._identities[request.request_id]

    def connect(self, facts: WorkerFacts) -> None:
        """Implements `Wires.connect`: `add_worker` goes on."""

    def reset(self, key: WorkerKey) -> None:
        """Implements `Wires.reset`: no worker is lost here."""
        self.errors.append(f"{key.worker_id} was reset")

    def disconnect(self, facts: WorkerFacts) -> None:
        """Implements `Wires.disconnect`: no worker is lost here."""
        self.errors.append(f"{facts.worker_id} was disconnected")

    def lost(self, change: FleetChange) -> None:
        """Implements `Wires.lost`: no worker is lost here."""
        self.errors.append(f"{change.worker.worker_id} was lost: {change.reason}")

    def changed(self) -> None:
        """Implements `Wires.changed`."""
        self.life.workers_changed()

    # ------------------------------------------------------------------ Observer

    def choosing(self) -> AbstractContextManager[object]:
        """Implements `Observer.choosing`."""
        return nullcontext()

    def refused(self, request: Request, error: TwostrokeError) -> None:
        """Implements `Observer.refused`."""
        self.errors.append(f"{request.request_id} was refused: {error}")

    def dispatched(self, run: RequestState) -> None:
        """Implements `Observer.dispatched`."""

    def dropped(self, name: str, reason: str) -> None:
        """Implements `Observer.dropped`: nothing is late here."""
        self.errors.append(f"{name}: dropped: {reason}")

    def heard(self, run: RequestState, epoch: Epoch, num_tokens: int) -> None:
        """Implements `Observer.heard`."""

    def first_token(self, run: RequestState, predicted_ms: float, took_ms: float) -> None:
        """Implements `Observer.first_token`."""

    def usage_differs(self, run: RequestState, said: int, had: int) -> None:
        """Implements `Observer.usage_differs`."""
        self.errors.append(f"{run.name}: {said} tokens were said, {had} came")

    def sent_again(self, run: RequestState, error: TwostrokeError) -> None:
        """Implements `Observer.sent_again`."""
        self.errors.append(f"{run.name} was sent again: {error}")

    def settled(self, run: RequestState) -> None:
        """Implements `Observer.settled`."""
        if run.error is not None:
            self.errors.append(f"{run.name} failed: {run.error}")


class _PolicyChooser(Chooser):
    """A chooser whose decision is a compared policy's."""

    def __init__(self, router: ReplayRouter, policy: RoutingPolicy, *, waits: bool) -> None:
        super().__init__(router.life.runs.active, router.roster, router, router.limits)
        self._policy = policy
        self._waits = waits

    def choose(self, run: RequestState, now_s: float) -> RoutingDecision | None:
        """Ask the policy."""
        workers = self._roster.fleet.serving(run.request.worker_model)
        if self._waits:
            prompt = len(run.request.prompt_ids)
            workers = [w for w in workers if w.role is Role.PREFILL or w.has_seat(1, prompt)]
            if all(w.role is Role.PREFILL for w in workers):
                return None
        if run.identities is None:
            run.identities = self._driver.identities(run.request, run.model)
        expected = self._roster.prefixes.expected(run.identities, now_s)
        held = {name: blocks * HASH_BLOCK_TOKENS for name, blocks in expected.items()}
        decode, prefill = self._policy.route(Query(run.facts, workers, held))
        views = views_of([decode] if prefill is None else [decode, prefill])
        computes = prefill or decode
        has = [min(held.get(w.facts.worker_id, 0), run.facts.prompt_tokens - 1) for w in (computes, decode)]
        winner = Candidate(views[0], views[1] if prefill else None, has[0], has[1], Terms(0.0, 0.0, 0.0, 0.0, 0.0))
        self._roster.prefixes.predict([computes.facts.worker_id], run.identities, now_s)
        return RoutingDecision(winner, tuple(views[1:]), (winner,), self._policy.name)

    def has_room(self, run: RequestState) -> bool:
        """Without `waits` always: the compared routers send every request on."""
        return super().has_room(run) if self._waits else True
