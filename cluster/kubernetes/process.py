"""The process `twostroke planner`: builds the planner's driver, runs it until a signal, lets go of the Lease."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from ...core.clock import Clock, MonotonicClock
from ...core.discovery.source import AddressSource
from ...core.foreground import Stop
from ...core.request import Role
from ...core.tls.callers import Caller
from ...core.tls.identity import TlsIdentity
from ...kv.keys import proof_key
from ...router.peers.peers import Peers
from ...worker.scrape import Answer, Page, ScrapeServer
from ..config import Config
from ..operations.operator import Operator
from .arm import PodScaler
from .connection import connect
from .lease import Tenure
from .objects import Deployments, Leases, RoleScalers
from .pods import DeploymentPods, Pods, SetPods
from .surroundings import Inside, Kubernetes, Scales

log = logging.getLogger(__name__)

LEAVE_S = 10.0  # longest time to let go of the Lease
TURN_S = 120.0  # longer than a turn all of whose calls run into their deadlines


@dataclass(frozen=True, slots=True)
class Place:
    """Where the planner acts."""

    namespace: str
    scaled: Mapping[Role, str] | str  # names of the Deployment of each role, or of the DisaggregatedSet
    lease: str
    name: str  # of this process
    health: tuple[str, int] | None = None  # host and port of GET /livez

    def scales(self, connection: Any) -> tuple[Scales, Pods]:
        """What scales the roles, and how its pods are called."""
        if isinstance(self.scaled, str):
            return RoleScalers(connection, self.namespace, self.scaled), SetPods(self.scaled)
        return Deployments(connection, self.namespace), DeploymentPods(self.scaled)


def run_planner(config: Config, place: Place, routers: Sequence[str], sources: Sequence[AddressSource]) -> None:
    """Plan until SIGTERM or SIGINT. `routers`: host:port of internal ports; `sources`: of further ones.

    Raises:
        ConfigError: nothing says where Kubernetes' API server is, or a certificate cannot be used.
    """
    asyncio.run(_serve(config, place, routers, sources))


async def _serve(config: Config, place: Place, routers: Sequence[str], sources: Sequence[AddressSource]) -> None:
    stop, loop = Stop(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.hear, number)
    tls = config.cluster.tls
    identity = TlsIdentity(tls, Caller.OPERATOR) if tls else None
    connection = await asyncio.to_thread(connect)
    peers = Peers(routers, proof_key(config.cluster.key), identity, sources)
    scaler = PodScaler(
        config.planner,
        Inside(peers, Operator(config.cluster.key, tls)),
        Kubernetes(
            *place.scales(connection),
            Leases(connection, place.namespace, place.lease),
            Tenure(f"{place.name}_{time.time_ns():x}"),  # a restarted container has the name of the one before
        ),
        MonotonicClock(),
    )
    health = ScrapeServer({"/livez": livez(scaler, MonotonicClock(), config.planner.interval_s + TURN_S)})
    if place.health is not None:
        await health.start(*place.health)
    peers.start()
    running = asyncio.create_task(scaler.run())
    log.info("plans for %s in %s", " and ".join(scaler.names), place.namespace)
    try:
        await stop.asked.wait()
    finally:
        running.cancel()
        await asyncio.wait([running], timeout=LEAVE_S)
        await scaler.close(LEAVE_S)
        await peers.close()
        await health.close()


def livez(scaler: PodScaler, clock: Clock, within_s: float) -> Page:
    """Page for probes: has the planner's loop begun a turn within so many seconds?"""

    def page(_: str) -> Answer:
        age_s = clock.now_s() - scaler.beat_s
        status = HTTPStatus.OK if age_s <= within_s else HTTPStatus.SERVICE_UNAVAILABLE
        return status, "application/json", json.dumps({"last_turn_s_ago": round(age_s, 1)}).encode()

    return page
