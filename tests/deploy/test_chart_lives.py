"""The chart from install to uninstall, by a real helm, with every pod's command really run as a process."""

import json
import os
import signal
import threading
from pathlib import Path

import httpx
import pytest
from support.deploy.charts import CHART, ROOT, helm
from support.deploy.kube.cluster import Kube, kube

pytestmark = pytest.mark.campaign

KEY = "a-key-of-the-tests-1"
VALUES = f"--values={ROOT / 'deploy/helm/presets/kind.yaml'}"
SETTINGS = (
    "--set=router.replicas=2,decode.replicas=2,router.endpointSeconds=1,drainTimeoutSeconds=60",
    "--set=apiKeys.secretName=clients",
)
PROMPT = "def add(a, b):\n    return a + b\n" * 12  # long enough to be handed over


class Load:
    """Clients that ask for completions again and again, through the Service's address, until the block ends."""

    def __init__(self, url: str, num_clients: int) -> None:
        self.answers: list[int] = []
        self.failures: list[str] = []
        self._url, self._ending = url, threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(num_clients)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        while not self._ending.wait(0.1):  # the successor needs the processor too
            try:
                answer = completion(self._url, f"# client {number}, answer {len(self.answers)}\n{PROMPT}")
                self.answers.append(answer["usage"]["completion_tokens"])
            except (httpx.HTTPError, KeyError) as error:
                self.failures.append(repr(error))


def completion(url: str, prompt: str) -> dict:
    body = {"prompt": prompt, "max_tokens": 24, "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/completions", json=body, headers={"authorization": f"Bearer {KEY}"}, timeout=120)
    answer.raise_for_status()
    return answer.json()


def fleets(cluster: Kube) -> list[dict[str, str]]:
    """What each router knows: the state of every worker by name."""
    told = [ask(router, "/v1/cluster") for router in routers(cluster)]
    return [{worker["worker_id"]: worker["state"] for worker in each["workers"]} for each in told]


def routers(cluster: Kube) -> list[str]:
    """The HTTP address of each router's pod."""
    return [f"http://{pod['status']['podIP']}:8000" for pod in cluster.pods("router")]


def ask(url: str, path: str) -> dict:
    answer = httpx.get(url + path, headers={"authorization": f"Bearer {KEY}"}, timeout=60)
    return answer.json() if answer.status_code == 200 else {}


def names(pods: list[dict]) -> set[str]:
    return {pod["metadata"]["name"] for pod in pods}


@pytest.fixture
def cluster(tmp_path: Path):
    helm()
    with kube(tmp_path) as running:
        yield running


@pytest.mark.timeout(3000)
def test_routers_that_come_and_go_are_found_by_endpoint_slices_and_find_each_other(cluster: Kube):
    cluster.make_secret("clients", keys=json.dumps([KEY]), key=KEY)
    cluster.make_secret("ts-twostroke-cluster-key", key="0123456789abcdef0123456789abcdef")
    settings = ("--set=discovery.kind=endpointslices,decode.replicas=1", *SETTINGS[1:])
    cluster.helm("install", "ts", str(CHART), VALUES, *settings, "--set=router.endpointSeconds=1,router.replicas=1")
    cluster.wait(lambda: cluster.is_ready(router=1, prefill=1, decode=1), "ready pods")
    everybody = dict.fromkeys(names(cluster.pods("prefill") + cluster.pods("decode")), "live")
    cluster.wait(lambda: fleets(cluster) == [everybody], "the router's fleet")

    # More routers: every worker tells them, and each knows the others by the names of their pods.
    cluster.helm("upgrade", "ts", str(CHART), "--reuse-values", "--set=router.replicas=3")
    cluster.wait(lambda: cluster.is_ready(router=3), "three routers")
    cluster.wait(lambda: fleets(cluster) == [everybody] * 3, "all fleets")
    known = lambda: [{each["name"] for each in ask(url, "/v1/cluster")["routers"]} for url in routers(cluster)]  # noqa: E731
    cluster.wait(lambda: known() == [names(cluster.pods("router"))] * 3, "routers that know each other")
    made = completion(routers(cluster)[0], PROMPT)
    told = [ask(url, f"/v1/requests/{made['id']}/explain") for url in routers(cluster)]
    assert all(each.get("state") == "finished" for each in told), told

    # One goes: the workers and the others forget it, and the rest serves.
    gone = sorted(names(cluster.pods("router")))[0]
    cluster.helm("upgrade", "ts", str(CHART), "--reuse-values", "--set=router.replicas=2")
    cluster.wait(lambda: len(cluster.pods("router")) == 2, "the router's end")
    cluster.wait(lambda: known() == [names(cluster.pods("router"))] * 2, f"routers that forgot one ({gone})")
    url = f"http://{cluster.node.address_of('ts-twostroke')}:8000"
    assert completion(url, PROMPT)["usage"]["completion_tokens"] == 24

    # Nobody asked for more than the chart gives, and nobody looked again and again.
    assert {plural for verb, plural in cluster.api.calls if verb == "watch"} == {"endpointslices"}
    assert "403: " not in cluster.node.logs()


@pytest.mark.timeout(3000)
def test_install_serve_lose_a_pod_upgrade_roll_back_uninstall(cluster: Kube):
    # Installed without the cluster's key: the notes say how to make it, and the pods wait for it.
    told = cluster.helm("install", "ts", str(CHART), VALUES, *SETTINGS)
    assert "create secret generic ts-twostroke-cluster-key --from-literal=key=" in told
    cluster.wait(lambda: len(cluster.pods()) == 5, "five pods")
    cluster.wait(lambda: all("CreateContainerConfigError" in json.dumps(pod) for pod in cluster.pods()), "the key")
    cluster.make_secret("clients", keys=json.dumps([KEY]), key=KEY)
    cluster.make_secret("ts-twostroke-cluster-key", key="0123456789abcdef0123456789abcdef")
    cluster.wait(lambda: cluster.is_ready(router=2, prefill=1, decode=2), "ready pods")

    # A completion through the Service's address, whose KV came from the prefill worker.
    url = f"http://{cluster.node.address_of('ts-twostroke')}:8000"
    made = completion(url, PROMPT)
    assert made["usage"]["completion_tokens"] == 24
    everybody = dict.fromkeys(names(cluster.pods("prefill") + cluster.pods("decode")), "live")
    cluster.wait(lambda: fleets(cluster) == [everybody, everybody], "both routers' fleets")
    told = [
        ask(f"http://{pod['status']['podIP']}:8000", f"/v1/requests/{made['id']}/explain")
        for pod in cluster.pods("router")
    ]
    assert names(cluster.pods("prefill")).pop() in json.dumps(told)
    assert httpx.post(f"{url}/v1/completions", json={"prompt": "a"}, timeout=60).status_code == 401

    # The chart's own test; no secret is in any argument or log.
    assert "Succeeded" in cluster.helm("test", "ts", "--timeout=300s")
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert b"0123456789abcdef0123456789abcdef" not in process.read_bytes()
        except OSError:
            continue
    assert "0123456789abcdef0123456789abcdef" not in cluster.node.logs()

    # A decode pod is deleted under load: it drains, nothing fails, another one takes its place.
    before = names(cluster.pods("decode"))
    gone = sorted(before)[0]
    with Load(url, 2) as load:
        cluster.wait(lambda: len(load.answers) >= 4, "answers")
        cluster.store.mark_deleted("pods", "default", gone)
        cluster.wait(lambda: gone not in names(cluster.pods("decode")), "the pod's end")
        cluster.wait(lambda: cluster.is_ready(decode=2), "its successor")
        successor = (names(cluster.pods("decode")) - before).pop()
        cluster.wait(lambda: all(each.get(successor) == "live" for each in fleets(cluster)), "it in the fleets")
        count = len(load.answers)
        cluster.wait(lambda: len(load.answers) >= count + 4, "more answers")
    assert not load.failures
    assert set(load.answers) == {24}

    # A process is killed: its container starts again in the same pod.
    victim = cluster.pods("prefill")[0]["metadata"]["name"]
    os.killpg(cluster.node.pods[victim].process.pid, signal.SIGKILL)
    cluster.wait(lambda: cluster.node.pods[victim].restarts == 1, "the restart")
    cluster.wait(lambda: cluster.is_ready(prefill=1), "the restarted worker")
    assert names(cluster.pods("prefill")) == {victim}

    # An upgrade replaces the routers and takes a decode worker away; a rollback brings both back.
    old = names(cluster.pods("router"))
    more = ("--reuse-values", "--set=router.podAnnotations.changed=yes,decode.replicas=1", "--wait", "--timeout=600s")
    cluster.helm("upgrade", "ts", str(CHART), *more)
    cluster.wait(lambda: not old & names(cluster.pods("router")), "the old routers' end")
    cluster.wait(lambda: cluster.is_ready(router=2, prefill=1, decode=1), "ready pods")
    assert completion(url, PROMPT)["usage"]["completion_tokens"] == 24
    cluster.helm("rollback", "ts", "1")
    cluster.wait(lambda: cluster.is_ready(router=2, prefill=1, decode=2), "ready pods")
    assert not any("changed" in pod["metadata"].get("annotations", {}) for pod in cluster.pods("router"))
    assert completion(url, PROMPT)["usage"]["completion_tokens"] == 24

    # Nothing is left, but what we made ourselves.
    processes = [pod.process for pod in cluster.node.pods.values()]
    cluster.helm("uninstall", "ts")
    cluster.wait(lambda: not cluster.pods(), "the pods' end")
    assert all(process.returncode == 0 for process in processes)  # each drained by SIGTERM
    kept = {"secrets": {"clients", "ts-twostroke-cluster-key"}}
    for plural in ("deployments", "replicasets", "pods", "services", "configmaps", "secrets", "serviceaccounts"):
        assert names(cluster.store.all(plural)) == kept.get(plural, set()), plural
