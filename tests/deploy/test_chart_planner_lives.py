"""The chart's planner with a real helm and every pod's command as a process: workers come, go, and it is seen."""

from pathlib import Path

import httpx
import pytest
from support.deploy.charts import CHART, ROOT, helm
from support.deploy.kube.cluster import Kube, kube

pytestmark = pytest.mark.campaign

VALUES = f"--values={ROOT / 'deploy/helm/presets/kind.yaml'}"
PROMPT = "def add(a, b):\n    return a + b\n" * 12
SETTINGS = "config.planner.min_workers=3,config.planner.max_workers=3,config.planner.start_up_s=1"
MORE = "config.planner.shrink_cooldown_s=5,planner.enabled=true,router.endpointSeconds=1"


def supervisor(cluster: Kube) -> dict:
    """What the router tells of the planner."""
    answer = httpx.get(f"http://{cluster.pods('router')[0]['status']['podIP']}:8000/v1/cluster", timeout=60)
    return answer.json().get("supervisor") or {}


def ask(cluster: Kube) -> bool:
    """A completion through the Service, while pods come and go."""
    url = f"http://{cluster.node.address_of('ts-twostroke')}:8000/v1/completions"
    try:
        return httpx.post(url, json={"prompt": PROMPT, "max_tokens": 8}, timeout=60).status_code > 0
    except httpx.HTTPError:
        return True


def replicas(cluster: Kube) -> int:
    found = {each["metadata"]["name"]: each["spec"].get("replicas", 1) for each in cluster.store.all("deployments")}
    return found["ts-twostroke-prefill"] + found["ts-twostroke-decode"]


@pytest.mark.timeout(3000)
def test_the_planner_starts_the_worker_that_lacks_and_takes_away_the_one_too_many(tmp_path: Path):
    helm()
    with kube(tmp_path) as cluster:
        cluster.make_secret("ts-twostroke-cluster-key", key="0123456789abcdef0123456789abcdef")
        cluster.helm("install", "ts", str(CHART), VALUES, f"--set={SETTINGS}", f"--set={MORE}")
        cluster.wait(lambda: replicas(cluster) == 3, "a third worker")
        workers = lambda: cluster.pods("prefill") + cluster.pods("decode")  # noqa: E731
        cluster.wait(lambda: len(workers()) == 3, "its pod")
        cluster.wait(lambda: sum(supervisor(cluster).get("actual", {}).values()) == 3, "three that serve")
        assert any("holds the Lease" in event for event in supervisor(cluster)["events"])
        assert any("replicas now" in event for event in supervisor(cluster)["events"])
        assert cluster.api.calls["patch", "deployments/scale"] == 1

        # Two are enough from now on. The pods roll out, and measure a few prompts; then one drains, and its Deployment
        # shrinks.
        cluster.helm("upgrade", "ts", str(CHART), "--reuse-values", "--set=config.planner.min_workers=2")
        cluster.wait(lambda: ask(cluster) and replicas(cluster) == 2, "one worker less")
        cluster.wait(lambda: len(workers()) == 2, "its pod's end")
        cluster.wait(lambda: sum(supervisor(cluster).get("actual", {}).values()) == 2, "two that serve")
        assert cluster.api.calls["patch", "deployments/scale"] == 2
        assert cluster.is_ready(router=1, planner=1, prefill=1, decode=1)
        assert "403: " not in cluster.node.logs()
        assert len(cluster.store.all("leases")) == 1
