"""The planner on a Ray whose autoscaler really starts nodes: a worker waits for one, serves there, and is given up."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.clusters.ray_home import ACTORS, BUSY_MACHINE_S, RayHome, ray_home

from twostroke import Client

pytestmark = [pytest.mark.ray, pytest.mark.campaign, pytest.mark.timeout(900)]

PLANNER = {
    **{"enabled": True, "new_nodes": True, "max_workers": 3, "interval_s": 0.5, "itl_target_ms": 60_000},
    **{"rate_window_s": 1, "trend_window_s": 2, "start_up_s": 5, "shrink_cooldown_s": 600},
}
STEP = {"num_threads": 1, "max_num_seqs": 2}  # three clients at once are more than one decode worker seats


def autoscaling(home: RayHome) -> Path:
    """Settings of Ray's own stand-in for a cloud: its nodes are processes of this machine."""
    kinds = {
        "ray.head.default": {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0},
        "small": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    }
    lists = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    settings = {
        "cluster_name": "fake_multinode",
        "max_workers": 2,
        "provider": {"type": "fake_multinode", "gcs_address": f"127.0.0.1:{home.ray_port}"},
        "available_node_types": kinds,
        "head_node_type": "ray.head.default",
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.1,
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
    }
    settings |= {key: {} for key in ("auth", "file_mounts", "docker")} | {f"{name}_commands": [] for name in lists}
    file = home.folder / "autoscaling.json"
    file.write_text(json.dumps(settings))
    return file


def until(holds: Callable[[], Any], what: str) -> None:
    end_s = time.monotonic() + BUSY_MACHINE_S
    while not holds():
        assert time.monotonic() < end_s, what
        time.sleep(0.3)


@contextmanager
def asking(address: str) -> Iterator[None]:
    """Three clients that ask all the time."""
    done = threading.Event()

    def ask() -> None:
        with Client(address, timeout_s=BUSY_MACHINE_S) as client:
            while not done.is_set():
                client.generate("and on", max_tokens=100, ignore_eos=True)

    with ThreadPoolExecutor(3) as clients:
        asked = [clients.submit(ask) for _ in range(3)]
        try:
            yield
        finally:
            done.set()
    for each in asked:
        each.result()


ASKED = """
import json, sys, ray
from ray.experimental.internal_kv import _internal_kv_get
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
asked = json.loads(_internal_kv_get(b"autoscaler_resource_request") or b"null")
print(json.dumps([asked, len([node for node in ray.nodes() if node["Alive"]])]))
"""


def test_a_worker_waits_for_a_node_that_the_autoscaler_brings_and_nothing_is_asked_for_at_the_end(
    tiny_checkpoint: Path,
) -> None:
    with ray_home(tiny_checkpoint, {"planner": PLANNER, "step": STEP}) as home:
        variables = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "0"}
        home.start(f"--autoscaling-config={autoscaling(home)}", **variables)
        up = home.up()
        assert up.returncode == 0, up.stderr
        with Client(f"127.0.0.1:{home.grpc_port}", timeout_s=BUSY_MACHINE_S) as client:
            told: dict[str, Any] = {}

            def three_serve() -> bool:
                told.update(client.cluster())
                return sum(worker["state"] == "live" for worker in told["workers"]) == 3

            with asking(f"127.0.0.1:{home.grpc_port}"):
                until(three_serve, "a third worker on a node that came")
            events = " | ".join(told["supervisor"]["events"])
            assert "wait for a machine" in events, events
            assert "Ray is asked for room for 3 workers" in events, events
            assert "starts on" in events, events
            asked, num_nodes = json.loads(home.python(ASKED, f"127.0.0.1:{home.ray_port}"))
            assert (sorted(sum(bundle.values()) for bundle in asked), num_nodes) == ([1.0] * 3, 2)
            done = client.generate("the same question", max_tokens=16, temperature=0.0, ignore_eos=True)
            assert len(done.choices[0].token_ids) == 16
        home.kill_supervisor()
        assert home.down().returncode == 0
        assert home.processes(*ACTORS) == []
        assert json.loads(home.python(ASKED, f"127.0.0.1:{home.ray_port}"))[0] == []
