"""A cluster of one stand-in node behind a stand-in API server, for a real helm."""

import base64
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.deploy.charts import helm

from .api_server import ApiServer
from .node import Node
from .store import Store

MOST_RESTARTS = 3  # of a container, before a wait gives up


class Kube:
    """What a test does to the cluster, and sees of it."""

    def __init__(self, folder: Path) -> None:
        self.store = Store()
        self.api = ApiServer(self.store)
        (folder / "pods").mkdir()
        self.node = Node(self.store, folder / "pods", self.api.kubeconfig)
        self._folder = folder
        (folder / "kubeconfig").write_text(self.api.kubeconfig())
        (folder / "kubeconfig").chmod(0o600)
        self.node.start()

    def helm(self, *arguments: str) -> str:
        """Run helm against the cluster; gives its output, which fails the test if helm failed."""
        kept = {"KUBECONFIG": str(self._folder / "kubeconfig"), "HOME": str(self._folder), "PATH": os.environ["PATH"]}
        command = [helm(), "--namespace", "default", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=kept, timeout=900, check=False)
        assert done.returncode == 0, f"helm {' '.join(arguments)}: {done.stderr}\n{done.stdout}\n{self.node.logs()}"
        return done.stdout

    def make_secret(self, name: str, **texts: str) -> None:
        """Create a Secret."""
        data = {key: base64.b64encode(text.encode()).decode() for key, text in texts.items()}
        self.store.put("secrets", {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": data})

    def pods(self, component: str = "") -> list[dict[str, Any]]:
        """Pods of a role, or all of ours; also those that are ending."""
        labels = {"app.kubernetes.io/component": component} if component else {"app.kubernetes.io/instance": "ts"}
        return self.store.all("pods", labels)

    def wait(self, condition: Callable[[], Any], what: str, timeout_s: float = 900.0) -> None:
        """Wait for a condition."""
        end_s = time.monotonic() + timeout_s
        while not condition():
            loops = [name for name, pod in list(self.node.pods.items()) if pod.restarts > MOST_RESTARTS]
            assert not loops, f"{what}: {loops} end again and again\n{self.node.logs()}"
            assert time.monotonic() < end_s, f"{what}: not within {timeout_s:g} s\n{self.node.logs()}"
            time.sleep(0.1)

    def is_ready(self, **wanted: int) -> bool:
        """Whether exactly so many pods of each role are there, and all of them are ready."""
        return all(
            len(pods := self.pods(role)) == count and all(_is_ready(pod) for pod in pods)
            for role, count in wanted.items()
        )


def _is_ready(pod: dict[str, Any]) -> bool:
    conditions = pod.get("status", {}).get("conditions", [])
    return "deletionTimestamp" not in pod["metadata"] and {"type": "Ready", "status": "True"} in conditions


@contextmanager
def kube(folder: Path) -> Iterator[Kube]:
    """A cluster that ends with the test, and every process with it."""
    cluster = Kube(folder)
    try:
        yield cluster
    finally:
        cluster.node.close()
        cluster.api.close()
