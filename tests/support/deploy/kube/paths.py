"""Kinds, paths, selectors and patches of the stand-in for Kubernetes' API server."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from .store import Object

KINDS = {  # group/version -> plural: kind
    "v1": {
        **{"pods": "Pod", "services": "Service", "secrets": "Secret", "configmaps": "ConfigMap"},
        **{"serviceaccounts": "ServiceAccount", "namespaces": "Namespace"},
    },
    "apps/v1": {"deployments": "Deployment", "replicasets": "ReplicaSet"},
    "policy/v1": {"poddisruptionbudgets": "PodDisruptionBudget"},
    "networking.k8s.io/v1": {"networkpolicies": "NetworkPolicy", "ingresses": "Ingress"},
    "autoscaling/v2": {"horizontalpodautoscalers": "HorizontalPodAutoscaler"},
    "rbac.authorization.k8s.io/v1": {"roles": "Role", "rolebindings": "RoleBinding"},
    "discovery.k8s.io/v1": {"endpointslices": "EndpointSlice"},
    "coordination.k8s.io/v1": {"leases": "Lease"},
    "disaggregatedset.x-k8s.io/v1": {
        "disaggregatedsets": "DisaggregatedSet",
        "disaggregatedsetrolescalers": "DisaggregatedSetRoleScaler",
    },
}
MERGE_KEYS = {  # of lists in strategic merge patches
    **{"containers": "name", "initContainers": "name", "env": "name", "volumes": "name", "volumeMounts": "mountPath"},
    "imagePullSecrets": "name",
}


def merged(before: Any, patch: Any, *, is_strategic: bool, key: str = "") -> Any:
    """`before` with a JSON merge patch, or with a strategic one: lists of named things merge by their names."""
    if isinstance(patch, dict):
        result = dict(before) if isinstance(before, dict) else {}
        for name, value in patch.items():
            if name == "$retainKeys":
                result = {kept: each for kept, each in result.items() if kept in value}
            elif value is None:
                result.pop(name, None)
            elif not name.startswith("$"):
                result[name] = merged(result.get(name), value, is_strategic=is_strategic, key=name)
        return result
    if isinstance(patch, list) and is_strategic and key in MERGE_KEYS:
        name = MERGE_KEYS[key]
        by_name = {each[name]: each for each in before or []}
        for each in patch:
            if each.get("$patch") == "delete":
                by_name.pop(each[name], None)
            else:
                by_name[each[name]] = merged(by_name.get(each[name]), each, is_strategic=True)
        return list(by_name.values())
    return patch


class Target(NamedTuple):
    """What a path below /api or /apis names."""

    plural: str  # empty: nothing that is known here
    namespace: str
    name: str
    subresource: str


def target_of(path: list[str]) -> Target:
    """The object, or all of a kind."""
    rest = path[2:] if path[0] == "api" else path[3:]
    namespace = ""
    if len(rest) > 2 and rest[0] == "namespaces":
        namespace, rest = rest[1], rest[2:]
    plural, name, subresource = (*rest, "", "", "")[:3]
    known = any(plural in kinds for kinds in KINDS.values())
    return Target(plural if known else "", namespace, name, subresource)


def group_of(plural: str) -> str:
    return next(group for group, kinds in KINDS.items() if plural in kinds)


def is_custom(plural: str) -> bool:
    """True for custom resources, which know no strategic merge patches."""
    return ".x-k8s.io/" in group_of(plural)


def discovery(path: list[str]) -> Object | None:
    if path == ["version"]:
        return {"major": "1", "minor": "34", "gitVersion": "v1.34.0"}
    if path == ["api"]:
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == ["apis"]:
        groups = []
        for group in [group for group in KINDS if "/" in group]:
            version = {"groupVersion": group, "version": group.split("/")[1]}
            groups.append({"name": group.split("/")[0], "versions": [version], "preferredVersion": version})
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    group = "/".join(path[1:])
    if group not in KINDS:
        return None
    verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
    resources = [
        {"name": plural, "singularName": kind.lower(), "kind": kind, "namespaced": kind != "Namespace", "verbs": verbs}
        for plural, kind in KINDS[group].items()
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group, "resources": resources}


def is_selected(value: Object, query: dict[str, str]) -> bool:
    """Whether an object has the labels and the name that a query asks for."""
    labels = value["metadata"].get("labels", {})
    for wanted in filter(None, query.get("labelSelector", "").split(",")):
        name, _, text = wanted.partition("=")
        if labels.get(name.rstrip("!")) != text.lstrip("="):
            return False
    fields = dict(_pairs(query.get("fieldSelector", "")))
    return fields.get("metadata.name", value["metadata"]["name"]) == value["metadata"]["name"]


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    for each in filter(None, text.split(",")):
        name, _, value = each.partition("=")
        yield name, value.lstrip("=")
