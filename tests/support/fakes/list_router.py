"""A request lifecycle and roster whose surroundings are lists: what it sends, its timers and its drops can be read."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

from twostroke.core import errors
from twostroke.core.request import Epoch, Request, Role, SamplingParams
from twostroke.core.timeline import Instant, Timeline
from twostroke.kv.block import BlockIdentity
from twostroke.protos import common_pb2, worker_pb2
from twostroke.router.requests.lifecycle import Lifecycle
from twostroke.router.requests.roster import Roster
from twostroke.router.requests.state import RequestState
from twostroke.router.requests.surroundings import LifeLimits
from twostroke.router.routing.facts import ModelFacts, WorkerFacts, WorkerKey
from twostroke.router.routing.fleet import Fleet, FleetLimits
from twostroke.router.routing.prefixes import PrefixMap

MODEL = ModelFacts("m", b"f" * 16, b"n" * 16, "", 4096, 1000, True, "", 1000)
LENGTH = common_pb2.FINISH_REASON_LENGTH
ERROR = common_pb2.FINISH_REASON_ERROR


class FakeTimer:
    def __init__(self, at_s: float, act: Callable[[float], None]) -> None:
        self.at_s, self.act, self.is_cancelled = at_s, act, False

    def cancel(self) -> None:
        self.is_cancelled = True


class Router:
    """A lifecycle whose surroundings are lists."""

    def __init__(
        self, *names: str, return_s: float = 0.0, capabilities: tuple[str, ...] = (), **limits: object
    ) -> None:
        """`return_s`: how long a lost decode worker may stay away while requests wait for it.

        `capabilities`: of every worker.
        """
        self.now_s = 0.0
        self.capabilities = capabilities
        self.sent: list[tuple[str, str]] = []  # worker, what
        self.timeouts_ms: list[int] = []  # of the orders that were sent
        self.orders: list[worker_pb2.Submit] = []
        self.full: set[str] = set()  # workers that take no order beyond the first that is sent to them
        self.timers: list[FakeTimer] = []
        self.drops: list[str] = []
        self.wires: list[str] = []
        self.lost_runs: list[str] = []
        self.up: set[WorkerKey] = set()
        self.roster = Roster(Fleet(FleetLimits(return_s=return_s)), PrefixMap(), self)
        self.life = Lifecycle(7, LifeLimits(worker_return_s=return_s, **limits), self.roster, self, self)  # type: ignore[arg-type]
        for name in names:
            self.join(name)

    # ---------------------------------------------------------------- workers

    def join(
        self, name: str, incarnation: int = 1, role: Role = Role.COMBINED, capabilities: tuple[str, ...] = ()
    ) -> WorkerKey:
        named = (*self.capabilities, *capabilities)
        facts = WorkerFacts(name, incarnation, role, f"{name}:1", MODEL, 1000, 16, 16, 2048, capabilities=named)
        self.roster.announced(facts, self.now_s)
        self.roster.session_up(facts.key, facts, self.now_s)
        self.up.add(facts.key)
        return facts.key

    def connect(self, facts: WorkerFacts) -> None:
        self.wires.append(f"connect {facts.worker_id} #{facts.incarnation}")

    def reset(self, key: WorkerKey) -> None:
        self.wires.append(f"reset {key.worker_id} #{key.incarnation}")

    def disconnect(self, facts: WorkerFacts) -> None:
        self.wires.append(f"disconnect {facts.worker_id} #{facts.incarnation}")

    def lost(self, change) -> None:
        self.up.discard(change.worker.key)
        self.life.lost(change.worker.key, change.reason, self.now_s, has_left=change.has_left)

    def changed(self) -> None:
        if hasattr(self, "life"):
            self.life.workers_changed()

    # ---------------------------------------------------------------- driver

    def send(self, key, order) -> bool:
        if key not in self.up:
            return False
        if isinstance(order, worker_pb2.Submit):
            if key.worker_id in self.full and any(w == key.worker_id and "submit" in what for w, what in self.sent):
                return False
            self.timeouts_ms.append(order.timeout_ms)
            self.orders.append(order)
            self.sent.append((key.worker_id, f"submit {order.request_id}#{order.choice} @{order.epoch.counter}"))
        else:
            self.sent.append((key.worker_id, f"cancel {order.request_id} @{order.epoch.counter}"))
        return True

    def later(self, delay_s: float, act: Callable[[float], None]) -> FakeTimer:
        timer = FakeTimer(self.now_s + delay_s, act)
        self.timers.append(timer)
        return timer

    def identities(self, request, model) -> list[BlockIdentity]:
        return []

    def pass_s(self, seconds: float) -> None:
        """Let the timers of the next seconds act."""
        end_s = self.now_s + seconds
        while due := [t for t in self.timers if not t.is_cancelled and t.at_s <= end_s]:
            timer = min(due, key=lambda t: t.at_s)
            self.timers.remove(timer)
            self.now_s = max(self.now_s, timer.at_s)
            timer.act(self.now_s)
        self.now_s = end_s

    @property
    def num_timers(self) -> int:
        return sum(not timer.is_cancelled for timer in self.timers)

    # ---------------------------------------------------------------- observer

    def choosing(self):
        return nullcontext()

    def dropped(self, name: str, reason: str) -> None:
        self.drops.append(reason)

    def sent_again(self, run: RequestState, error: errors.TwostrokeError) -> None:
        self.lost_runs.append(run.request_id)

    def usage_differs(self, run: RequestState, said: int, had: int) -> None:
        raise AssertionError((said, had))

    def refused(self, *_: object) -> None: ...
    def dispatched(self, *_: object) -> None: ...
    def heard(self, *_: object) -> None: ...
    def first_token(self, *_: object) -> None: ...
    def settled(self, *_: object) -> None: ...

    # ---------------------------------------------------------------- requests

    def ask(self, request_id: str = "r", num_choices: int = 1, domain: str = "acme", **fields: object) -> RequestState:
        sampling = fields.pop("sampling", SamplingParams(max_tokens=5))
        request = Request(
            request_id,
            "m",
            fields.pop("prompt_ids", tuple(range(50))),
            sampling,
            num_choices,
            domain,
            fields.pop("timeout_s", 9.0),
        )
        timeline = Timeline()
        timeline.mark(Instant.ARRIVED, fields.pop("arrived_s", self.now_s))
        run = self.life.admit(request, timeline, self.now_s)
        self.life.begin(run, self.now_s)
        return run

    def tokens(self, run: RequestState, count: int = 1, choice: int = 0, epoch: Epoch | None = None) -> None:
        epoch = epoch or run.dispatches[-1].epoch
        output = worker_pb2.TokenOutput(request_id=run.name, choice=choice, token_ids=[1] * count)
        output.first_index = run.delivery.tokens_of(choice)
        output.epoch.incarnation, output.epoch.counter = epoch
        self.life.take_step(run.dispatches[-1].decode, worker_pb2.StepOutput(tokens=[output]), self.now_s)

    def taken(
        self, run: RequestState, peer: WorkerKey | None = None, choice: int = 0, epoch: Epoch | None = None
    ) -> None:
        """The request's worker confirms its order, or that a peer is about to compute its prompt."""
        taken = worker_pb2.OrderTaken(request_id=run.name, choice=choice)
        taken.epoch.incarnation, taken.epoch.counter = epoch or run.dispatches[-1].epoch
        if peer is not None:
            taken.peer.worker_id, taken.peer.incarnation = peer
        self.life.take_step(run.dispatches[-1].decode, worker_pb2.StepOutput(taken=[taken]), self.now_s)

    def end(
        self,
        run: RequestState,
        choice: int = 0,
        code: str | None = None,
        key: WorkerKey | None = None,
        missing: int = 0,
        *,
        handover: worker_pb2.HandoverReport | None = None,
    ) -> None:
        end = worker_pb2.RequestEnd(request_id=run.name, choice=choice, reason=ERROR if code else LENGTH)
        end.epoch.incarnation, end.epoch.counter = run.dispatches[-1].epoch
        end.usage.completion_tokens = run.delivery.tokens_of(choice) + missing
        if code:
            end.error.code, end.error.message = code, "no"
        if handover is not None:
            end.handover.CopyFrom(handover)
        key = key or run.dispatches[-1].decode
        self.life.take_step(key, worker_pb2.StepOutput(ends=[end]), self.now_s)

    def assert_nothing_is_left(self) -> None:
        admission = self.life.admission
        assert self.life.is_idle
        assert (len(admission), admission.tokens, self.life.entrance.waiting_tokens) == (0, 0, 0)
        assert admission.offered == admission.accepted + admission.rejected + admission.cancelled
        assert not [w.facts.worker_id for w in self.roster.fleet if w.in_flight]
        assert self.num_timers == 0
