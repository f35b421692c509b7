"""Ends members of deployments that no supervisor has. Each is known by its number and start, and carries the name."""

from __future__ import annotations

import signal
from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from .processes import ProcessIdentity, kill_group, named_in, send, wait_for_ends
from .record import Record

_KILLED_S = 5.0  # for the system to end what got SIGKILL
_BEYOND_DRAIN_S = 2.0
_ROUNDS = 3  # a member that was being created may come into sight after the first


class Traces(Protocol):
    """Members of the deployments of one run folder in one place: on this machine, or on a Ray."""

    def found(self) -> dict[str, str]:
        """Handle of each living member, and its deployment."""
        ...

    def end_now(self, handles: Collection[str]) -> None:
        """End members at once."""
        ...

    def end_all(self, record: Record | None, drain_s: float) -> int:
        """End all of them, routers first, each after a drain; returns how many there were."""
        ...


class ProcessTraces:
    """Child processes, of a supervisor that is gone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def found(self) -> dict[str, str]:
        """Implements `Traces.found`."""
        return {named.identity.handle: named.deployment for named in named_in(self._folder)}

    def end_now(self, handles: Collection[str]) -> None:
        """Implements `Traces.end_now`."""
        identities = [identity for handle in handles if (identity := ProcessIdentity.of_handle(handle))]
        for identity in identities:
            kill_group(identity)
        wait_for_ends(identities, _KILLED_S)

    def end_all(self, record: Record | None, drain_s: float) -> int:
        """Implements `Traces.end_all`."""
        known = {member.handle: member.plan.kind for member in record.now.members.values()} if record else {}
        num_ended = 0
        for _ in range(_ROUNDS):
            found = [named.identity for named in named_in(self._folder)]
            if not found:
                break
            num_ended += len(found)
            routers = [identity for identity in found if known.get(identity.handle) == "router"]
            for group in (routers, [identity for identity in found if identity not in routers]):
                _end(group, drain_s)
        return num_ended


def _end(identities: list[ProcessIdentity], drain_s: float) -> None:
    """Let members drain, then end those that still live."""
    for identity in identities:
        send(identity, signal.SIGTERM)
    for identity in wait_for_ends(identities, drain_s + _BEYOND_DRAIN_S):
        kill_group(identity)
    wait_for_ends(identities, _KILLED_S)
