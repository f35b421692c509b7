"""Actions whose effect the planner has not seen yet. One change of roles and one change of machines at a time. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...core.request import Role
from .config import PlannerConfig
from .observation import Observation

_ROLE_TIMEOUT_S = 30.0  # a worker announces its new role at once


@dataclass(frozen=True, slots=True)
class _Changing:
    worker: str
    role: Role
    since_s: float


@dataclass(frozen=True, slots=True)
class _Starting:
    roles: tuple[Role, ...]
    known: frozenset[str]  # workers before
    since_s: float


class Pending:
    """The actions under way."""

    def __init__(self, config: PlannerConfig) -> None:
        self._config = config
        self._changing: _Changing | None = None
        self._starting: _Starting | None = None
        self._draining: dict[str, float] = {}
        self._stopping: set[str] = set()
        self.failures: list[str] = []  # of the last `settle`

    @property
    def changes_role(self) -> bool:
        """True if a change of roles is under way."""
        return self._changing is not None

    @property
    def changes_machines(self) -> bool:
        """True if workers are starting, draining or stopping."""
        return self._starting is not None or bool(self._draining)

    @property
    def draining(self) -> tuple[str, ...]:
        """Workers that were told to drain and are not stopped yet."""
        return tuple(name for name in self._draining if name not in self._stopping)

    def starting_roles(self, observation: Observation) -> tuple[Role, ...]:
        """Roles of started workers that do not serve yet."""
        if self._starting is None:
            return ()
        return self._starting.roles[len(self._arrived(self._starting, observation)) :]

    def change(self, worker: str, role: Role, now_s: float) -> None:
        """A change of a role was decided."""
        self._changing = _Changing(worker, role, now_s)

    def start(self, roles: tuple[Role, ...], observation: Observation, now_s: float) -> None:
        """A start was decided."""
        self._starting = _Starting(roles, frozenset(worker.name for worker in observation.workers), now_s)

    def refused(self, count: int) -> None:
        """So many of the workers that were to start do not come; the last of them."""
        starting = self._starting
        if starting is not None:
            roles = starting.roles[: max(0, len(starting.roles) - count)]
            self._starting = replace(starting, roles=roles) if roles else None

    def drain(self, workers: tuple[str, ...], now_s: float) -> None:
        """A drain was decided."""
        self._draining.update(dict.fromkeys(workers, now_s))

    def stop(self, worker: str) -> None:
        """A stop was decided."""
        self._stopping.add(worker)

    def settle(self, observation: Observation, now_s: float) -> None:
        """Forget the actions whose effect is seen, and those that failed."""
        self.failures = []
        changing, starting = self._changing, self._starting
        if changing is not None:
            found = observation.find(changing.worker)
            if found is None or found.role is changing.role:
                self._changing = None
            elif now_s - changing.since_s > _ROLE_TIMEOUT_S:
                self.failures.append(f"{changing.worker} did not become {changing.role.value}")
                self._changing = None
        if starting is not None:
            arrived = self._arrived(starting, observation)
            if len(arrived) >= len(starting.roles):
                self._starting = None
            elif now_s - starting.since_s > self._config.start_timeout_s:
                self.failures.append(f"{len(starting.roles) - len(arrived)} started workers do not serve")
                self._starting = None
        for name in list(self._draining):
            if observation.find(name) is None:
                del self._draining[name]
                self._stopping.discard(name)

    def words(self, observation: Observation, now_s: float) -> tuple[str, ...]:
        """What is under way, for people."""
        said = []
        if self._changing is not None:
            said.append(f"{self._changing.worker} becomes {self._changing.role.value}")
        if self._starting is not None:
            left = self.starting_roles(observation)
            age_s = now_s - self._starting.since_s
            said.append(f"{len(left)} workers start ({', '.join(role.value for role in left)}), for {age_s:.0f} s")
        for name, since_s in self._draining.items():
            age_s = now_s - since_s
            if name in self._stopping:
                said.append(f"{name} stops")
            elif age_s > self._config.drain_timeout_s:
                said.append(f"{name} drains for {age_s:.0f} s: its streams are stuck, and it is not stopped with them")
            else:
                said.append(f"{name} drains, for {age_s:.0f} s")
        return tuple(said)

    @staticmethod
    def _arrived(starting: _Starting, observation: Observation) -> list[str]:
        return [w.name for w in observation.workers if w.is_live and w.name not in starting.known]
