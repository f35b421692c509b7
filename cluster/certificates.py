"""Which certificates the processes of a cluster get: those of the settings, or some that are made for this run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ..client.channel import Tls
from ..core.errors import ConfigError
from ..core.hosts import is_loopback_name
from ..core.ports import numeric_host
from ..core.tls.callers import Caller
from ..core.tls.config import TlsConfig
from ..core.tls.handshake import Pem, names_in
from ..router.config import RouterConfig
from .config import Config


class Certificates(NamedTuple):
    """Certificates of a cluster's processes by role, and what its owner should know."""

    by_role: Mapping[Caller, TlsConfig] | None  # None: loopback only, or insecure
    remark: str


def face_tls(router: RouterConfig) -> Tls | None:
    """TLS of the launcher's own client to the router, which trusts the router's present certificate and no other.

    Where clients must show certificates, it shows the router's own.

    Raises:
        ConfigError: a file cannot be read, or clients must show certificates and the router's own is not valid as one.
    """
    if router.ssl_certfile is None:
        return None
    chain = _read("router.ssl_certfile", router.ssl_certfile)
    key = _read("router.ssl_keyfile", router.ssl_keyfile or router.ssl_certfile)
    names = [name for name in names_in(Pem(chain, chain, key)) if "://" not in name]
    name = names[0].replace("*", "router") if names else None
    if router.ssl_ca_certs is None:
        return Tls(root_certificates=chain, server_name=name)
    try:
        names_in(Pem(_read("router.ssl_ca_certs", router.ssl_ca_certs), chain, key))
    except ConfigError as error:
        raise ConfigError(
            f"router.ssl_ca_certs is {router.ssl_ca_certs!r}: the launcher is a client too and shows "
            f"router.ssl_certfile, which is not valid for clients: {error}. `twostroke certs DIR` makes one that is"
        ) from None
    return Tls(chain, key, chain, name)


def _read(setting: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{setting} is {path!r}: {error.strerror}; `twostroke certs DIR` makes such files") from None


def needs_certificates(config: Config) -> str:
    """Reason for which the links inside may leave this machine; empty: there is none."""
    if config.cluster.ray_address:
        return f"members may run on any machine of the Ray at {config.cluster.ray_address}"
    if not is_loopback_name(numeric_host(config.router.host)):
        return f"router.host is {config.router.host}, which others can reach"
    return ""


def certificates_of(config: Config, made: Mapping[Caller, TlsConfig] | None = None) -> Certificates:
    """The certificates of `cluster.tls`, those `made` for this run before, or new ones.

    The authority of new ones is forgotten at once.

    They reach the members as the cluster's key does: in their settings, never by an argument or a file.

    Raises:
        ConfigError: they are needed, cannot be made here, and router.insecure is not set.
    """
    given = config.cluster.tls
    if given is not None:
        found = {caller: given.of(caller) for caller in Caller}
        return Certificates(found, f"links inside the cluster: mutual TLS with the certificates of {given.cert}")
    reason = needs_certificates(config)
    if made is not None:
        return Certificates(made, f"links inside the cluster: mutual TLS, made when it was started: {reason}")
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
