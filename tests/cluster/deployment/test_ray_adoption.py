"""On a Ray that was there before, members are detached actors: they outlive a supervisor, another one adopts them."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from twostroke import Client
from twostroke.core.ports import free_ports

pytestmark = [pytest.mark.ray, pytest.mark.campaign, pytest.mark.timeout(900)]

BUSY_MACHINE_S = 240.0
ACTORS = ("ray::Router", "ray::PrefillWorker", "ray::DecodeWorker")


class RayHome:
    """A folder with a Ray of its own, and the commands there."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self.folder = folder
        self.ray_port, self.port, self.grpc_port = free_ports("127.0.0.1", 3)
        (folder / "token").touch(mode=0o600)
        (folder / "token").write_text(secrets.token_hex(32))
        given = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "RAY_USAGE_STATS_ENABLED": "0"}
        own = {"XDG_RUNTIME_DIR": str(folder), "TMPDIR": str(folder), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
        self._environment = os.environ | given | own
        settings = {
            "model": {"path": str(checkpoint), "max_model_len": 256, "kernels": "torch"},
            "cache": {"tokens": 4096},
            "step": {"num_threads": 1},
            "router": {"port": self.port, "grpc_port": self.grpc_port},
            "cluster": {
                "launcher": "ray",
                "ray_address": f"127.0.0.1:{self.ray_port}",
                "prefill": 1,
                "decode": 1,
                "ready_timeout_s": 100,  # a starved machine
            },
        }
        (folder / "cluster.json").write_text(json.dumps(settings))

    def start(self) -> None:
        head = ["--head", f"--port={self.ray_port}", f"--temp-dir={self.folder}/r", "--include-dashboard=false"]
        small = ["--num-cpus=2", "--object-store-memory=80000000", "--node-ip-address=127.0.0.1"]
        done = self._run([str(Path(sys.executable).with_name("ray")), "start", *head, *small])
        assert done.returncode == 0, done.stderr

    def up(self) -> subprocess.CompletedProcess[str]:
        return self._say("up", "--config", str(self.folder / "cluster.json"))

    def down(self) -> subprocess.CompletedProcess[str]:
        return self._say("down", "--grpc", f"127.0.0.1:{self.grpc_port}")

    def kill_supervisor(self) -> None:
        state = self.folder / "twostroke" / str(self.grpc_port) / "state.json"
        supervisor = psutil.Process(json.loads(state.read_text())["pid"])
        os.kill(supervisor.pid, signal.SIGKILL)
        psutil.wait_procs([supervisor], timeout=BUSY_MACHINE_S)

    def processes(self, *names: str) -> list[psutil.Process]:
        """Processes with this folder in their environment whose command line begins like one of these."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                is_named = not names or " ".join(process.cmdline()).startswith(names)
                if is_named and process.pid != os.getpid() and self._is_ours(process):
                    found.append(process)
        return found

    def _is_ours(self, process: psutil.Process) -> bool:
        return (
            process.environ().get("TMPDIR") == str(self.folder) or str(self.folder) in " ".join(process.cmdline())
        ) and process.status() != psutil.STATUS_ZOMBIE

    def _say(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self._run([sys.executable, "-P", "-m", "twostroke.cli.main", *words])

    def _run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=self._environment, capture_output=True, text=True, timeout=BUSY_MACHINE_S, check=False
        )


@pytest.fixture
def home(tiny_checkpoint: Path) -> Iterator[RayHome]:
    with tempfile.TemporaryDirectory(prefix="ts-", ignore_cleanup_errors=True) as folder:
        made = RayHome(Path(folder), tiny_checkpoint)
        made.start()
        yield made
        left = made.processes()  # Ray, and what a test that failed has left
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=BUSY_MACHINE_S)


def workers(client: Client) -> dict[str, dict[str, Any]]:
    return {worker["worker_id"]: worker for worker in client.cluster()["workers"]}


def answer(client: Client) -> str:
    return client.generate("the same question", max_tokens=16, temperature=0.0, ignore_eos=True).text


def test_actors_outlive_the_supervisor_and_another_one_adopts_them(home: RayHome) -> None:
    up = home.up()
    assert up.returncode == 0, up.stderr
    with Client(f"127.0.0.1:{home.grpc_port}", timeout_s=BUSY_MACHINE_S) as client:
        expected, before = answer(client), workers(client)
        stream = client.generate_stream("a long answer", max_tokens=200, temperature=0.0, ignore_eos=True)
        next(stream)
        home.kill_supervisor()
        assert sum(len(chunk.token_ids) for chunk in stream) > 100
        assert answer(client) == expected

        os.kill(before["decode-0"]["pid"], signal.SIGKILL)
        adopted = home.up()
        assert adopted.returncode == 0, adopted.stderr
        assert "prefill-0 lives and is adopted (prefill-0-" in adopted.stderr
        after = workers(client)
        assert after["prefill-0"]["pid"] == before["prefill-0"]["pid"]
        assert answer(client) == expected

        os.kill(after["prefill-0"]["pid"], signal.SIGKILL)  # an adopted one
        end_s = time.monotonic() + BUSY_MACHINE_S
        while time.monotonic() < end_s:
            now = workers(client).get("prefill-0", after["prefill-0"])
            if now["pid"] != after["prefill-0"]["pid"] and now["state"] == "live":
                break
            time.sleep(0.1)
        else:
            pytest.fail("prefill-0 did not come back")
    home.kill_supervisor()
    down = home.down()
    assert (down.returncode, down.stdout) == (0, "stopped\n"), down.stderr
    assert home.processes(*ACTORS) == []
    assert not (home.folder / "twostroke").exists()
    assert home.down().stdout.startswith("no cluster runs")
