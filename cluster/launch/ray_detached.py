"""Members of deployments on a joined Ray: detached actors in a namespace of the deployment, found by its name alone.

The namespace says whose it is (machine, user, run folder) and which deployment: `twostroke-WHOSE-ID`. A handle is
`NAMESPACE NAME`. Several deployments, of anybody, may be on one Ray.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..deployment.record import Record
from .ray_session import RaySession
from .ray_wanted import withdraw_of

ASK_S = 3.0
BEYOND_DRAIN_S = 5.0
GONE_S = 20.0  # for Ray to end what was killed
_POLL_S = 0.2


def namespace_of(folder: Path, deployment: str) -> str:
    """The namespace of a deployment of this machine and user."""
    identity = [socket.gethostname(), str(os.getuid()), str(folder.absolute())]
    with suppress(OSError):
        identity.append(Path("/etc/machine-id").read_text().strip())
    whose = hashlib.blake2b("\0".join(identity).encode(), digest_size=8).hexdigest()
    return f"twostroke-{whose}-{deployment}"


def named_actor(handle: str) -> Any:
    """The actor of a handle, on the Ray that this process has joined.

    Raises:
        ValueError: there is none.
    """
    import ray

    namespace, _, name = handle.partition(" ")
    return ray.get_actor(name, namespace=namespace)


def lives(actor: Any) -> bool:
    """False if Ray knows that the actor has ended. One that does not answer may be frozen, and lives."""
    import ray

    try:
        ray.get(actor.pid.remote(), timeout=ASK_S)
    except ray.exceptions.GetTimeoutError:
        return True
    except ray.exceptions.RayError:
        return False
    return True


class RayTraces:
    """What deployments of one run folder have on a Ray. Each call joins it and leaves it again: some seconds."""

    def __init__(self, folder: Path, address: str) -> None:
        self._folder, self._address = folder, address

    def found(self) -> dict[str, str]:
        """Handle of each living actor, and its deployment.

        Raises:
            ConfigError: the Ray cannot be joined.
        """
        with self._joined():
            return self._found()

    def end_now(self, handles: Collection[str]) -> None:
        """End actors at once."""
        if handles:
            with self._joined():
                _kill([handle for handle in handles if handle in self._found()])

    def end_all(self, record: Record | None, drain_s: float) -> int:
        """End all actors, routers first, each after a drain; returns how many there were.

        Raises:
            ConfigError: as for `found`.
        """
        known = {member.handle: member.plan.kind for member in record.now.members.values()} if record else {}
        with self._joined():
            found = self._found()
            routers = [handle for handle in found if known.get(handle) == "router"]
            for group in (routers, [handle for handle in found if handle not in routers]):
                _drain(group, drain_s + BEYOND_DRAIN_S)
                _kill(group)
            withdraw_of(namespace_of(self._folder, ""))
            return len(found)

    def _found(self) -> dict[str, str]:
        import ray

        prefix = namespace_of(self._folder, "")
        listed: list[dict[str, str]] = ray.util.list_named_actors(all_namespaces=True)
        ours = [actor for actor in listed if actor["namespace"].startswith(prefix)]
        found = {f"{actor['namespace']} {actor['name']}": actor["namespace"].removeprefix(prefix) for actor in ours}
        return {handle: deployment for handle, deployment in found.items() if _is_there(handle)}

    @contextmanager
    def _joined(self) -> Iterator[None]:
        session = RaySession(self._address)
        try:
            session.open()
            yield
        finally:
            session.close()


def _is_there(handle: str) -> bool:
    try:
        return lives(named_actor(handle))
    except ValueError:
        return False


def _drain(handles: Collection[str], within_s: float) -> None:
    """Ask actors to drain, and wait until their servers have ended."""
    import ray

    actors = []
    for handle in handles:
        with suppress(ValueError):
            actors.append(named_actor(handle))
    asked = [actor.stop.remote() for actor in actors]
    ended = [actor.run.remote() for actor in actors]
    if ended:
        ray.wait([*asked, *ended], num_returns=len(asked) + len(ended), timeout=within_s)


def _kill(handles: Collection[str]) -> None:
    """End actors, and wait until Ray has."""
    import ray

    end_s = time.monotonic() + GONE_S
    for handle in handles:
        with suppress(ValueError, ray.exceptions.RayError):
            ray.kill(named_actor(handle), no_restart=True)
    while any(_is_there(handle) for handle in handles) and time.monotonic() < end_s:
        time.sleep(_POLL_S)
