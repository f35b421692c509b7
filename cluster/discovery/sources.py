"""What finds the addresses behind a name that a user gives: NAME:PORT, or k8s://SERVICE.NAMESPACE:PORT."""

from __future__ import annotations

import re
from pathlib import Path

from ...core.discovery.source import AddressSource
from ...core.errors import ConfigError
from ...core.ports import check_address
from ...router.config import RouterConfig
from .endpoint_slices import EndpointSlices, ServiceAt
from .names import Names
from .slices import Wanted

KUBERNETES = "k8s://"
_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_SERVICE = re.compile(rf"(?P<service>{_LABEL})(\.(?P<namespace>{_LABEL}))?:(?P<port>{_LABEL})")
_OWN_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def source_of(text: str, param: str, *, with_terminating: bool = False, without_pod: str = "") -> AddressSource:
    """What finds the addresses behind `text`; nothing is asked yet. `param`: the flag or setting, for messages.

    Raises:
        InvalidRequest, ConfigError: it has another form, or means more than this kind of name can tell.
    """
    if text.startswith(KUBERNETES):
        return EndpointSlices(_service_at(text, param, with_terminating, without_pod))
    if without_pod:
        raise ConfigError(
            f"{param} is {text!r}; a DNS name does not tell which of its addresses is ours: give "
            "k8s://SERVICE.NAMESPACE:PORT, or list the others in router.peers"
        )
    check_address(text, param)
    return Names(text)


def sources_of_peers(router: RouterConfig) -> list[AddressSource]:
    """What finds the other routers. One that is going is still asked: it knows the requests that it finishes.

    Raises:
        ConfigError: a name is no Service of Kubernetes, or this router does not know its own pod's name.
    """
    if router.peers_at and router.name is None:
        raise ConfigError(
            "router.peers_at is given and router.name is not, so this router cannot tell itself from the others; set "
            "router.name (TWOSTROKE__ROUTER__NAME) to the name of its pod"
        )
    param = "router.peers_at"
    return [source_of(name, param, with_terminating=True, without_pod=router.name or "") for name in router.peers_at]


def _service_at(text: str, param: str, with_terminating: bool, without_pod: str) -> ServiceAt:
    found = _SERVICE.fullmatch(text.removeprefix(KUBERNETES))
    port = found["port"] if found is not None else ""
    if found is None or (port.isdecimal() and not 0 < int(port) < 65536):
        raise ConfigError(
            f"{param} is {text[:80]!r}; must be k8s://SERVICE.NAMESPACE:PORT, with the number or the name of a port, "
            "e.g. k8s://ts-twostroke-routers.llm:8002"
        )
    wanted = Wanted(int(port) if port.isdecimal() else port, with_terminating, without_pod)
    return ServiceAt(text, found["service"], found["namespace"] or _own_namespace(text, param), wanted)


def _own_namespace(text: str, param: str) -> str:
    try:
        return _OWN_NAMESPACE.read_text().strip()
    except OSError:
        raise ConfigError(
            f"{param} is {text!r}, without a namespace, and this process has no pod's account that tells one; give "
            "k8s://SERVICE.NAMESPACE:PORT"
        ) from None
