"""`twostroke serve` with the bundled model as a process of its own. Knows HTTP, no load generator."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

from twostroke.core.ports import free_ports

READY_S, STOP_S, POLL_S = 180.0, 30.0, 0.2

_OUTCOME = re.compile(r'^twostroke_requests_total\{[^}]*outcome="(\w+)"[^}]*\} (\S+)$', re.MULTILINE)


@contextlib.contextmanager
def served(log: Path, *flags: str, port: int = 0, environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """A cluster of one prefill and one decode worker unless `flags` say otherwise; yields its address.

    `environment` is added to ours.

    Raises:
        RuntimeError: it was not ready in time, or did not end with 0 in time after Ctrl-C.
    """
    ours, grpc_port = free_ports("127.0.0.1", 2)
    port = port or ours
    command = [sys.executable, "-m", "twostroke.cli.main", "serve", "--launcher", "process"]
    ports = ["--port", str(port), "--grpc-port", str(grpc_port)]
    with log.open("w") as said:
        process = subprocess.Popen(
            [*command, *ports, *flags], stdout=said, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _await_ready(process, url, log)
            yield url
            process.send_signal(signal.SIGINT)
            if (status := _ended(process)) != 0:
                raise RuntimeError(f"serve ended with {status} after Ctrl-C")
        finally:
            if process.poll() is None:
                process.terminate()  # a last chance to take its workers along
                _ended(process)
                process.kill()


def outcomes(url: str) -> dict[str, int]:
    """The router's own count of requests by outcome: finished, rejected, cancelled, failed."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    counts: dict[str, int] = {}
    for outcome, value in _OUTCOME.findall(text):
        counts[outcome] = counts.get(outcome, 0) + round(float(value))
    return counts


def _ended(process: subprocess.Popen[bytes]) -> int | None:
    """The exit status; None: it did not end in time."""
    try:
        return process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        return None


def _await_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end_s = time.monotonic() + READY_S
    while time.monotonic() < end_s and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(POLL_S)
    said = log.read_text(errors="replace")[-2000:]
    raise RuntimeError(f"serve was not ready within {READY_S:g} s (exit code {process.poll()}):\n{said}")
