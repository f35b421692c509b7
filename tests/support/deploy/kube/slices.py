"""EndpointSlices as Kubernetes' controller makes them."""

from collections.abc import Iterable, Mapping
from typing import Any

from .store import Object


def endpoint(pod: str, host: str, *, ready: bool | None = True, terminating: bool = False) -> Object:
    """One endpoint of a slice. `ready` None: the condition is not known."""
    conditions: Object = {"serving": bool(ready), "terminating": terminating}
    if ready is not None:
        conditions["ready"] = ready
    return {"addresses": [host], "conditions": conditions, "targetRef": {"kind": "Pod", "name": pod}}


def endpoint_slice(
    name: str,
    service: str,
    endpoints: Iterable[Object],
    ports: Mapping[str, int] | None = None,
    *,
    family: str = "IPv4",
    namespace: str = "default",
) -> dict[str, Any]:
    """One slice of a Service."""
    labels = {"kubernetes.io/service-name": service}
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "addressType": family,
        "endpoints": list(endpoints),
        "ports": [{"name": key, "port": port, "protocol": "TCP"} for key, port in (ports or {}).items()],
    }
