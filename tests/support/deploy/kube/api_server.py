"""A stand-in for Kubernetes' API server: enough of it for helm, kubectl and the node of node.py.

Discovery, create, read, list by labels, replace, merge patches (strategic ones too), delete, watch. It validates
nothing and keeps everything in memory. The node changes objects through the `Store`.
"""

import copy
import json
import threading
import time
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

Object = dict[str, Any]

KINDS = {  # group/version -> plural: kind
    "v1": {
        **{"pods": "Pod", "services": "Service", "secrets": "Secret", "configmaps": "ConfigMap"},
        **{"serviceaccounts": "ServiceAccount", "namespaces": "Namespace"},
    },
    "apps/v1": {"deployments": "Deployment", "replicasets": "ReplicaSet"},
    "policy/v1": {"poddisruptionbudgets": "PodDisruptionBudget"},
    "networking.k8s.io/v1": {"networkpolicies": "NetworkPolicy", "ingresses": "Ingress"},
    "autoscaling/v2": {"horizontalpodautoscalers": "HorizontalPodAutoscaler"},
}
MERGE_KEYS = {  # of lists in strategic merge patches
    **{"containers": "name", "initContainers": "name", "env": "name", "volumes": "name", "volumeMounts": "mountPath"},
    "imagePullSecrets": "name",
}


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


class ApiServer:
    """Serves a store on loopback until `close`."""

    def __init__(self, store: Store) -> None:
        self.store = store
        handler = type("Handler", (_Handler,), {"store": store, "ending": threading.Event()})
        self._ending = handler.ending
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def kubeconfig(self) -> str:
        """A kubeconfig for this server, as text."""
        named = [{"name": "stand-in", "cluster": {"server": self.url}}]
        context = [{"name": "stand-in", "context": {"cluster": "stand-in", "user": "test"}}]
        users = [{"name": "test", "user": {}}]
        config = {"clusters": named, "contexts": context, "users": users, "current-context": "stand-in"}
        return json.dumps({"apiVersion": "v1", "kind": "Config"} | config)

    def close(self) -> None:
        """End the server and all watches."""
        self._ending.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    store: Store
    ending: threading.Event
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path, query = self._where()
        if path[0] in ("version", "api", "apis") and (found := _discovery(path)) is not None:
            return self._send(200, found)
        if path == ["openapi", "v2"]:
            return self._answer(200, b"")  # an empty document: clients skip validation of what it does not describe
        plural, namespace, name = _target(path)
        if plural is None:
            return self._missing(self.path)
        if name:
            found = self.store.get(plural, namespace, name)
            return self._send(200, found) if found else self._missing(name)
        if query.get("watch") in ("1", "true"):
            return self._watch(plural, namespace, query)
        version = self.store.version
        items = [each for each in self.store.all(plural, namespace=namespace or None) if _is_selected(each, query)]
        kind = next(kinds[plural] for kinds in KINDS.values() if plural in kinds)
        return self._send(
            200,
            {
                "kind": f"{kind}List",
                "apiVersion": _group_of(plural),
                "metadata": {"resourceVersion": str(version)},
                "items": items,
            },
        )

    def do_POST(self) -> None:
        plural, namespace, _ = _target(self._where()[0])
        value = self._body()
        if plural is None:
            return self._missing(self.path)
        value["metadata"].setdefault("namespace", namespace or "default")
        if self.store.get(plural, value["metadata"]["namespace"], value["metadata"]["name"]):
            return self._fail(409, "AlreadyExists", f"{value['metadata']['name']} already exists")
        return self._send(201, self.store.put(plural, value))

    def do_PUT(self) -> None:
        plural, namespace, name = _target(self._where()[0])
        value, before = self._body(), self.store.get(plural or "", namespace, name)
        if before is None:
            return self._missing(name)
        version = value["metadata"].get("resourceVersion")
        if version and version != before["metadata"]["resourceVersion"]:
            return self._fail(409, "Conflict", f"{name} was changed meanwhile")
        value["metadata"]["namespace"] = namespace
        return self._send(200, self.store.put(str(plural), value))

    def do_PATCH(self) -> None:
        plural, namespace, name = _target(self._where()[0])
        patch, before = self._body(), self.store.get(plural or "", namespace, name)
        if before is None:
            return self._missing(name)
        is_strategic = "strategic" in self.headers.get("content-type", "")
        return self._send(200, self.store.put(str(plural), merged(before, patch, is_strategic=is_strategic)))

    def do_DELETE(self) -> None:
        plural, namespace, name = _target(self._where()[0])
        self._body()
        found = self.store.mark_deleted(plural or "", namespace, name)
        return self._send(200, found) if found else self._missing(name)

    def _watch(self, plural: str, namespace: str, query: dict[str, str]) -> None:
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        store, seen = self.store, int(query.get("resourceVersion") or self.store.version)
        end_s = time.monotonic() + float(query.get("timeoutSeconds") or 600)
        try:
            while not self.ending.is_set() and time.monotonic() < end_s:
                with store.changed:
                    if store.version == seen:
                        store.changed.wait(0.5)
                    events = [each for each in store.events if each[0] > seen]
                    seen = store.version
                for _, of, kind, value in events:
                    if (
                        of == plural
                        and (not namespace or value["metadata"]["namespace"] == namespace)
                        and _is_selected(value, query)
                    ):
                        line = json.dumps({"type": kind, "object": value}).encode() + b"\n"
                        self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
                        self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            pass  # the watcher is gone

    def _where(self) -> tuple[list[str], dict[str, str]]:
        split = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(split.query).items()}
        return split.path.strip("/").split("/"), query

    def _body(self) -> Any:
        text = self.rfile.read(int(self.headers.get("content-length") or 0))
        return json.loads(text) if text else {}

    def _missing(self, what: str) -> None:
        self._fail(404, "NotFound", f"{what} not found")

    def _fail(self, code: int, reason: str, message: str) -> None:
        status = {"status": "Failure", "reason": reason, "message": message, "code": code}
        self._send(code, {"kind": "Status", "apiVersion": "v1"} | status)

    def _send(self, code: int, value: Object) -> None:
        self._answer(code, json.dumps(value).encode())

    def _answer(self, code: int, text: bytes) -> None:
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


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


def _target(path: list[str]) -> tuple[str | None, str, str]:
    """Plural, namespace and name of a path below /api or /apis; a subresource is its object."""
    rest = path[2:] if path[0] == "api" else path[3:]
    namespace = ""
    if len(rest) > 2 and rest[0] == "namespaces":
        namespace, rest = rest[1], rest[2:]
    known = any(rest[:1] == [plural] for kinds in KINDS.values() for plural in kinds)
    return (rest[0] if known else None), namespace, (rest[1] if len(rest) > 1 else "")


def _group_of(plural: str) -> str:
    return next(group for group, kinds in KINDS.items() if plural in kinds)


def _discovery(path: list[str]) -> Object | None:
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


def _is_selected(value: Object, query: dict[str, str]) -> bool:
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


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
