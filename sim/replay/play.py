"""One run: a trace, a cluster and a policy, to the end of the last answer. The same seed gives the same result."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from ...core.errors import ConfigError
from ...core.request import Role
from ...protos import worker_pb2
from ...router.routing.facts import ModelFacts, WorkerFacts, WorkerKey
from .clock import VirtualClock
from .job import Job, Report
from .oracle import Oracle
from .peers import DynamoKv, LlmdWeighted, SglangCacheAware
from .policies import LeastLoaded, PowerOfTwo, PrefixOnly, RoundRobin, RoutingPolicy
from .router import MODEL, ReplayRouter
from .spec import HANDOVER_BYTES_PER_S, KV_BYTES_PER_TOKEN, STEP_LIMITS, ClusterSpec, policy_of
from .trace import Ask, Trace
from .worker import SimWorker, WorkerFrame

LAG_S = 0.002  # of every message between router and workers
SAMPLE_S = 0.5  # between looks at the imbalance
OURS = "ours"
ORACLE = "oracle"
_COMPARED: dict[str, Callable[[random.Random], RoutingPolicy]] = {
    "round-robin": lambda _: RoundRobin(),
    "least-loaded": LeastLoaded,
    "power-of-two": PowerOfTwo,
    "prefix-only": PrefixOnly,
    "sglang": SglangCacheAware,
    "dynamo": DynamoKv,
    "llm-d": LlmdWeighted,
}
QUEUE = "+queue"  # after a name: its requests wait in the router while all workers are full, as ours do
POLICIES = (OURS, *_COMPARED, ORACLE)


@dataclass(slots=True)
class Course:
    """What happened to one request."""

    arrived_s: float
    prompt_tokens: int
    answer_tokens: int
    first_s: float = 0.0
    ended_s: float = 0.0
    cached_tokens: int = 0

    @property
    def ttft_s(self) -> float:
        """Time to the first token, as the router has it."""
        return self.first_s - self.arrived_s

    @property
    def itl_s(self) -> float:
        """Mean time between tokens; 0 for an answer of one."""
        return (self.ended_s - self.first_s) / max(1, self.answer_tokens - 1)


@dataclass(slots=True)
class Played:
    """The result of a run."""

    policy: str
    courses: list[Course]
    ended_s: float = 0.0
    imbalance: float = 0.0  # most sequences on a worker of a role over their mean, weighted by time and load
    busy_share: float = 0.0  # of all workers' time, until the last arrival
    num_preemptions: int = 0
    gaps_ms: dict[int, int] = field(default_factory=dict)  # time between tokens, rounded up: number of tokens


class Replay:
    """A cluster, its router, and the requests of a trace."""

    def __init__(self, trace: Trace, spec: ClusterSpec, policy: str, seed: int = 1) -> None:
        """Raises ConfigError: a request fits in no worker."""
        _check_fit(trace, spec)
        self.clock = VirtualClock()
        self._trace = trace
        self._policy = policy
        self._ask_by_id = {f"r{place}": ask for place, ask in enumerate(trace.asks)}
        self.workers: dict[str, SimWorker] = {}
        self.router = ReplayRouter(self.clock, trace.block_tokens, self._send)
        compared = self._compared(policy.removesuffix(QUEUE), seed)
        if compared is not None:
            self.router.choose_by(compared, waits=policy.endswith(QUEUE) or policy == ORACLE)
        counts: dict[Role, int] = {}
        for role in spec.roles:
            place = counts[role] = counts.get(role, -1) + 1
            self._add(f"{role.value}-{place:03}", role, spec)
        self._courses = [Course(a.arrived_s, a.prompt_tokens, a.answer_tokens) for a in trace.asks]
        self._num_ended = 0
        self._most = self._mean = 0.0
        self._busy_s = 0.0

    def run(self) -> Played:
        """Play all requests."""
        self._arrive_next(0)
        self._sample(0.0)
        self.clock.run(lambda: self._num_ended == len(self._courses))
        assert not self.router.errors, self.router.errors[:5]
        played = Played(self._policy, self._courses, self.clock.now_s)
        played.imbalance = self._most / self._mean if self._mean else 1.0
        played.busy_share = self._busy_s / (len(self.workers) * max(self._trace.lasts_s, 1e-9))
        for worker in self.workers.values():
            played.num_preemptions += worker.num_preemptions
            for gap_ms, tokens in worker.gaps_ms.items():
                played.gaps_ms[gap_ms] = played.gaps_ms.get(gap_ms, 0) + tokens
        return played

    # ------------------------------------------------------------------ inside

    def _compared(self, name: str, seed: int) -> RoutingPolicy | None:
        if name == OURS:
            return None
        if name == ORACLE:
            return Oracle(self.workers, self._ask_by_id)
        return _COMPARED[name](random.Random(f"{seed}/{name}"))

    def _add(self, name: str, role: Role, spec: ClusterSpec) -> None:
        machine, unit = spec.machine, self._trace.block_tokens
        frame = WorkerFrame(name, role, machine, policy_of(role, machine), unit, self.clock, _handover_s)
        worker = SimWorker(frame, self._tell)
        self.workers[name] = worker
        model = ModelFacts(MODEL, b"w" * 16, b"", "", 1 << 25, 1000, False, "/", KV_BYTES_PER_TOKEN)
        seats, batch, blocks = machine.max_num_seqs, STEP_LIMITS.max_batch_tokens, worker.cache.pool.num_blocks
        self.router.add_worker(WorkerFacts(name, 1, role, "10.0.0.1:1", model, blocks, unit, seats, batch))

    def _arrive_next(self, place: int) -> None:
        if place < len(self._trace.asks):
            ask = self._trace.asks[place]

            def arrive(now_s: float) -> None:
                self.router.arrive(f"r{place}", ask, now_s)
                self._arrive_next(place + 1)

            self.clock.at(ask.arrived_s, arrive)
        else:
            self._busy_s = sum(worker.busy_s for worker in self.workers.values())

    def _send(self, key: WorkerKey, order: worker_pb2.Submit) -> None:
        place = int(order.request_id.partition("@")[0][1:])
        ask: Ask = self._trace.asks[place]
        decode = self.workers[key.worker_id]
        computes = self.workers[order.prefill_peers[0].worker_id] if order.prefill_peers else decode
        job = Job(order.request_id, place, ask.prompt_tokens, ask.answer_tokens, ask.identities, decode)
        job.is_for_peer = computes is not decode
        computes.coming.append(job)
        self.clock.later(LAG_S, lambda _: computes.submit(job))

    def _tell(self, worker: SimWorker, report: Report) -> None:
        self.clock.later(LAG_S, lambda now_s: self._hear(worker, report, now_s))
        if report.ended:
            for other in self.workers.values():
                if other.role is Role.PREFILL and other.waiting:
                    self.clock.later(LAG_S, lambda _, other=other: other.wake())  # type: ignore[misc]

    def _hear(self, worker: SimWorker, report: Report, now_s: float) -> None:
        for job in report.first:
            self._courses[job.rank].first_s = now_s
        for job in report.ended:
            course = self._courses[job.rank]
            course.ended_s, course.cached_tokens = now_s, job.cached_tokens or 0
        self._num_ended += len(report.ended)
        self.router.hear(worker.name, report, now_s)

    def _sample(self, now_s: float) -> None:
        if now_s <= self._trace.lasts_s:
            by_role: dict[Role, list[int]] = {}
            for worker in self.workers.values():
                count = len(worker.waiting) + len(worker.prefilling) + len(worker.decoding)
                by_role.setdefault(worker.role, []).append(count)
            for counts in by_role.values():
                self._most += max(counts)
                self._mean += sum(counts) / len(counts)
            self.clock.later(SAMPLE_S, self._sample)


def _check_fit(trace: Trace, spec: ClusterSpec) -> None:
    room = spec.machine.kv_capacity_tokens // trace.block_tokens * trace.block_tokens
    for place, ask in enumerate(trace.asks):
        if ask.prompt_tokens + ask.answer_tokens > room:
            what = f"{ask.prompt_tokens} prompt and {ask.answer_tokens} answer tokens"
            raise ConfigError(f"request {place} of the trace has {what}; a worker of {spec.machine.name} holds {room}")


def _handover_s(tokens: int) -> float:
    return tokens * KV_BYTES_PER_TOKEN / HANDOVER_BYTES_PER_S


def play(trace: Trace, spec: ClusterSpec, policy: str, seed: int = 1) -> Played:
    """One run of one policy."""
    return Replay(trace, spec, policy, seed).run()
