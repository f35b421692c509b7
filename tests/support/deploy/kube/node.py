"""A stand-in for everything of Kubernetes behind its API: Deployments become pods, and pods become processes.

Real: commands, arguments, environment with what it refers to, mounted ConfigMaps, init containers, probes, restarts,
preStop, SIGTERM and the grace, rolling updates, Services that pass connections to ready pods, their DNS names and
EndpointSlices, the rights of the pods' accounts.
Not real: pods share this machine's files and network. A mounted path is a folder of the pod, wherever arguments and
environment name it, and "all addresses" (0.0.0.0) is the pod's own loopback address. No limit is enforced.
"""

import asyncio
import base64
import contextlib
import copy
import hashlib
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc

from .access import token_of
from .endpoints import publish
from .store import Object, Store

ROOT = Path(__file__).resolve().parents[4]
INSIDE = Path(__file__).parent / "inside"
TICK_S = 0.2
PROBE_S = 0.5  # the period of all probes
PATIENCE = 20  # times a probe's timeout: this machine may be busy
PROGRAMS = {
    "twostroke": [sys.executable, "-m", "twostroke.cli.main"],
    "python": [sys.executable],
}


class NotYet(Exception):
    """What a pod refers to does not exist."""


class Pod:
    """A pod that runs here: its process and what its probes said."""

    def __init__(self, spec: Object, folder: Path, address: str) -> None:
        self.spec, self.folder, self.address = spec, folder, address
        self.process: asyncio.subprocess.Process | None = None
        self.restarts = 0
        self.is_started = False
        self.is_ready = False
        self.failures = 0
        self.reason = "ContainerCreating"
        self.task: asyncio.Task[None] | None = None
        self.ending: asyncio.Task[None] | None = None


class Node:
    """Controllers, kubelet, kube-proxy and DNS over a store. `start` and `close` from the test's thread."""

    def __init__(self, store: Store, folder: Path, kubeconfig: Callable[[str], str]) -> None:
        """`kubeconfig`: the text of one for the token of a service account."""
        self.store, self.folder = store, folder
        self._kubeconfig = kubeconfig
        self.pods: dict[str, Pod] = {}
        self._names = folder / "names.json"
        self._names.write_text("{}")
        self._num_pods = 0
        self._addresses: dict[str, str] = {}  # of Services
        self._proxies: dict[tuple[str, int], asyncio.Server] = {}
        self._turn = 0
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        one_use = httpx.Limits(max_keepalive_connections=0)
        self._http = httpx.AsyncClient(trust_env=False, verify=False, limits=one_use)  # of all probes
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),), daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def close(self) -> None:
        """Kill all processes and stop."""
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(30)

    def address_of(self, service: str) -> str:
        """The Service's address."""
        return self._addresses[service]

    def logs(self) -> str:
        """The last lines of every pod's log, for a test that fails."""
        return "\n".join(f"== {file.parent.name}\n{file.read_text()[-1500:]}" for file in self.folder.glob("*/log"))

    # ------------------------------------------------------------------ controllers

    async def _run(self) -> None:
        while not self._closing.is_set():
            self._control()
            publish(self.store, self.pods)
            await self._serve_names()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), TICK_S)
        tasks = [task for pod in self.pods.values() for task in (pod.task, pod.ending) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for pod in self.pods.values():
            _signal(pod.process, signal.SIGKILL)
        for proxy in self._proxies.values():
            proxy.close()
        await self._http.aclose()

    def _control(self) -> None:
        deployments = {each["metadata"]["uid"]: each for each in self.store.all("deployments")}
        for deployment in deployments.values():
            self._roll(deployment)
        sets = {each["metadata"]["uid"] for each in self.store.all("replicasets")}
        for owned in self.store.all("replicasets"):
            if _owner(owned) not in deployments:
                self.store.remove("replicasets", owned["metadata"]["namespace"], owned["metadata"]["name"])
        for pod in self.store.all("pods"):
            name, owner = pod["metadata"]["name"], _owner(pod)
            if owner is not None and owner not in sets:
                self.store.mark_deleted("pods", pod["metadata"]["namespace"], name)
            self._keep(name, self.store.get("pods", pod["metadata"]["namespace"], name) or pod)

    def _roll(self, deployment: Object) -> None:
        """One step of a rolling update, or of a replacement."""
        about, spec = deployment["metadata"], deployment["spec"]
        wanted = spec.get("replicas", 1)
        rolling = spec["strategy"]["rollingUpdate"]
        digest = hashlib.sha256(json.dumps(spec["template"], sort_keys=True).encode()).hexdigest()[:10]
        mine = [
            each
            for each in self.store.all("pods", spec["selector"]["matchLabels"], about["namespace"])
            if "deletionTimestamp" not in each["metadata"]
        ]
        new = [each for each in mine if each["metadata"]["labels"]["pod-template-hash"] == digest]
        old = [each for each in mine if each not in new]
        ready = [each for each in mine if _is_ready(each)]
        current = self._replica_set(deployment, digest, wanted)
        if len(new) < wanted and len(mine) < wanted + rolling["maxSurge"]:
            self._create_pod(current, spec["template"], digest)
        elif len(new) > wanted or (old and len(ready) > wanted - rolling["maxUnavailable"]):
            self._delete_one(new if len(new) > wanted else old)
        elif old and any(not _is_ready(each) for each in old):
            self._delete_one([each for each in old if not _is_ready(each)])
        num_ready = len([each for each in new if _is_ready(each)])
        counts = {"replicas": len(mine), "readyReplicas": num_ready, "updatedReplicas": len(new)}
        status = counts | {"availableReplicas": num_ready, "observedGeneration": about["generation"]}
        self.store.set_status("replicasets", about["namespace"], current["metadata"]["name"], counts)
        self.store.set_status("deployments", about["namespace"], about["name"], status)

    def _replica_set(self, deployment: Object, digest: str, replicas: int) -> Object:
        about = deployment["metadata"]
        name = f"{about['name']}-{digest}"
        found = self.store.get("replicasets", about["namespace"], name)
        if found and found["spec"]["replicas"] == replicas:
            return found
        template = copy.deepcopy(deployment["spec"]["template"])
        template["metadata"]["labels"]["pod-template-hash"] = digest
        labels = template["metadata"]["labels"]
        spec = {"replicas": replicas, "template": template, "selector": {"matchLabels": labels}}
        owner = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "name": about["name"],
            "uid": about["uid"],
            "controller": True,
        }
        metadata = {"name": name, "namespace": about["namespace"], "labels": labels, "ownerReferences": [owner]}
        return self.store.put(
            "replicasets", {"apiVersion": "apps/v1", "kind": "ReplicaSet", "metadata": metadata, "spec": spec}
        )

    def _create_pod(self, owned_by: Object, template: Object, digest: str) -> None:
        self._num_pods += 1
        about = owned_by["metadata"]
        owner = {
            "apiVersion": "apps/v1",
            "kind": "ReplicaSet",
            "name": about["name"],
            "uid": about["uid"],
            "controller": True,
        }
        metadata = {
            "name": f"{about['name']}-{self._num_pods:05x}",
            "namespace": about["namespace"],
            "labels": template["metadata"]["labels"] | {"pod-template-hash": digest},
            "annotations": template["metadata"].get("annotations", {}),
            "ownerReferences": [owner],
        }
        self.store.put("pods", {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]})

    def _delete_one(self, pods: list[Object]) -> None:
        chosen = sorted(pods, key=_is_ready)[0]["metadata"]
        self.store.mark_deleted("pods", chosen["namespace"], chosen["name"])

    # ------------------------------------------------------------------ kubelet

    def _keep(self, name: str, wanted: Object) -> None:
        pod = self.pods.get(name)
        if pod is None:
            number = len(list(self.folder.glob("*/"))) + 1
            folder = self.folder / name
            folder.mkdir(exist_ok=True)
            pod = self.pods[name] = Pod(wanted["spec"], folder, f"127.64.{number // 250}.{number % 250 + 1}")
            pod.task = self._loop.create_task(self._live(name, wanted, pod))
        if "deletionTimestamp" in wanted["metadata"] and pod.ending is None:
            pod.ending = self._loop.create_task(self._end(name, wanted["metadata"]["namespace"], pod))

    async def _live(self, name: str, wanted: Object, pod: Pod) -> None:
        """Run a pod's container again and again, as its restart policy says."""
        namespace = wanted["metadata"]["namespace"]
        container = pod.spec["containers"][0]
        say = lambda phase: self.store.set_status("pods", namespace, name, _status(pod, phase))  # noqa: E731
        while True:
            try:
                command, environment = self._prepared(container, wanted, pod)
            except NotYet as error:
                pod.reason = f"CreateContainerConfigError: {error}"
                say("Pending")
                await asyncio.sleep(TICK_S)
                continue
            with (pod.folder / "log").open("ab") as log:
                pod.process = await asyncio.create_subprocess_exec(
                    *command, stdout=log, stderr=log, env=environment, cwd=pod.folder, start_new_session=True
                )
            pod.reason, pod.is_started, pod.is_ready, pod.failures = "", False, False, 0
            say("Running")
            probing = asyncio.create_task(self._probe(container, pod, lambda: say("Running")))
            try:
                code = await pod.process.wait()
            finally:
                probing.cancel()
                await asyncio.gather(probing, return_exceptions=True)
            pod.is_ready = False
            if pod.spec.get("restartPolicy") == "Never":
                say("Succeeded" if code == 0 else "Failed")
                return
            pod.restarts += 1
            say("Running")
            await asyncio.sleep(TICK_S * min(pod.restarts, 10))

    async def _probe(self, container: Object, pod: Pod, say: Any) -> None:
        """Startup first; then liveness, which may kill, and readiness, which may not."""
        pod.is_started = "startupProbe" not in container
        pod.is_ready = "readinessProbe" not in container and pod.is_started
        while True:
            if not pod.is_started:
                pod.is_started = await self._holds(container["startupProbe"], container, pod)
            else:
                live = "livenessProbe" not in container or await self._holds(container["livenessProbe"], container, pod)
                pod.failures = 0 if live else pod.failures + 1
                if pod.failures >= container.get("livenessProbe", {}).get("failureThreshold", 3) * PATIENCE:
                    _signal(pod.process, signal.SIGKILL)
                pod.is_ready = "readinessProbe" not in container or await self._holds(
                    container["readinessProbe"], container, pod
                )
            say()
            await asyncio.sleep(PROBE_S)

    async def _holds(self, probe: Object, container: Object, pod: Pod) -> bool:
        timeout_s = probe.get("timeoutSeconds", 1) * PATIENCE
        if "grpc" in probe:
            async with grpc.aio.insecure_channel(f"{pod.address}:{probe['grpc']['port']}") as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                try:
                    answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
                except grpc.aio.AioRpcError:
                    return False
                return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
        port = probe["httpGet"]["port"]
        number = next((each["containerPort"] for each in container["ports"] if each["name"] == port), port)
        try:
            scheme = probe["httpGet"].get("scheme", "HTTP").lower()
            url = f"{scheme}://{pod.address}:{number}{probe['httpGet']['path']}"
            answer = await self._http.get(url, timeout=timeout_s)
        except httpx.HTTPError:
            return False
        return 200 <= answer.status_code < 400

    async def _end(self, name: str, namespace: str, pod: Pod) -> None:
        """PreStop, SIGTERM, the rest of the grace, SIGKILL; then the object goes."""
        grace_s = pod.spec.get("terminationGracePeriodSeconds", 30)
        pod.is_ready = False  # the Service forgets it now
        if pod.process is not None and pod.process.returncode is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    for hook in [each.get("lifecycle", {}).get("preStop") for each in pod.spec["containers"]]:
                        if hook is not None:
                            await (await asyncio.create_subprocess_exec(*hook["exec"]["command"])).wait()
                    if pod.task is not None:
                        pod.task.cancel()  # it is not restarted any more
                    _signal(pod.process, signal.SIGTERM)
                    await pod.process.wait()
            _signal(pod.process, signal.SIGKILL)
        if pod.task is not None:
            pod.task.cancel()
            await asyncio.gather(pod.task, return_exceptions=True)
        del self.pods[name]
        self.store.remove("pods", namespace, name)

    def _prepared(self, container: Object, wanted: Object, pod: Pod) -> tuple[list[str], dict[str, str]]:
        """Command and environment of a container; its mounted volumes are folders of the pod."""
        namespace = wanted["metadata"]["namespace"]
        environment = {each["name"]: self._value(each, wanted, pod, namespace) for each in container.get("env", [])}
        mounts: dict[str, Path] = {}
        account: dict[str, str] = {}
        for mount in container.get("volumeMounts", []):
            volume = next(each for each in pod.spec["volumes"] if each["name"] == mount["name"])
            folder = mounts[mount["mountPath"]] = pod.folder / volume["name"]
            folder.mkdir(exist_ok=True)
            if "projected" in volume:  # the account's: where there is a kubeconfig, our processes take it
                token = token_of(namespace, wanted["spec"]["serviceAccountName"])
                (folder / "kubeconfig").write_text(self._kubeconfig(token))
                account = {"KUBECONFIG": str(folder / "kubeconfig")}
            if "configMap" in volume:
                for file, text in self._read("configmaps", namespace, volume["configMap"]["name"])["data"].items():
                    (folder / file).write_text(text.replace("0.0.0.0", pod.address))

        def here(text: str) -> str:
            text = re.sub(r"\$\((\w+)\)", lambda found: environment.get(found[1], found[0]), text)
            if mounts:
                paths = "|".join(map(re.escape, mounts))
                text = re.sub(rf"(?<![^=])({paths})(?=/|$)", lambda found: str(mounts[found[1]]), text)
            return text.replace("0.0.0.0", pod.address)

        command = [here(each) for each in [*container.get("command", []), *container.get("args", [])]]
        base = {"PATH": os.environ["PATH"], "STAND_IN_NAMES": str(self._names)}
        paths = {"PYTHONPATH": f"{INSIDE}:{ROOT / 'src'}"}
        settings = {name: here(value) for name, value in environment.items()}
        return [*PROGRAMS.get(command[0], command[:1]), *command[1:]], base | settings | paths | account

    def _value(self, entry: Object, wanted: Object, pod: Pod, namespace: str) -> str:
        if "value" in entry:
            return str(entry["value"])
        source = entry["valueFrom"]
        if "fieldRef" in source:
            return {"metadata.name": wanted["metadata"]["name"], "status.podIP": pod.address}[
                source["fieldRef"]["fieldPath"]
            ]
        secret = self._read("secrets", namespace, source["secretKeyRef"]["name"])
        return base64.b64decode(secret["data"][source["secretKeyRef"]["key"]]).decode()

    def _read(self, plural: str, namespace: str, name: str) -> Object:
        found = self.store.get(plural, namespace, name)
        if found is None:
            raise NotYet(f"{plural} {name} is not there")
        return found

    # ------------------------------------------------------------------ Services

    async def _serve_names(self) -> None:
        names: dict[str, list[str]] = {}
        for service in self.store.all("services"):
            about, spec = service["metadata"], service["spec"]
            if spec.get("clusterIP") == "None":
                names[about["name"]] = [each.address for each in self._behind(service) if each.process is not None]
                continue
            if about["name"] not in self._addresses:
                self._addresses[about["name"]] = f"127.65.0.{len(self._addresses) + 1}"
                spec["clusterIP"] = self._addresses[about["name"]]
                self.store.put("services", service)
            names[about["name"]] = [self._addresses[about["name"]]]
            for port in spec["ports"]:
                await self._proxy(about["name"], port)
        known = set(names)
        for name, port in [key for key in self._proxies if key[0] not in known]:
            self._proxies.pop((name, port)).close()
        draft = self._names.with_suffix(".new")
        draft.write_text(json.dumps(names))
        draft.replace(self._names)

    def _behind(self, service: Object) -> list[Pod]:
        """Pods of a Service: the ready ones, or all of them."""
        namespace, selector = service["metadata"]["namespace"], service["spec"]["selector"]
        names = [each["metadata"]["name"] for each in self.store.all("pods", selector, namespace)]
        takes_all = service["spec"].get("publishNotReadyAddresses", False)
        found = [self.pods[name] for name in names if name in self.pods]
        return [pod for pod in found if pod.ending is None and (pod.is_ready or takes_all)]

    async def _proxy(self, name: str, port: Object) -> None:
        if (name, port["port"]) in self._proxies:
            return

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            service = self.store.all("services")
            mine = next(each for each in service if each["metadata"]["name"] == name)
            behind = self._behind(mine)
            if not behind:
                writer.close()
                return
            self._turn += 1
            pod = behind[self._turn % len(behind)]
            ports = pod.spec["containers"][0]["ports"]
            number = next(each["containerPort"] for each in ports if each["name"] == port["targetPort"])
            try:
                there = await asyncio.open_connection(pod.address, number)
            except OSError:
                writer.close()
                return
            await asyncio.gather(_pump(reader, there[1]), _pump(there[0], writer))

        self._proxies[name, port["port"]] = await asyncio.start_server(serve, self._addresses[name], port["port"])


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


def _status(pod: Pod, phase: str) -> Object:
    is_ready = pod.is_ready and pod.ending is None
    words = {True: "True", False: "False"}
    return {
        "phase": phase,
        "podIP": pod.address,
        "conditions": [{"type": kind, "status": words[is_ready]} for kind in ("Ready", "ContainersReady")],
        "containerStatuses": [
            {
                "name": pod.spec["containers"][0]["name"],
                "ready": is_ready,
                "restartCount": pod.restarts,
                "state": {"waiting": {"reason": pod.reason}} if pod.reason else {"running": {}},
            }
        ],
    }


def _is_ready(pod: Object) -> bool:
    return any(each == {"type": "Ready", "status": "True"} for each in pod.get("status", {}).get("conditions", []))


def _owner(value: Object) -> str | None:
    owners = value["metadata"].get("ownerReferences", [])
    return owners[0]["uid"] if owners else None


def _signal(process: asyncio.subprocess.Process | None, number: int) -> None:
    if process is not None and process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
