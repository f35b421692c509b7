"""A cluster over two machines, joined by Ray: both have a role, KV goes over the network with TLS, one is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.namespaces import Machines, machines

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(600)]

RAY_PORT, HTTP, GRPC = 6391, 25801, 25802
PATIENCE_S = 150.0
ASK = """
import json, sys
from twostroke import Client
with Client("127.0.0.1:{grpc}", timeout_s=120) as client:
    done = client.generate("def add(a, b):\\n" * 60, max_tokens=16, temperature=0.0)
    known = client.cluster()
    workers = {{w["worker_id"]: [w["state"], w["address"]] for w in known["workers"]}}
    print(json.dumps([done.choices[0].token_ids, workers]))
"""


class RayOnBoth:
    """`ray start` on both machines, and `twostroke serve` on the first."""

    def __init__(self, made: Machines, folder: Path) -> None:
        self.machines, self._folder = made, folder
        self._environment = {
            **os.environ,
            "PYTHONSAFEPATH": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "TMPDIR": str(folder),
            "XDG_RUNTIME_DIR": str(folder),
        }
        self._said = (folder / "serve.log").open("w")
        self.serving: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        first, second = self.machines.addresses
        head = ["--head", f"--port={RAY_PORT}", f"--temp-dir={self._folder}/r", "--include-dashboard=false"]
        self._ray(0, [*head, f"--node-ip-address={first}"])
        self._ray(1, [f"--address={first}:{RAY_PORT}", f"--node-ip-address={second}"])

    def serve(self, *flags: str) -> None:
        command = [sys.executable, "-P", "-m", "twostroke.cli.main", "serve", "--launcher", "ray"]
        command += ["--ray-address", f"{self.machines.addresses[0]}:{RAY_PORT}", "--port", str(HTTP)]
        command += ["--grpc-port", str(GRPC), "--kv-cache-tokens", "8192", *flags]
        self.serving = subprocess.Popen(
            self.machines.on(0, command), env=self._environment, stdout=self._said, stderr=self._said
        )
        self.until(lambda: "is served at" in self.said, "the cluster serves")

    @property
    def said(self) -> str:
        return " ".join(Path(self._said.name).read_text().split())

    def ask(self) -> Any:
        program = ASK.format(grpc=GRPC)
        done = subprocess.run(
            self.machines.on(0, [sys.executable, "-P", "-c", program]),
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0, f"{done.stderr}\n{self.said[-3000:]}"
        return json.loads(done.stdout)

    def until(self, holds: Any, what: str) -> None:
        end_s = time.monotonic() + PATIENCE_S
        while not holds():
            assert self.serving is None or self.serving.poll() is None, self.said
            assert time.monotonic() < end_s, f"not within {PATIENCE_S:g} s: {what}\n{self.said[-3000:]}"
            time.sleep(0.2)

    def _ray(self, machine: int, words: list[str]) -> None:
        ray = Path(sys.executable).with_name("ray")
        command = [
            str(ray),
            "start",
            *words,
            "--num-cpus=1",
            "--object-store-memory=100000000",
            "--disable-usage-stats",
        ]
        done = subprocess.run(
            self.machines.on(machine, command),
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def stop(self) -> None:
        if self.serving is not None and self.serving.poll() is None:
            self.serving.send_signal(signal.SIGTERM)
            try:
                self.serving.wait(30)
            except subprocess.TimeoutExpired:
                self.serving.kill()
        self._said.close()


@pytest.fixture
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayOnBoth]:
    with machines() as made:
        folder = Path("/tmp") / f"ts-nodes-{os.getpid()}"  # short, for Ray's sockets
        folder.mkdir(mode=0o700)
        cluster = RayOnBoth(made, folder)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
            made.remove()
            subprocess.run(["rm", "-rf", str(folder)], check=False)


def test_a_cluster_over_two_machines_outlives_one(both: RayOnBoth):
    both.serve("--prefill", "1", "--decode", "1", "--kv-transport", "grpc")
    before = both.machines.received_bytes(1)
    ids, workers = both.ask()
    first, second = both.machines.addresses
    assert workers["prefill-0"][1].split(":")[0] == first
    assert workers["decode-0"][1].split(":")[0] == second
    assert both.machines.received_bytes(1) - before > 100_000  # the prompt's KV
    assert "mutual TLS" in both.said
    both.machines.power_off(1)
    again, _ = both.ask()  # waits for the decode worker, which moves
    assert again == ids
    both.until(lambda: "decode-0 moves to" in both.said, "the move is said")
    ids, workers = both.ask()
    assert workers["decode-0"][0] == "live"
    assert workers["decode-0"][1].split(":")[0] == first
