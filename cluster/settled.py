"""What of the configuration is settled once for all starts of a process: its ports and the supervisor's own key."""

from __future__ import annotations

from ..core.ports import free_ports
from ..router.keys.digests import line_for
from .config import Config
from .deployment.record import Ports


def with_operator(config: Config, key: str) -> Config:
    """The configuration with the digest of the supervisor's own key, which replaces one that was given."""
    return config.model_copy(update={"router": config.router.model_copy(update={"operator_key": line_for(key)})})


def with_ports(config: Config, ports: Ports) -> tuple[Config, tuple[int, ...]]:
    """The configuration with the ports of a deployment that runs, and the internal port of each router."""
    found = {"port": ports.http, "grpc_port": ports.grpc, "internal_port": ports.internal[0]}
    return config.model_copy(update={"router": config.router.model_copy(update=found)}), ports.internal


def with_fixed_ports(config: Config) -> tuple[Config, tuple[int, ...]]:
    """Replace ports of 0 by free ones, so that a restarted router has the same ports as before.

    Also returns the internal port of each router: the configured one and those after it, or free ones.
    """
    number, first = config.cluster.routers, config.router.internal_port
    names = [name for name in ("port", "grpc_port") if getattr(config.router, name) == 0]
    free = free_ports(config.router.host, len(names) + (0 if first else number))
    inside = tuple(range(first, first + number)) if first else tuple(free[len(names) :])
    found = dict(zip(names, free, strict=False)) | {"internal_port": inside[0]}
    return config.model_copy(update={"router": config.router.model_copy(update=found)}), inside


def reachable(host: str) -> str:
    """The host name for clients on this machine: loopback for a wildcard address."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "localhost": "127.0.0.1"}.get(host, host)
