"""The router's three ports: their hosts, and the settings that change them. Starts nothing."""

from __future__ import annotations

from ..core.ports import check_port
from .config import RouterConfig

PORT_REMEDIES = {
    "port": "--port",
    "grpc_port": "--grpc-port",
    "internal_port": "router.internal_port (TWOSTROKE__ROUTER__INTERNAL_PORT)",
}


def check_ports(settings: RouterConfig) -> None:
    """Check that all ports can be bound now; 0 means any port.

    Raises:
        ConfigError: a port cannot be bound; with the setting that changes it.
    """
    for name, remedy in PORT_REMEDIES.items():
        host = settings.internal_host if name == "internal_port" else settings.host
        is_shared = settings.shared_ports and name != "internal_port"  # workers must reach this very router
        check_port(host, getattr(settings, name), remedy, shared=is_shared)
