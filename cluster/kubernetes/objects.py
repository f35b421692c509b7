"""Calls about Leases, Deployments and role scalers at the API server. Blocks; decides nothing."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from .connection import ApiRefused, Object, answer_of
from .lease import Create, Record, Renew, Take

ACT_S = 5.0  # longest silence of a call that changes something: with connecting less than a Lease's spare time
CONFLICT, NOT_FOUND = 409, 404
TRIES = 5  # of a change that others' changes cross
DRAINED = "twostroke/draining"  # annotation of the Lease: workers that its holder drains, for its successor


_SETS = ("disaggregatedset.x-k8s.io", "v1")
_OF_SETS, _SCALERS = "disaggregatedsets", "disaggregatedsetrolescalers"


class Deployed(NamedTuple):
    """What scales one role, as it was read."""

    replicas: int
    version: str
    is_rolling: bool  # pods of an older template are there, too


class Leases:
    """One Lease."""

    def __init__(self, connection: Any, namespace: str, name: str) -> None:
        from kubernetes.client import CoordinationV1Api

        self._api, self._namespace, self._name = CoordinationV1Api(connection), namespace, name

    def read(self) -> tuple[Record | None, tuple[str, ...]]:
        """The Lease, and the workers that its last holder drained. None: there is none.

        Raises:
            ApiAway, ApiRefused
        """
        try:
            found = answer_of(self._api.read_namespaced_lease, self._name, self._namespace)
        except ApiRefused as error:
            if error.status == NOT_FOUND:
                return None, ()
            raise
        spec, about = found.get("spec") or {}, found["metadata"]
        record = Record(
            holder=str(spec.get("holderIdentity") or ""),
            version=str(about["resourceVersion"]),
            duration_s=float(spec.get("leaseDurationSeconds") or 0),
            transitions=int(spec.get("leaseTransitions") or 0),
        )
        return record, _names((about.get("annotations") or {}).get(DRAINED, "[]"))

    def write(self, step: Create | Take | Renew, holder: str, duration_s: float, drained: tuple[str, ...]) -> bool:
        """Write a holder. False: another process has written meanwhile.

        Raises:
            ApiAway, ApiRefused
        """
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec: Object = {"holderIdentity": holder, "leaseDurationSeconds": round(duration_s), "renewTime": now}
        about: Object = {"name": self._name, "annotations": {DRAINED: json.dumps(list(drained))}}
        if isinstance(step, Create):
            spec |= {"acquireTime": now, "leaseTransitions": 0}
        else:
            about["resourceVersion"] = step.version
            spec |= {"leaseTransitions": step.transitions} | ({"acquireTime": now} if isinstance(step, Take) else {})
        body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": about, "spec": spec}
        try:
            if isinstance(step, Create):
                answer_of(self._api.create_namespaced_lease, self._namespace, body, silence_s=ACT_S)
            else:
                answer_of(self._api.patch_namespaced_lease, self._name, self._namespace, body, silence_s=ACT_S)
        except ApiRefused as error:
            if error.status == CONFLICT:
                return False
            raise
        return True


class Deployments:
    """Deployments of one namespace."""

    def __init__(self, connection: Any, namespace: str) -> None:
        from kubernetes.client import AppsV1Api

        self._api, self._namespace = AppsV1Api(connection), namespace

    def read(self, name: str) -> Deployed:
        """One of them.

        Raises:
            ApiAway, ApiRefused
        """
        found = answer_of(self._api.read_namespaced_deployment, name, self._namespace)
        status = found.get("status") or {}
        old = int(status.get("replicas") or 0) - int(status.get("updatedReplicas") or 0)
        return Deployed(int(found["spec"].get("replicas", 1)), str(found["metadata"]["resourceVersion"]), old > 0)

    def change(self, name: str, count: int) -> int:
        """Add so many replicas, or take them away, by the scale subresource; gives their number afterwards.

        Raises:
            ApiAway, ApiRefused
        """
        read, patch = self._api.read_namespaced_deployment_scale, self._api.patch_namespaced_deployment_scale
        return _changed(
            lambda: answer_of(read, name, self._namespace, silence_s=ACT_S),
            lambda body: answer_of(patch, name, self._namespace, body, silence_s=ACT_S),
            count,
        )


class RoleScalers:
    """The role scalers of one DisaggregatedSet."""

    def __init__(self, connection: Any, namespace: str, set_name: str) -> None:
        from kubernetes.client import CustomObjectsApi

        self._api, self._namespace, self._set = CustomObjectsApi(connection), namespace, set_name
        patching = type(connection)(connection.configuration)
        # Some generations of the client send a strategic patch, which is refused for custom resources.
        patching.set_default_header("Content-Type", "application/merge-patch+json")
        self._patching = CustomObjectsApi(patching)

    def read(self, name: str) -> Deployed:
        """One of them, with what the set says of its role.

        Raises:
            ApiAway, ApiRefused
        """
        scale = answer_of(self._api.get_namespaced_custom_object_scale, *_SETS, self._namespace, _SCALERS, name)
        found = answer_of(self._api.get_namespaced_custom_object, *_SETS, self._namespace, _OF_SETS, self._set)
        status, about = found.get("status") or {}, found["metadata"]
        seen = int(status.get("observedGeneration") or 0)
        is_unseen = 0 < seen < int(about.get("generation") or 0)
        roles = {f"{self._set}-{each['name']}": each for each in status.get("roleStatuses") or ()}
        of_role = roles.get(name, {})
        old = int(of_role.get("replicas") or 0) - int(of_role.get("updatedReplicas") or 0)
        replicas = int((scale.get("spec") or {}).get("replicas") or 0)
        return Deployed(replicas, str(scale["metadata"]["resourceVersion"]), is_unseen or old > 0)

    def change(self, name: str, count: int) -> int:
        """Add so many groups of one pod, or take them away; gives their number afterwards.

        Raises:
            ApiAway, ApiRefused
        """
        read, patch = self._api.get_namespaced_custom_object_scale, self._patching.patch_namespaced_custom_object_scale
        named = (*_SETS, self._namespace, _SCALERS, name)
        return _changed(
            lambda: answer_of(read, *named, silence_s=ACT_S),
            lambda body: answer_of(patch, *named, body, silence_s=ACT_S),
            count,
        )


def _changed(read: Callable[[], Object], patch: Callable[[Object], Any], count: int) -> int:
    """Change a scale that is read first. A change that crosses another one's is made again, upon what that one left."""
    for left in reversed(range(TRIES)):
        scale = read()
        wanted = max(0, int((scale.get("spec") or {}).get("replicas") or 0) + count)
        version = str(scale["metadata"]["resourceVersion"])
        try:
            patch({"metadata": {"resourceVersion": version}, "spec": {"replicas": wanted}})
        except ApiRefused as error:
            if error.status != CONFLICT or not left:
                raise
        else:
            return wanted
    raise AssertionError("the last try returns or raises")


def _names(text: str) -> tuple[str, ...]:
    try:
        value = json.loads(text)
    except ValueError:
        return ()
    return tuple(str(each) for each in value) if isinstance(value, list) else ()
