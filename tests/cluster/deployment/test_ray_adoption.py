"""On a Ray that was there before, members are detached actors: they outlive a supervisor, another one adopts them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.clusters.ray_home import ACTORS, BUSY_MACHINE_S, RayHome, ray_home

from twostroke import Client

pytestmark = [pytest.mark.ray, pytest.mark.campaign, pytest.mark.timeout(900)]


@pytest.fixture
def home(tiny_checkpoint: Path) -> Iterator[RayHome]:
    with ray_home(tiny_checkpoint) as made:
        made.start()
        yield made


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
