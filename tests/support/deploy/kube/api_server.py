"""A stand-in for Kubernetes' API server: enough of it for helm, kubectl, the official client and the node of node.py.

Discovery, create, read, list by labels, replace, merge patches (strategic ones too), delete, watch, the scale
subresource, Roles of service accounts. It validates nothing. The node changes objects through the `Store`.
Faults: it can be away, forget old versions, fall silent, and refuse the next calls.
"""

import json
import socket
import ssl
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from .access import is_allowed, verb_of
from .paths import KINDS, Target, discovery, group_of, is_custom, is_selected, merged, target_of
from .store import Object, Store


class ApiServer:
    """Serves a store on loopback until `close`."""

    def __init__(self, store: Store, tls: ssl.SSLContext | None = None) -> None:
        """`tls`: of a server, for HTTPS."""
        self.store, self._tls = store, tls
        self.calls: Counter[tuple[str, str]] = Counter()  # verb, plural or plural/subresource
        self.refusals: list[tuple[str, int]] = []  # of the next calls with this verb: the status
        self.horizon = 0  # a watch from a version before this one gets 410
        self.silent = threading.Event()  # watches say nothing, and do not end in time
        self._port = 0
        self.start()

    @property
    def url(self) -> str:
        """Its address."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Serve, at the same port as before."""
        self.ending = threading.Event()
        self.connections: set[socket.socket] = set()
        handler = type("Handler", (_Handler,), {"store": self.store, "api": self, "ending": self.ending})
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), handler)
        self._server.daemon_threads = True
        if self._tls is not None:
            self._server.socket = self._tls.wrap_socket(self._server.socket, server_side=True)
        self._port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def kubeconfig(self, token: str = "") -> str:
        """A kubeconfig for this server, as text; `token`: of a service account (access.py)."""
        named = [{"name": "stand-in", "cluster": {"server": self.url}}]
        context = [{"name": "stand-in", "context": {"cluster": "stand-in", "user": "test"}}]
        users = [{"name": "test", "user": {"token": token} if token else {}}]
        config = {"clusters": named, "contexts": context, "users": users, "current-context": "stand-in"}
        return json.dumps({"apiVersion": "v1", "kind": "Config"} | config)

    def close(self) -> None:
        """End the server, all watches and all connections. It can be started again."""
        self.ending.set()
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it has ended


class _Handler(BaseHTTPRequestHandler):
    store: Store
    api: ApiServer
    ending: threading.Event
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.api.connections.add(self.connection)

    def finish(self) -> None:
        self.api.connections.discard(self.connection)
        super().finish()

    def do_GET(self) -> None:
        path, query = self._where()
        if path[0] in ("version", "api", "apis") and (found := discovery(path)) is not None:
            return self._send(200, found)
        if path == ["openapi", "v2"]:
            return self._answer(200, b"")  # an empty document: clients skip validation of what it does not describe
        target = self._target()
        if target is None:
            return None
        if target.name:
            found = self.store.get(target.plural, target.namespace, target.name)
            return self._send(200, self._seen(found, target)) if found else self._missing(target.name)
        if query.get("watch") in ("1", "true"):
            return self._watch(target.plural, target.namespace, query)
        version = self.store.version
        every = self.store.all(target.plural, namespace=target.namespace or None)
        kind = next(kinds[target.plural] for kinds in KINDS.values() if target.plural in kinds)
        return self._send(
            200,
            {
                "kind": f"{kind}List",
                "apiVersion": group_of(target.plural),
                "metadata": {"resourceVersion": str(version)},
                "items": [each for each in every if is_selected(each, query)],
            },
        )

    def do_POST(self) -> None:
        value, target = self._body(), self._target()
        if target is None:
            return None
        value["metadata"].setdefault("namespace", target.namespace or "default")
        if self.store.get(target.plural, value["metadata"]["namespace"], value["metadata"]["name"]):
            return self._fail(409, "AlreadyExists", f"{value['metadata']['name']} already exists")
        return self._send(201, self.store.put(target.plural, value))

    def do_PUT(self) -> None:
        self._change(lambda _, value: value)

    def do_PATCH(self) -> None:
        kind = self.headers.get("content-type", "")
        is_strategic = "strategic" in kind
        return self._change(
            lambda before, patch: merged(before, patch, is_strategic=is_strategic), is_strategic=is_strategic
        )

    def do_DELETE(self) -> None:
        self._body()
        target = self._target()
        if target is None:
            return None
        found = self.store.mark_deleted(target.plural, target.namespace, target.name)
        return self._send(200, found) if found else self._missing(target.name)

    def _change(self, changed: Any, *, is_strategic: bool = False) -> None:
        given, target = self._body(), self._target()
        if target is None:
            return None
        if is_strategic and is_custom(target.plural):
            return self._fail(415, "UnsupportedMediaType", "strategic merge patches are not for custom resources")
        before = self.store.get(target.plural, target.namespace, target.name)
        if before is None:
            return self._missing(target.name)
        value = changed(self._seen(before, target), given)
        version = (value.get("metadata") or {}).get("resourceVersion")
        if version and version != before["metadata"]["resourceVersion"]:
            return self._fail(409, "Conflict", f"{target.name} was changed meanwhile")
        if target.subresource == "scale":
            value = before | {"spec": before["spec"] | {"replicas": value["spec"]["replicas"]}}
        value["metadata"]["namespace"] = target.namespace
        return self._send(200, self._seen(self.store.put(target.plural, value), target))

    def _seen(self, value: Object, target: Target) -> Object:
        """An object, or its scale."""
        if target.subresource != "scale":
            return value
        about = {name: value["metadata"][name] for name in ("name", "namespace", "uid", "resourceVersion")}
        counts = {"spec": {"replicas": value["spec"].get("replicas", 1)}}
        status = {"status": {"replicas": value.get("status", {}).get("replicas", 0)}}
        return {"kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": about} | counts | status

    def _watch(self, plural: str, namespace: str, query: dict[str, str]) -> None:
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        store, seen = self.store, int(query.get("resourceVersion") or self.store.version)
        end_s = time.monotonic() + float(query.get("timeoutSeconds") or 600)
        try:
            if seen < self.api.horizon:
                status = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
                self._line("ERROR", status)
            while seen >= self.api.horizon and not self.ending.is_set():
                if self.api.silent.is_set():
                    self.ending.wait(0.05)
                    continue
                if time.monotonic() >= end_s:
                    break
                with store.changed:
                    if store.version == seen:
                        store.changed.wait(min(0.5, max(0.01, end_s - time.monotonic())))
                    events = [each for each in store.events if each[0] > seen]
                    if self.api.silent.is_set():
                        continue
                    seen = store.version
                for _, of, kind, value in events:
                    is_here = of == plural and (not namespace or value["metadata"]["namespace"] == namespace)
                    if is_here and is_selected(value, query):
                        self._line(kind, value)
            if query.get("allowWatchBookmarks") == "true" and seen >= self.api.horizon and not self.ending.is_set():
                self._line("BOOKMARK", {"metadata": {"resourceVersion": str(seen)}})
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            pass  # the watcher is gone

    def _line(self, kind: str, value: Object) -> None:
        line = json.dumps({"type": kind, "object": value}).encode() + b"\n"
        self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
        self.wfile.flush()

    def _target(self) -> Target | None:
        """What the call is about; None: it has been answered, with a refusal."""
        path, query = self._where()
        target = target_of(path)
        if not target.plural:
            self._missing(self.path)
            return None
        verb = verb_of(self.command, target, query)
        self.api.calls[verb, "/".join(filter(None, (target.plural, target.subresource)))] += 1
        for refusal in self.api.refusals:
            if refusal[0] == verb:
                self.api.refusals.remove(refusal)
                self._fail(refusal[1], "Refused", "the test wants it")
                return None
        if not is_allowed(self.store, self.headers.get("authorization", ""), verb, target):
            self._fail(403, "Forbidden", f"cannot {verb} {target.plural} in the namespace {target.namespace}")
            return None
        return target

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
