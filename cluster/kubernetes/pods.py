"""Names of workers' pods: which role's pods they are counted among, and in which order they can go. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Protocol

from ...core.request import Role


class Pods(Protocol):
    """The pods of both roles."""

    names: Mapping[Role, str]  # of what is scaled
    resource: str  # the scale, as a Role of Kubernetes calls it

    def owner_of(self, worker: str) -> Role | None:
        """The role whose scale made a worker's pod, whatever it does now. None: none of these."""

    def order(self, workers: Iterable[str], replicas: Mapping[Role, int]) -> dict[str, str]:
        """For each worker that cannot go yet: the one that must go before it."""


class DeploymentPods:
    """Pods of a Deployment per role: NAME-HASH-HASH. One that is not ready goes first, so the order is free."""

    resource = "deployments/scale"

    def __init__(self, names: Mapping[Role, str]) -> None:
        self.names = names

    def owner_of(self, worker: str) -> Role | None:
        """The role whose Deployment has the longest name that begins this one."""
        found = [role for role, name in self.names.items() if worker.startswith(f"{name}-")]
        return max(found, key=lambda role: len(self.names[role]), default=None)

    def order(self, workers: Iterable[str], replicas: Mapping[Role, int]) -> dict[str, str]:
        """None."""
        return {}


class SetPods:
    """Pods of a DisaggregatedSet: SET-SLICE-REVISION-ROLE-ORDINAL. Fewer means without the highest ordinals.

    Source: kubernetes-sigs/lws v1.0, names of LeaderWorkerSets and of their leaders.
    """

    resource = "disaggregatedsetrolescalers/scale"

    def __init__(self, name: str) -> None:
        """`name`: of the set. Its scalers are NAME-ROLE."""
        self.names: Mapping[Role, str] = {role: f"{name}-{role.value}" for role in (Role.PREFILL, Role.DECODE)}
        self._pattern = re.compile(rf"({re.escape(name)}-\d+-[0-9a-z]+-(prefill|decode))-(\d+)")

    def owner_of(self, worker: str) -> Role | None:
        """The role in the name."""
        found = self._pattern.fullmatch(worker)
        return None if found is None else Role(found[2])

    def order(self, workers: Iterable[str], replicas: Mapping[Role, int]) -> dict[str, str]:
        """Each below the highest ordinal goes after the next one, whether that is known or not."""
        after = {}
        for worker in workers:
            found = self._pattern.fullmatch(worker)
            if found is not None and int(found[3]) + 1 < replicas.get(Role(found[2]), 0):
                after[worker] = f"{found[1]}-{int(found[3]) + 1}"
        return after
