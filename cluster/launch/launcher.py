"""Interface of all launchers: start a member, report its end, stop it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ...core.ports import target
from ...core.request import Role
from ...core.tls.callers import Caller
from ...core.tls.config import TlsConfig
from ...router.config import RouterConfig
from ...worker.settings import WorkerSettings
from ..config import Config
from ..nodes import LOOPBACK, Node
from ..placement import ProcessPlan
from .last_words import ProcessEnd

Ended = Callable[[str, ProcessEnd], None]
"""Callback with a member's name and its end, once per start, on the supervisor's loop."""


@dataclass(frozen=True, slots=True)
class Site:
    """Facts shared by all members of a cluster: configuration, checkpoint directory, addresses of routers."""

    config: Config
    model_directory: str
    model_name: str
    internal_ports: tuple[int, ...]  # of each router, fixed before the start so that a restarted one is found again
    tls: Mapping[Caller, TlsConfig] | None = None  # certificates by role
    router_host: str = LOOPBACK  # address of the routers' machine, as workers reach it
    member_name: str = ""  # of a deployment: each member carries it, and outlives this process. Empty: it ends with it
    namespace: str = ""  # of a deployment, on a joined Ray
    log_folder: Path | None = None  # of the members of a deployment

    @property
    def internal_addresses(self) -> tuple[str, ...]:
        """host:port of each router's Announce service, in the order of their indices."""
        return tuple(target(self.router_host, port) for port in self.internal_ports)

    def router_settings(self, member: ProcessPlan) -> RouterConfig:
        """Settings of one router: its name, its own internal port, and what it shares with the others."""
        addresses = self.internal_addresses
        log = self.config.router.decision_log
        if log is not None and member.index > 0:  # two routers cannot write one file
            log = log.with_stem(f"{log.stem}-{member.name}")
        own = {
            "decision_log": log,
            "name": member.name,
            "internal_port": self.internal_ports[member.index],
            "peers": tuple(address for index, address in enumerate(addresses) if index != member.index),
            "shared_ports": len(addresses) > 1,
        }
        return self.config.router.model_copy(update=own)

    def tls_of(self, caller: Caller) -> TlsConfig | None:
        """Certificates of a role; None: there are none."""
        return self.tls[caller] if self.tls else None

    def config_of(self, caller: Caller) -> Config:
        """The configuration of a member, with the certificates of its role."""
        tls = self.tls_of(caller)
        return self.config.model_copy(update={"cluster": self.config.cluster.model_copy(update={"tls": tls})})


class Launcher(Protocol):
    """One way to run members: in this process, as child processes, or as Ray actors."""

    async def start(self, member: ProcessPlan, ended: Ended) -> None:
        """Start a member; returns when its process exists (not yet when it serves)."""
        ...

    async def adopt(self, member: ProcessPlan, handle: str, ended: Ended) -> bool:
        """Take over a member that another launcher started, by its `handle`. False: it has ended."""
        ...

    def handle(self, name: str) -> str | None:
        """What `adopt` needs in another process. None: the member does not run, or ends with this process."""
        ...

    def is_stopped(self, name: str) -> bool:
        """True if it is certain that the member's process stands still, as after SIGSTOP."""
        ...

    async def stop(self, name: str, grace_s: float) -> None:
        """Let a member drain for `grace_s`, then end it. `ended` is called as for any end."""
        ...

    async def kill(self, name: str) -> None:
        """End a member now, even a frozen one. `ended` is called as for any end."""
        ...

    async def machines(self) -> list[Node]:
        """All machines that a worker can be started on now, with what is free there. Empty: this one only."""
        ...

    async def want(self, workers: Sequence[ProcessPlan]) -> str:
        """Ask for room for all these workers, present ones and others, on machines that may come; the whole each time.

        Returns what was asked for, for people; empty: nobody here can be asked.
        """
        ...

    async def close(self) -> None:
        """End all members; remove all processes, sessions and files."""
        ...

    async def abort(self) -> None:
        """`close` without waiting for running requests. Takes a second at most."""
        ...

    async def leave(self) -> None:
        """Let go of all members; those of a deployment run on. The caller's process ends next."""
        ...

    def opening(self) -> str:
        """What this launcher itself waits for now before it can start members, for people; empty: nothing."""
        ...

    def said(self, name: str) -> str:
        """Last line of a running member's log; empty if there is none."""
        ...


def worker_settings(site: Site, member: ProcessPlan) -> WorkerSettings:
    """Settings of one worker, from the cluster's configuration and its entry in the plan."""
    config = site.config
    return WorkerSettings(
        worker_id=member.name,
        role=member.role or Role.COMBINED,
        model_directory=site.model_directory,
        model_name=site.model_name,
        model=config.model.model_copy(update={"device": member.device}),
        gpu=member.gpu,
        gpu_health=config.cluster.gpu_health,
        cache=config.cache,
        step=config.step,
        speculation=config.speculation,
        memory_bytes=member.memory_bytes,
        num_threads=member.num_threads,
        num_ranks=member.num_ranks,
        first_core=member.first_core,
        host=member.host,
        insecure=config.router.insecure,
        tls=site.tls_of(Caller.WORKER),
        metrics_port=member.metrics_port,
        metrics_keys=config.router.metrics_keys,
        routers=site.internal_addresses,
        cluster_key=config.cluster.key,
        orphan_grace_s=config.cluster.orphan_grace_s,
        drain_timeout_s=config.cluster.drain_timeout_s,
    )
