"""What tests see of a running cluster: the router's own reports, polled until something holds. Changes nothing."""

import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil

from twostroke import Client, TwostrokeError

POLL_S = 0.02
Workers = dict[str, dict[str, Any]]


class Observer:
    """Looks at a cluster through `GET /v1/cluster`'s gRPC twin. Load reports in it are at most 0.1 s old."""

    def __init__(self, grpc_address: str) -> None:
        self._client = Client(grpc_address, timeout_s=5.0)

    def close(self) -> None:
        self._client.close()

    def facts(self) -> dict[str, Any]:
        return self._client.cluster()

    def workers(self) -> Workers:
        return {worker["worker_id"]: worker for worker in self.facts()["workers"]}

    def explain(self, request_id: str) -> dict[str, Any] | None:
        """None: the request has not been admitted yet."""
        try:
            return self._client.explain(request_id)
        except TwostrokeError as error:
            if error.code == "request_not_found":
                return None
            raise

    def until(self, holds: Callable[[Workers], bool], timeout_s: float, what: str) -> float:
        """Wait until `holds` does; the seconds it took."""
        began_s = time.monotonic()
        workers: Workers = {}
        while True:
            try:
                workers = self.workers()
                if holds(workers):
                    return time.monotonic() - began_s
            except TwostrokeError:
                pass  # a router under load may be late; the deadline below bounds it
            assert time.monotonic() - began_s < timeout_s, f"not within {timeout_s:g} s: {what}\n{brief(workers)}"
            time.sleep(POLL_S)

    def until_idle(self, timeout_s: float) -> float:
        """Wait until no worker holds, runs or promised anything; the seconds it took."""
        return self.until(lambda workers: all(map(is_idle, workers.values())), timeout_s, "all blocks free")

    def until_whole(self, names: set[str], timeout_s: float) -> float:
        """Wait until exactly these workers are live; the seconds it took."""
        return self.until(
            lambda workers: set(workers) == names and all(w["state"] == "live" for w in workers.values()),
            timeout_s,
            f"{sorted(names)} live",
        )

    def await_decode_worker(self, request_id: str, timeout_s: float = 200.0) -> str:
        """Where a running request was sent."""
        explained: dict[str, Any] = {}

        def is_routed(_: Workers) -> bool:
            nonlocal explained
            explained = self.explain(request_id) or {}
            return bool(explained.get("decode_worker"))

        self.until(is_routed, timeout_s, f"{request_id} routed")
        return str(explained["decode_worker"])


def is_idle(worker: dict[str, Any]) -> bool:
    """Nothing is held, promised, run or queued here: every block is free (a cached one is, too, until it is needed)."""
    blocks, load = worker["blocks"], worker["load"]
    return (
        blocks["free"] == blocks["total"]
        and blocks["promised"] == load["running"] == load["waiting"] == load["queued_prefill_tokens"] == 0
    )


def brief(workers: Workers) -> str:
    """The workers in one line each."""
    return "\n".join(
        f"{name}: {w['state']} {w['blocks']} {w['load']} in flight {w['in_flight']}, {w['counters']}"
        for name, w in workers.items()
    )


def descendants(pid: int | None = None) -> set[psutil.Process]:
    """The processes below `pid`, or below this process."""
    return set(psutil.Process(pid).children(recursive=True))


class Footprint:
    """Processes of a running cluster, with the Ray directories and the shared memory files that they name."""

    def __init__(self, processes: Iterable[psutil.Process]) -> None:
        self.processes = set(processes)
        texts = [_read(process, "cmdline") for process in self.processes]
        self.directories = {Path(path) for text in texts for path in re.findall(r"/[\w./-]*?/ts-ray-\w+", text)}
        maps = [_read(process, "maps") for process in self.processes]
        named = {Path(path) for text in maps for path in re.findall(r"(/dev/shm/\S+)$", text, re.MULTILINE)}
        self.shared_memory = {path for path in named if path.exists()}

    def remains(self) -> list[str]:
        """What of it is still there."""
        alive = [
            f"process {process.pid}: {_read(process, 'cmdline')}" for process in self.processes if _is_alive(process)
        ]
        return alive + [str(path) for path in (*self.directories, *self.shared_memory) if path.exists()]

    def until_gone(self, timeout_s: float) -> None:
        """Wait until nothing of it is left."""
        end_s = time.monotonic() + timeout_s
        while remains := self.remains():
            assert time.monotonic() < end_s, f"left behind after {timeout_s:g} s: {remains}"
            time.sleep(POLL_S)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _read(process: psutil.Process, what: str) -> str:
    try:
        return Path(f"/proc/{process.pid}/{what}").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def send_signal(worker: dict[str, Any], number: int) -> None:
    """To the worker's process, by the id that the router reports."""
    assert psutil.Process(worker["pid"]).is_running()
    os.kill(worker["pid"], number)
