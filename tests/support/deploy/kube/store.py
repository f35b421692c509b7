"""All objects of the stand-in for Kubernetes, in memory."""

import copy
import threading
import time
import uuid
from typing import Any

Object = dict[str, Any]


class Store:
    """All objects, by plural, namespace and name; every change has a number and wakes the watchers."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.version = 0
        self.events: list[tuple[int, str, str, Object]] = []  # version, plural, ADDED | MODIFIED | DELETED, object
        self._objects: dict[tuple[str, str, str], Object] = {}

    def get(self, plural: str, namespace: str, name: str) -> Object | None:
        """A copy of the object, or none."""
        with self.changed:
            return copy.deepcopy(self._objects.get((plural, namespace, name)))

    def all(self, plural: str, labels: dict[str, str] | None = None, namespace: str | None = None) -> list[Object]:
        """Copies of all objects of a kind that have these labels."""
        with self.changed:
            found = [each for key, each in sorted(self._objects.items()) if key[0] == plural]
            return [
                copy.deepcopy(each)
                for each in found
                if (namespace is None or each["metadata"]["namespace"] == namespace)
                and (labels or {}).items() <= each["metadata"].get("labels", {}).items()
            ]

    def put(self, plural: str, value: Object) -> Object:
        """Create or replace an object; gives it its metadata."""
        with self.changed:
            value = copy.deepcopy(value)
            about = value["metadata"]
            about.setdefault("namespace", "default")
            key = (plural, about["namespace"], about["name"])
            before = self._objects.get(key)
            kept = before["metadata"] if before else {"uid": str(uuid.uuid4()), "creationTimestamp": _now()}
            about |= {name: kept[name] for name in ("uid", "creationTimestamp")}
            old_spec = before and before.get("spec")
            about["generation"] = (before["metadata"]["generation"] if before else 0) + (value.get("spec") != old_spec)
            self._objects[key] = value
            self._note("MODIFIED" if before else "ADDED", plural, value)
            return copy.deepcopy(value)

    def set_status(self, plural: str, namespace: str, name: str, status: Object) -> None:
        """Replace the status of an object, if it is there and differs."""
        with self.changed:
            found = self._objects.get((plural, namespace, name))
            if found is not None and found.get("status") != status:
                found["status"] = copy.deepcopy(status)
                self._note("MODIFIED", plural, found)

    def mark_deleted(self, plural: str, namespace: str, name: str) -> Object | None:
        """Delete an object. A pod stays, with a deletion timestamp, until its node removes it."""
        with self.changed:
            found = self._objects.get((plural, namespace, name))
            if found is not None and plural == "pods":
                if "deletionTimestamp" not in found["metadata"]:
                    found["metadata"]["deletionTimestamp"] = _now()
                    self._note("MODIFIED", plural, found)
            elif found is not None:
                self.remove(plural, namespace, name)
            return copy.deepcopy(found)

    def remove(self, plural: str, namespace: str, name: str) -> None:
        """Remove an object at once."""
        with self.changed:
            found = self._objects.pop((plural, namespace, name), None)
            if found is not None:
                self._note("DELETED", plural, found)

    def _note(self, kind: str, plural: str, value: Object) -> None:
        self.version += 1
        value["metadata"]["resourceVersion"] = str(self.version)
        self.events.append((self.version, plural, kind, copy.deepcopy(value)))
        self.changed.notify_all()


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
