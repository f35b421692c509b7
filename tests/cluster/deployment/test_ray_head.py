"""Ray's head is away again and again: serving never stops, and what broke meanwhile is repaired when it is back.

The head keeps what it knows in Redis. OUTAGES: how often; the figure of a long run is in bench/results/ray_head.md.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.clusters.ray_home import ACTORS, BUSY_MACHINE_S, RayHome, ray_home
from support.session.redis_server import redis_server

from twostroke import Client

pytestmark = [pytest.mark.ray, pytest.mark.campaign, pytest.mark.timeout(3600)]

OUTAGES = int(os.environ.get("OUTAGES", "6"))
OUTAGE_S = float(os.environ.get("OUTAGE_S", "4"))
ASKED = {"max_tokens": 24, "temperature": 0.0, "ignore_eos": True}


class Head:
    """Ray's head: the one process that knows the cluster. It can be killed and started again as it was."""

    def __init__(self, home: RayHome) -> None:
        (self._process,) = [each for each in home.processes() if "gcs_server" in each.name()]
        self._command, self._environment = self._process.cmdline(), self._process.environ()
        self._child: subprocess.Popen[bytes] | None = None

    def kill(self) -> None:
        os.kill(self._process.pid, signal.SIGKILL)
        if self._child is not None:
            self._child.wait(BUSY_MACHINE_S)
        psutil.wait_procs([self._process], timeout=BUSY_MACHINE_S)

    def start(self) -> None:
        self._child = subprocess.Popen(
            self._command, env=self._environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._process = psutil.Process(self._child.pid)


@contextmanager
def asking(address: str) -> Iterator[list[str]]:
    """A client that asks the same all the time; gives the texts. Any error fails the test at the end."""
    texts, errors, done = list[str](), list[BaseException](), threading.Event()

    def ask() -> None:
        with Client(address, timeout_s=BUSY_MACHINE_S) as client:
            while not done.is_set():
                try:
                    texts.append(client.generate("the same question", **ASKED).text)
                except Exception as error:
                    errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield texts
    finally:
        done.set()
        thread.join(BUSY_MACHINE_S)
    assert errors == []
    assert len(set(texts)) == 1


def until(holds: Callable[[], Any], what: str) -> float:
    began_s = time.monotonic()
    while not holds():
        assert time.monotonic() - began_s < BUSY_MACHINE_S, what
        time.sleep(0.1)
    return time.monotonic() - began_s


def test_serving_goes_on_while_the_head_is_away_and_repair_resumes_when_it_is_back(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with redis_server() as redis, ray_home(tiny_checkpoint) as home:
        home.start(RAY_REDIS_ADDRESS=f"127.0.0.1:{redis.port}", RAY_gcs_rpc_server_reconnect_timeout_s="600")
        up = home.up()
        assert up.returncode == 0, up.stderr
        head, address = Head(home), f"127.0.0.1:{home.grpc_port}"
        repaired_s, num_meanwhile = list[float](), 0
        with asking(address) as texts, Client(address, timeout_s=BUSY_MACHINE_S) as client:

            def prefill() -> tuple[int, str]:
                found = {worker["worker_id"]: worker for worker in client.cluster()["workers"]}
                worker = found.get("prefill-0", {"pid": 0, "state": "missing"})
                return worker["pid"], worker["state"]

            decode = {worker["worker_id"]: worker["pid"] for worker in client.cluster()["workers"]}["decode-0"]
            until(lambda: texts, "an answer before the first outage")
            for outage in range(OUTAGES):
                before, num_before = prefill()[0], len(texts)
                head.kill()
                if outage % 2 == 0:  # decode computes its prompts itself, until Ray can start another
                    os.kill(before, signal.SIGKILL)
                time.sleep(OUTAGE_S)
                until(lambda n=num_before: len(texts) > n + 1, "answers while the head is away")  # type: ignore[misc]
                num_meanwhile += len(texts) - num_before
                head.start()
                if outage % 2 == 0:
                    repaired_s.append(
                        until(lambda b=before: prefill()[0] != b and prefill()[1] == "live", "another prefill worker")  # type: ignore[misc]
                    )
            pids = {worker["worker_id"]: worker["pid"] for worker in client.cluster()["workers"]}
            assert pids["decode-0"] == decode, "it was never touched"
        with capsys.disabled():
            print(
                f"\n{OUTAGES} outages of {OUTAGE_S:g} s or longer: {num_meanwhile} answers meanwhile, {len(texts)} in "
                f"all, none failed; a killed worker served {max(repaired_s):.0f} s after the head's start at the latest"
            )
        assert home.down().returncode == 0
        assert home.processes(*ACTORS) == []
