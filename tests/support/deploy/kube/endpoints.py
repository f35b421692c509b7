"""EndpointSlices of all Services of the stand-in node, as Kubernetes' controller makes them."""

from collections.abc import Mapping
from typing import Any

from .slices import endpoint, endpoint_slice
from .store import Object, Store

MOST_ENDPOINTS = 2  # of one slice; Kubernetes' own bound is 100, but so a few pods make several slices


def publish(store: Store, pods: Mapping[str, Any]) -> None:
    """Make, change and remove slices. `pods`: those that have an address, by name (`node.Pod`)."""
    wanted: dict[str, Object] = {}
    for service in store.all("services"):
        about, spec = service["metadata"], service["spec"]
        found = store.all("pods", spec.get("selector", {}), about["namespace"]) if spec.get("selector") else []
        shown = [each for each in found if each["metadata"]["name"] in pods and pods[each["metadata"]["name"]].process]
        for start in range(0, max(1, len(shown)), MOST_ENDPOINTS):
            name = f"{about['name']}-{start // MOST_ENDPOINTS}"
            some = shown[start : start + MOST_ENDPOINTS]
            endpoints = [_endpoint(service, each, pods[each["metadata"]["name"]]) for each in some]
            ports = _ports(service, some[0]) if some else {}
            wanted[name] = endpoint_slice(name, about["name"], endpoints, ports, namespace=about["namespace"])
    for present in store.all("endpointslices"):
        about = present["metadata"]
        if about["name"] not in wanted:
            store.remove("endpointslices", about["namespace"], about["name"])
    for name, value in wanted.items():
        before = store.get("endpointslices", value["metadata"]["namespace"], name)
        if before is None or any(before[key] != value[key] for key in ("endpoints", "ports")):
            store.put("endpointslices", value)


def _endpoint(service: Object, wanted: Object, pod: Any) -> Object:
    is_terminating = "deletionTimestamp" in wanted["metadata"]
    is_published = service["spec"].get("publishNotReadyAddresses", False)
    is_ready = is_published or (pod.is_ready and not is_terminating)
    return endpoint(wanted["metadata"]["name"], pod.address, ready=is_ready, terminating=is_terminating)


def _ports(service: Object, pod: Object) -> dict[str, int]:
    numbers = {
        port["name"]: port["containerPort"]
        for container in pod["spec"]["containers"]
        for port in container.get("ports", [])
    }
    return {port["name"]: numbers[port["targetPort"]] for port in service["spec"]["ports"]}
