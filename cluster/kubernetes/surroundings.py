"""What the planner's driver acts upon: the cluster's own processes, and what Kubernetes has of it. Values only."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from ...core.request import Role
from ...protos import worker_pb2
from .lease import Tenure
from .objects import Deployed, Leases
from .pods import Pods


class Routers(Protocol):
    """The routers, as `router.peers.peers.Peers` knows them."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """host:port of their internal ports."""

    async def reports(self) -> list[dict[str, Any]]:
        """The reports of all that answer."""


class Arms(Protocol):
    """Calls to workers and routers, as `operations.operator.Operator` makes them."""

    async def set_role(self, address: str, role: Role) -> None:
        """Give a worker another role."""

    async def drain(self, address: str, timeout_s: float) -> int:
        """Have a worker take no new work."""

    async def report(self, router: str, report: worker_pb2.SupervisorReport) -> None:
        """Tell a router."""


class Inside(NamedTuple):
    """The cluster's own processes."""

    routers: Routers
    operator: Arms


class Scales(Protocol):
    """What scales the roles, as `objects.Deployments` and `objects.RoleScalers` do it. Raises ApiAway, ApiRefused."""

    def read(self, name: str) -> Deployed:
        """One of them."""

    def change(self, name: str, count: int) -> int:
        """Add so many replicas, or take them away; gives their number afterwards."""


class Kubernetes(NamedTuple):
    """What Kubernetes has of the cluster."""

    scales: Scales
    pods: Pods
    leases: Leases
    tenure: Tenure
