"""The router's three ports: where each is bound, and which setting chooses another. Starts nothing."""

from __future__ import annotations

from ..core.ports import check_port
from .config import RouterConfig

INTERNAL_HOST = "127.0.0.1"  # workers announce themselves there
PORT_REMEDIES = {
    "port": "--port",
    "grpc_port": "--grpc-port",
    "internal_port": "router.internal_port (TWOSTROKE__ROUTER__INTERNAL_PORT)",
}


def check_ports(settings: RouterConfig) -> None:
    """Whether all ports could be bound now; a port of 0 is any.

    Raises:
        ConfigError: names the port that cannot, and the setting that chooses another.
    """
    for name, remedy in PORT_REMEDIES.items():
        host = INTERNAL_HOST if name == "internal_port" else settings.host
        check_port(host, getattr(settings, name), remedy)
