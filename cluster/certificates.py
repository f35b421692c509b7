"""Which certificates the processes of a cluster get: those of the settings, or some that are made for this run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..core.errors import ConfigError
from ..core.hosts import is_loopback_name
from ..core.ports import numeric_host
from ..core.tls.callers import Caller
from ..core.tls.config import TlsConfig
from .config import Config


class Certificates(NamedTuple):
    """Certificates of a cluster's processes by role, and what its owner should know."""

    by_role: Mapping[Caller, TlsConfig] | None  # None: loopback only, or insecure
    remark: str


def needs_certificates(config: Config) -> str:
    """Reason for which the links inside may leave this machine; empty: there is none."""
    if config.cluster.ray_address:
        return f"members may run on any machine of the Ray at {config.cluster.ray_address}"
    if not is_loopback_name(numeric_host(config.router.host)):
        return f"router.host is {config.router.host}, which others can reach"
    return ""


def certificates_of(config: Config) -> Certificates:
    """The certificates of `cluster.tls`, or new ones of an authority that is forgotten at once.

    They reach the members as the cluster's key does: in their settings, never by an argument or a file.

    Raises:
        ConfigError: they are needed, cannot be made here, and router.insecure is not set.
    """
    given = config.cluster.tls
    if given is not None:
        found = {caller: given.of(caller) for caller in Caller}
        return Certificates(found, f"links inside the cluster: mutual TLS with the certificates of {given.cert}")
    reason = needs_certificates(config)
    if not reason:
        return Certificates(None, "links inside the cluster: no certificates, so they use loopback only")
    try:
        from .authority import of_one_run
    except ConfigError as error:
        if not config.router.insecure:
            raise ConfigError(f"{reason}, so the links inside need certificates: {error}") from None
        return Certificates(None, f"note: the links inside the cluster are not encrypted: {error}")
    name = TlsConfig.model_fields["deployment"].default
    return Certificates(of_one_run(name), f"links inside the cluster: mutual TLS, made for this run: {reason}")
