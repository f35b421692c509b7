"""Rolling restart: the order of workers and routers, and whether a new worker can serve before the old goes. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...core.errors import ConfigError
from ...core.request import Role
from ..placement import ProcessPlan
from .room import NoRoom


@dataclass(frozen=True, slots=True)
class Replace:
    """Start `member`; when it serves, the old worker goes."""

    member: ProcessPlan


@dataclass(frozen=True, slots=True)
class InPlace:
    """The worker goes first, and comes back; others serve meanwhile."""

    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """Nobody would answer meanwhile."""

    error: ConfigError


def order_of(members: Iterable[ProcessPlan]) -> list[str]:
    """Names of the workers to restart: those that prefill first, because decode workers can do without them."""
    workers = [member for member in members if member.kind == "worker"]
    return [m.name for m in sorted(workers, key=lambda m: (m.role is not Role.PREFILL, m.name))]


def routers_of(members: Iterable[ProcessPlan]) -> list[str]:
    """Names of the routers to restart: none if there is only one, because nobody would take requests meanwhile."""
    routers = [member.name for member in members if member.kind == "router"]
    return routers if len(routers) > 1 else []


def how_to_restart(
    member: ProcessPlan, serving: Sequence[ProcessPlan], beside: ProcessPlan | NoRoom, *, force: bool
) -> Replace | InPlace | Refused:
    """How one worker restarts. `serving`: workers that serve now; `beside`: a place beside it, if there is one."""
    if isinstance(beside, ProcessPlan):
        return Replace(beside)
    others = [each for each in serving if each.name != member.name and each.role is not Role.PREFILL]
    if member.role is Role.PREFILL or others or force:
        return InPlace(beside.reason)
    return Refused(
        ConfigError(
            f"{member.name} alone decodes, and a second worker beside it does not fit: {beside.reason}. Without "
            "--force it is not restarted, because nobody would answer meanwhile"
        )
    )
