"""The members of a cluster as its routers report them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any, NamedTuple

from ..client.async_client import AsyncClient
from ..core.errors import ConfigError, TwostrokeError
from ..core.request import Role
from .certificates import face_tls
from .config import Config
from .restarts import Use

ASK_S = 2.0

_USE_BY_STATE = {"live": Use.SERVES, "draining": Use.DRAINS}
_LEAST_USE = (Use.NONE, Use.DRAINS, Use.SERVES)


class Life(NamedTuple):
    """One member as the router reports it."""

    incarnation: str
    use: Use
    arithmetic: str = ""  # of a worker: description of its numerics class
    role: Role | None = None  # of a worker: the present one
    cordon: str = ""  # of a worker: its cordoned GPU and why


class Seen(NamedTuple):
    """A report of the router."""

    cluster: dict[str, Any]
    at_s: float

    def worker(self, name: str) -> dict[str, Any] | None:
        """The report on one worker; None: the router does not know it."""
        return next((worker for worker in self.cluster["workers"] if worker["worker_id"] == name), None)


async def looks(config: Config, address: str, api_key: str | None) -> AsyncGenerator[dict[str, Any] | None, None]:
    """What a router reports at each look; None: none has answered. Each look may lead to another router after that."""
    may_change = config.cluster.routers > 1  # of several that share the port another connection may lead to another one
    tls = None
    while True:
        with contextlib.suppress(ConfigError):  # while the files change; those before may still be good
            tls = await asyncio.to_thread(face_tls, config.router)
        insecure = tls is None and config.router.insecure
        async with AsyncClient(address, api_key=api_key, timeout_s=ASK_S, insecure=insecure, tls=tls) as client:
            while True:
                cluster = await cluster_or_none(client)
                yield cluster
                if cluster is None and (may_change or tls is not None):
                    break


async def cluster_or_none(client: AsyncClient) -> dict[str, Any] | None:
    """The router's report; None: it does not answer."""
    try:
        return await client.cluster()
    except TwostrokeError:
        return None  # the router is still starting; the caller's deadline bounds the wait


def lives_of(cluster: dict[str, Any] | None) -> dict[str, Life]:
    """State of the routers that answered, and of the workers: what the least of the routers can do with each."""
    if cluster is None:
        return {}
    routers = cluster.get("routers") or [cluster["router"] | {"name": "router-0"}]
    found = {
        router["name"]: Life(router["incarnation"], Use.NONE if router.get("state") == "starting" else Use.SERVES)
        for router in routers
    }
    for worker in cluster["workers"]:
        states = [worker["state"], *(router["workers"].get(worker["worker_id"]) for router in routers[1:])]
        use = min((_USE_BY_STATE.get(state, Use.NONE) for state in states), key=_LEAST_USE.index)
        if use is Use.DRAINS and worker.get("changes_codec_to"):
            use = Use.SERVES  # it comes back by itself, and must not be replaced meanwhile
        role, cordon = Role(worker["role"]), _cordon_of(worker)
        found[worker["worker_id"]] = Life(worker["incarnation"], use, worker["numerics"], role, cordon)
    return found


def _cordon_of(worker: dict[str, Any]) -> str:
    cordoned = [gpu for gpu in worker.get("gpus", ()) if gpu["verdict"] == "cordon"]
    return "".join(f"{gpu['uuid']} is cordoned: {'; '.join(gpu['reasons'])}" for gpu in cordoned[:1])
