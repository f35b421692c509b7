"""`twostroke up`, `drain`, `restart --rolling`, `down` as a user runs them: exit codes, output, and nothing left."""

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.clusters.home import Home

pytestmark = pytest.mark.timeout(600)

BUSY_MACHINE_S = 240.0


@pytest.fixture
def home(tiny_checkpoint: Path) -> Iterator[Home]:
    with tempfile.TemporaryDirectory(prefix="ts-") as folder:
        home = Home(Path(folder), tiny_checkpoint)
        yield home
        for process in home.processes():  # of a test that failed
            process.kill()


def test_a_cluster_goes_up_serves_is_restarted_and_goes_down_without_a_trace(home: Home) -> None:
    shared_before = set(os.listdir("/dev/shm"))
    up = home.say("up", "--config", str(home.config))
    assert up.returncode == 0, up.stderr
    assert f"is served at http://127.0.0.1:{home.port}/v1" in up.stdout
    files = [home.run, *home.run.rglob("*")]
    assert {file.stat().st_mode & 0o077 for file in files} == {0}, "for its owner alone"
    assert not any(b"a key of this test" in file.read_bytes() for file in files if file.is_file())
    assert not any("a key of this test" in " ".join(process.cmdline()) for process in home.processes())

    again = home.say("up", "--config", str(home.config))
    assert again.returncode == 2
    assert f"a cluster runs at port {home.grpc_port} already" in again.stderr

    alone = home.say("drain", "decode-0")
    assert alone.returncode == 2
    assert "decode-0 alone decodes" in alone.stderr
    unknown = home.say("drain", "decode-9")
    assert (unknown.returncode, "no worker is called 'decode-9'" in unknown.stderr) == (2, True)

    restarted = home.say("restart", "--rolling")
    assert restarted.returncode == 0, restarted.stderr
    assert "[2/2] decode-1 serves, decode-0 is gone" in restarted.stderr
    assert restarted.stdout == "every worker was restarted\n"
    assert home.say("restart").returncode == 2

    drained = home.say("drain", "prefill-1")
    assert drained.returncode == 0, drained.stderr
    assert "prefill-1 is drained: everything ended by itself; its process is gone" in drained.stdout
    workers = json.loads(home.say("status", "--json").stdout)["workers"]
    assert [worker["worker_id"] for worker in workers if worker["state"] == "live"] == ["decode-1"]

    down = home.say("down")
    assert (down.returncode, down.stdout) == (0, "stopped\n"), down.stderr
    assert home.processes() == []
    assert sorted(path.name for path in home.folder.iterdir()) == ["cluster.json"]
    assert set(os.listdir("/dev/shm")) <= shared_before | {n for n in os.listdir("/dev/shm") if "twostroke" not in n}


@pytest.mark.campaign
def test_what_a_cluster_leaves_that_was_killed_whole_does_not_stop_the_next(home: Home) -> None:
    up = home.say("up", "--config", str(home.config))
    assert up.returncode == 0, up.stderr
    killed = home.processes()
    for process in killed:
        process.kill()
    psutil.wait_procs(killed, timeout=BUSY_MACHINE_S)
    assert home.processes() == []
    again = home.say("up", "--config", str(home.config), "--decode", "2")
    assert again.returncode == 0, again.stderr
    assert "adopting" not in again.stderr
    assert home.say("down").stdout == "stopped\n"
    assert home.processes() == []
    assert not home.run.exists()
    down = home.say("down")
    assert (down.returncode, down.stdout) == (0, f"no cluster runs at {home.grpc}\n")
    assert not home.run.exists()


def test_a_start_that_fails_says_why_and_leaves_nothing(home: Home) -> None:
    up = home.say("up", "--config", str(home.config), "--model", str(home.folder / "nothing"))
    assert up.returncode == 2
    assert "nothing" in up.stderr
    assert home.processes() == []
    assert not home.run.exists()


def test_a_start_that_fails_in_its_own_process_shows_its_last_line(home: Home) -> None:
    """The cluster's folder is gone by then, its log with it."""
    settings = json.loads(home.config.read_text())
    settings["router"]["api_key_file"] = str(home.folder / "no such keys.yaml")
    home.config.write_text(json.dumps(settings))
    up = home.say("up", "--config", str(home.config))
    assert up.returncode == 2
    assert "no such keys.yaml" in up.stderr.splitlines()[-1]
    assert home.processes() == []
    assert not home.run.exists()
