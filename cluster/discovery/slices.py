"""EndpointSlices of one Service, and the addresses in them. Plain values; knows no API server.

Source: Kubernetes API reference, discovery.k8s.io/v1 EndpointSlice; KEP-1672 for the conditions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...core.ports import target

SERVICE_LABEL = "kubernetes.io/service-name"
_FAMILIES = ("IPv4", "IPv6", "FQDN")  # of a pod that has addresses of several, the first is taken


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One pod of a Service, as one slice tells of it."""

    host: str
    pod: str  # name; without one: the host
    is_ready: bool  # also where the Service publishes pods that are not
    is_terminating: bool


@dataclass(frozen=True, slots=True)
class Slice:
    """One EndpointSlice."""

    name: str
    family: str  # addressType: IPv4, IPv6 or FQDN
    endpoints: tuple[Endpoint, ...]
    ports: Mapping[str, int]  # by name


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which endpoints of a Service count, and at which port."""

    port: int | str  # a number, or the name of one of the slices' ports
    with_terminating: bool = False  # also pods that are going: they answer until their process ends
    without_pod: str = ""  # our own


def slice_of(item: Mapping[str, Any]) -> Slice:
    """Read one object of the API.

    Raises:
        KeyError, TypeError, ValueError: it is no EndpointSlice.
    """
    return Slice(
        name=str(item["metadata"]["name"]),
        family=str(item["addressType"]),
        endpoints=tuple(_endpoint(each) for each in item.get("endpoints") or () if each.get("addresses")),
        ports={str(each.get("name") or ""): int(each["port"]) for each in item.get("ports") or () if each.get("port")},
    )


def _endpoint(item: Mapping[str, Any]) -> Endpoint:
    """One endpoint; of its addresses, which are interchangeable, the first. An unknown condition means ready."""
    conditions = item.get("conditions") or {}
    host = str(item["addresses"][0])
    return Endpoint(
        host=host,
        pod=str((item.get("targetRef") or {}).get("name") or host),
        is_ready=conditions.get("ready") is not False,
        is_terminating=conditions.get("terminating") is True,
    )


def addresses_of(slices: Iterable[Slice], wanted: Wanted) -> frozenset[str]:
    """host:port of every pod that counts, once each.

    A Service has several slices: more pods than one slice holds, or two families of addresses. While the controller
    moves a pod, two slices may tell of it: it counts if one of them has it ready and none has it terminating.
    """
    found: dict[str, dict[str, str]] = {}  # pod -> family -> address
    going: set[str] = set()
    for each in slices:
        port = wanted.port if isinstance(wanted.port, int) else each.ports.get(wanted.port)
        for endpoint in each.endpoints:
            if endpoint.is_terminating and not wanted.with_terminating:
                going.add(endpoint.pod)
            is_usable = endpoint.is_ready or (endpoint.is_terminating and wanted.with_terminating)
            if port is not None and is_usable and endpoint.pod != wanted.without_pod:
                found.setdefault(endpoint.pod, {})[each.family] = target(endpoint.host, port)
    return frozenset(min(by_family.items(), key=_preference)[1] for pod, by_family in found.items() if pod not in going)


def _preference(item: tuple[str, str]) -> tuple[int, str]:
    family, address = item
    return (_FAMILIES.index(family) if family in _FAMILIES else len(_FAMILIES), address)
