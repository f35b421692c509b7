"""Ways to scale a simulated cluster: none, the production planner, and KEDA's rule per role."""

from __future__ import annotations

import math
from collections import deque

from ...cluster.planner.config import PlannerConfig
from ...cluster.planner.decision import ChangeRole, Drain, Start, Stop
from ...cluster.planner.law import Planner
from ...cluster.planner.observation import Observation, Prompts, WorkerReport
from ...core.request import Role
from .cluster import SimCluster, SimWorker


class NoControl:
    """A static split."""

    def act(self, cluster: SimCluster, now_s: float) -> None:
        """Nothing."""


class PlannerControl:
    """The production law: `cluster/planner/law.py` decides on the reports that a router would have."""

    def __init__(self, config: PlannerConfig, num_configured: int) -> None:
        self.planner = Planner(config, num_configured)

    def act(self, cluster: SimCluster, now_s: float) -> None:
        """Observe, decide, carry out."""
        action = self.planner.decide(observe(cluster, now_s), now_s).action
        by_name = {worker.name: worker for worker in cluster.workers}
        if isinstance(action, ChangeRole):
            cluster.change_role(by_name[action.worker], action.role)
        elif isinstance(action, Start):
            for role in action.roles:
                cluster.start(role)
        elif isinstance(action, Drain):
            for name in action.workers:
                cluster.drain(by_name[name])
        elif isinstance(action, Stop):
            cluster.stop(by_name[action.worker])


def observe(cluster: SimCluster, now_s: float) -> Observation:
    """What a router would report. Workers that start are not known to it."""
    workers = tuple(_report(cluster, worker) for worker in cluster.workers if now_s >= worker.ready_s)
    prompts = Prompts(cluster.prompts, cluster.prompt_tokens, cluster.prompt_tokens_squared)
    return Observation(now_s, "simulated", workers, prompts)


def _report(cluster: SimCluster, worker: SimWorker) -> WorkerReport:
    machine = cluster.machine
    return WorkerReport(
        name=worker.name,
        role=worker.role,
        state="draining" if worker.draining else "live",
        queued_prompt_tokens=worker.queued_tokens,
        running=len(worker.running),
        kv_tokens=round(worker.kv_tokens),
        kv_capacity_tokens=machine.kv_capacity_tokens,
        max_num_seqs=machine.max_num_seqs,
        prefill_ms_per_token=machine.prefill_ms_per_token,
        prefill_ms_per_token_pair=machine.prefill_ms_per_token_pair,
        decode_step_ms=worker.step_s * 1e3,
    )


class KedaControl:
    """KEDA's queue-length rule for each role, restated: desired = ceil(sum of the metric / target), every 15 s.

    Prefill: queued prompt tokens; decode: share of KV in use, per worker. Nothing happens within 10 % of the target; it
    grows at once, by four workers or to twice as many at most, and shrinks to the largest wish of the stabilisation
    window. Sources: keda.sh, "Scaling Deployments" (AverageValue); Kubernetes, "Horizontal Pod Autoscaling".
    """

    POLL_S = 15.0
    TOLERANCE = 0.1

    def __init__(self, queued_tokens: float, kv_share: float, stabilisation_s: float, bounds: tuple[int, int]) -> None:
        """`bounds`: of each role."""
        self._target = {Role.PREFILL: queued_tokens, Role.DECODE: kv_share}
        self._stabilisation_s = stabilisation_s
        self._bounds = bounds
        self._wishes: dict[Role, deque[tuple[float, int]]] = {role: deque() for role in self._target}
        self._next_s = 0.0

    def act(self, cluster: SimCluster, now_s: float) -> None:
        """Poll, scale, and stop what has drained."""
        for worker in [w for w in cluster.workers if w.draining and w.is_empty]:
            cluster.stop(worker)
        if now_s < self._next_s:
            return
        self._next_s = now_s + self.POLL_S
        for role in self._target:
            self._scale(cluster, role, now_s)

    def _scale(self, cluster: SimCluster, role: Role, now_s: float) -> None:
        pods = [worker for worker in cluster.workers if worker.role is role and not worker.draining]
        live = [worker for worker in pods if worker.is_live(now_s)]
        if role is Role.PREFILL:
            total = float(sum(worker.queued_tokens for worker in live))
        else:
            total = sum(worker.kv_tokens for worker in live) / cluster.machine.kv_capacity_tokens
        have = len(pods)
        ratio = total / (self._target[role] * max(1, len(live)))
        wish = have if abs(ratio - 1) <= self.TOLERANCE else math.ceil(total / self._target[role])
        wish = min(max(wish, self._bounds[0]), self._bounds[1], max(have + 4, 2 * have))
        wishes = self._wishes[role]
        wishes.append((now_s, wish))
        while wishes[0][0] < now_s - self._stabilisation_s:
            wishes.popleft()
        if wish > have:
            for _ in range(wish - have):
                cluster.start(role)
        elif (most := max(each for _, each in wishes)) < have:
            for worker in sorted(live, key=lambda w: w.began_s, reverse=True)[: have - most]:
                cluster.drain(worker)
