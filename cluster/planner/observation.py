"""What the planner is told: the workers with their loads, and the prompts that were dispatched. Plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...core.request import Role
from ...router.routing.coefficients import Coefficients

_COMING = ("joining", "suspect")


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """One worker as a router knows it."""

    name: str
    role: Role
    state: str  # a value of `WorkerState`
    queued_prompt_tokens: int = 0
    running: int = 0
    waiting: int = 0
    kv_tokens: int = 0  # in use or promised
    kv_capacity_tokens: int = 0
    max_num_seqs: int = 1
    prefill_ms_per_token: float = 0.0  # 0: not measured yet
    prefill_ms_per_token_pair: float = 0.0
    decode_step_ms: float = 0.0  # 0: not measured yet
    goes_after: str = ""  # worker that must go before it, because who runs them ends them in this order

    @property
    def is_live(self) -> bool:
        """True if it takes new work."""
        return self.state == "live"

    @property
    def is_coming(self) -> bool:
        """True if it is known and may serve soon, or again."""
        return self.state in _COMING

    @property
    def is_draining(self) -> bool:
        """True if it only finishes its work."""
        return self.state == "draining"

    @property
    def is_empty(self) -> bool:
        """True if it has no work at all."""
        return self.running == 0 and self.waiting == 0 and self.queued_prompt_tokens == 0


@dataclass(frozen=True, slots=True)
class Prompts:
    """Sums over all prompts dispatched since a router began; only differences have a meaning."""

    count: int = 0
    tokens: int = 0  # to compute: without what a prefix cache held
    tokens_squared: int = 0  # sum of the squares of each prompt's tokens


@dataclass(frozen=True, slots=True)
class Observation:
    """State of one cluster at one time."""

    at_s: float  # when it was made, on the planner's clock
    source: str  # of the sums in `prompts`: a new one counts from zero again
    workers: tuple[WorkerReport, ...]
    prompts: Prompts

    def live(self, role: Role) -> list[WorkerReport]:
        """Workers of a role that take new work, sorted by name."""
        found = [worker for worker in self.workers if worker.role is role and worker.is_live]
        return sorted(found, key=lambda worker: worker.name)

    def find(self, name: str) -> WorkerReport | None:
        """The worker of that name, or None."""
        return next((worker for worker in self.workers if worker.name == name), None)


def work_of(worker: WorkerReport) -> tuple[int, int, str]:
    """Order of workers by what they would leave behind: streams run on beside the new role's work."""
    return (worker.running + worker.waiting, worker.queued_prompt_tokens, worker.name)


def prefill_ms(worker: WorkerReport, tokens: float, tokens_squared: float) -> float:
    """Time that a worker needs for prompts with these sums, in ms: a·u + b·u²/2, as in router/routing/coefficients."""
    speed = Coefficients(worker.prefill_ms_per_token, worker.prefill_ms_per_token_pair)
    return speed.prefill_ms_per_token * tokens + speed.prefill_ms_per_token_pair * tokens_squared / 2


def observed(cluster: Mapping[str, Any], at_s: float) -> Observation:
    """The observation in a router's `GET /v1/cluster`. `at_s`: when the router was asked.

    Raises:
        KeyError, TypeError, ValueError: the document is of another release; it counts as missing.
    """
    sums, routers = cluster["prompts"], cluster.get("routers") or [cluster["router"]]
    return Observation(
        at_s=at_s,
        source="/".join(sorted(str(router["incarnation"]) for router in routers)),
        workers=tuple(_report(worker) for worker in cluster["workers"]),
        prompts=Prompts(int(sums["count"]), int(sums["tokens"]), int(sums["tokens_squared"])),
    )


def _report(worker: Mapping[str, Any]) -> WorkerReport:
    load, blocks, measured = worker["load"], worker["blocks"], worker["measured"]
    block_tokens = int(blocks["block_tokens"])
    used = int(blocks["total"]) - int(blocks["free"]) + int(blocks["promised"])
    return WorkerReport(
        name=str(worker["worker_id"]),
        role=Role(worker["role"]),
        state=str(worker["state"]),
        queued_prompt_tokens=int(load["queued_prefill_tokens"]),
        running=int(load["running"]),
        waiting=int(load["waiting"]),
        kv_tokens=max(0, used) * block_tokens,
        kv_capacity_tokens=int(blocks["total"]) * block_tokens,
        max_num_seqs=int(worker["max_num_seqs"]),
        prefill_ms_per_token=float(measured["prefill_ms_per_token"]),
        prefill_ms_per_token_pair=float(measured["prefill_ms_per_token_pair"]),
        decode_step_ms=float(measured["decode_step_ms"]),
    )
