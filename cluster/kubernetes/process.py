"""The process `twostroke planner`: builds the planner's driver, runs it until a signal, lets go of the Lease."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...core.clock import MonotonicClock
from ...core.discovery.source import AddressSource
from ...core.foreground import Stop
from ...core.request import Role
from ...core.tls.callers import Caller
from ...core.tls.identity import TlsIdentity
from ...kv.keys import proof_key
from ...router.peers.peers import Peers
from ..config import Config
from ..operations.operator import Operator
from .arm import PodScaler
from .connection import connect
from .lease import Tenure
from .objects import Deployments, Leases
from .surroundings import Inside, Kubernetes

log = logging.getLogger(__name__)

LEAVE_S = 10.0  # longest time to let go of the Lease


@dataclass(frozen=True, slots=True)
class Place:
    """Where the planner acts."""

    namespace: str
    names: Mapping[Role, str]  # of the Deployment of each role
    lease: str
    name: str  # of this process


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
            Deployments(connection, place.namespace),
            place.names,
            Leases(connection, place.namespace, place.lease),
            Tenure(f"{place.name}_{time.time_ns():x}"),  # a restarted container has the name of the one before
        ),
        MonotonicClock(),
    )
    peers.start()
    running = asyncio.create_task(scaler.run())
    log.info("plans for %s in %s", " and ".join(place.names.values()), place.namespace)
    try:
        await stop.asked.wait()
    finally:
        running.cancel()
        await asyncio.wait([running], timeout=LEAVE_S)
        async with asyncio.timeout(LEAVE_S):
            await scaler.close()
        await peers.close()
