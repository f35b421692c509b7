"""A folder with a Ray of its own, which `twostroke up` joins there, and what must be gone at the end."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from twostroke.core.ports import free_ports

BUSY_MACHINE_S = 240.0
ACTORS = ("ray::Router", "ray::PrefillWorker", "ray::DecodeWorker")


class RayHome:
    """A folder with a Ray of its own, and the commands there."""

    def __init__(self, folder: Path, checkpoint: Path, more: Mapping[str, Any] | None = None) -> None:
        """`more`: further sections of the cluster's settings."""
        self.folder = folder
        self.ray_port, self.port, self.grpc_port = free_ports("127.0.0.1", 3)
        (folder / "token").touch(mode=0o600)
        (folder / "token").write_text(secrets.token_hex(32))
        given = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "RAY_USAGE_STATS_ENABLED": "0"}
        given |= {"RAY_raylet_start_wait_time_s": "180", "RAY_agent_register_timeout_ms": "180000"}  # a starved machine
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
        (folder / "cluster.json").write_text(json.dumps(settings | dict(more or {})))

    def start(self, *flags: str, **environment: str) -> None:
        """`ray start --head` with these flags and variables too."""
        self._environment |= environment
        head = ["--head", f"--port={self.ray_port}", f"--temp-dir={self.folder}/r", "--include-dashboard=false"]
        kinds = ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent", "metrics-export")
        # Ports that are given need not be written to a file, on which a starved raylet waits for seconds only.
        ports = free_ports("127.0.0.1", len(kinds))
        head += [f"--{kind}-port={port}" for kind, port in zip(kinds, ports, strict=True)]
        small = ["--num-cpus=2", "--object-store-memory=80000000", "--node-ip-address=127.0.0.1"]
        done = self._run([str(Path(sys.executable).with_name("ray")), "start", *head, *small, *flags])
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

    def python(self, program: str, *arguments: str) -> str:
        """What a program prints last."""
        done = self._run([sys.executable, "-P", "-c", program, *arguments])
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().splitlines()[-1]

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


@contextmanager
def ray_home(checkpoint: Path, more: Mapping[str, Any] | None = None) -> Iterator[RayHome]:
    """A folder without its Ray, which the caller starts. At the end every process of it is ended."""
    with tempfile.TemporaryDirectory(prefix="ts-", ignore_cleanup_errors=True) as folder:
        made = RayHome(Path(folder), checkpoint, more)
        try:
            yield made
        finally:
            left = made.processes()  # Ray, and what a test that failed has left
            for process in left:
                with suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(left, timeout=BUSY_MACHINE_S)
