"""The supervisor of `up` is killed: the members serve on, another supervisor adopts them, `down` ends all, by name."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.clusters.asking import Asking
from support.clusters.home import Home, Said

from twostroke.client.async_client import AsyncClient
from twostroke.cluster.deployment.processes import NAME_OPTION, name_of

pytestmark = pytest.mark.timeout(900)

BUSY_MACHINE_S = 240.0


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ts-") as folder:
        yield Path(folder)


@pytest.fixture
def homes(folder: Path, tiny_checkpoint: Path) -> Iterator[Callable[..., Home]]:
    made: list[Home] = []

    def make(**cluster: Any) -> Home:
        made.append(Home(folder, tiny_checkpoint, **cluster))
        return made[-1]

    yield make
    for process in made[-1].processes():  # of a test that failed
        process.kill()


async def up(home: Home, *words: str) -> Said:
    """Between two starts any connection of this machine may have taken the port for a moment."""
    for _ in range(5):
        said: Said = await asyncio.to_thread(home.say, "up", "--config", str(home.config), *words)
        if "is in use; choose another" not in said.stderr:
            break
        await asyncio.sleep(5.0)
    return said


def kill_supervisor(home: Home) -> None:
    supervisor = psutil.Process(home.state["pid"])
    os.kill(supervisor.pid, signal.SIGKILL)
    psutil.wait_procs([supervisor], timeout=BUSY_MACHINE_S)


async def workers(client: AsyncClient) -> dict[str, tuple[int, str]]:
    """Number of the process and state of each worker."""
    return {w["worker_id"]: (w["pid"], w["state"]) for w in (await client.cluster())["workers"]}


async def until_all_live(client: AsyncClient, *names: str) -> dict[str, int]:
    async with asyncio.timeout(BUSY_MACHINE_S):
        while True:
            found = await workers(client)
            if all(found.get(name, (0, ""))[1] == "live" for name in names):
                return {name: found[name][0] for name in names}
            await asyncio.sleep(0.05)


@pytest.mark.campaign
async def test_streams_outlive_the_supervisor_and_another_one_adopts_the_cluster(homes: Callable[..., Home]) -> None:
    home = homes(decode=2)
    assert (await up(home)).returncode == 0
    names = ("prefill-0", "decode-0", "decode-1")
    async with AsyncClient(home.grpc, timeout_s=BUSY_MACHINE_S) as client, Asking(client, 3, tokens=60) as asking:
        before = await until_all_live(client, *names)
        await asking.more(3)
        kill_supervisor(home)
        await asking.more(6)
        assert await until_all_live(client, *names) == before

        os.kill(before["decode-0"], signal.SIGKILL)
        await asking.more(6)  # its streams go on at the other one; nobody starts it again
        assert not any(process.pid == before["decode-0"] for process in home.processes())
        for words in (("status",), ("restart", "--rolling"), ("drain", "decode-1")):
            said = await asyncio.to_thread(home.say, *words, "--grpc", home.grpc)
            assert "nobody supervises the cluster" in said.stdout + said.stderr, words
            assert said.returncode == (0 if words == ("status",) else 2)

        changed = await up(home, "--prefill", "2")
        assert changed.returncode == 2
        assert "these differ: cluster.prefill" in changed.stderr
        await asking.more(3)

        adopted = await up(home)
        assert adopted.returncode == 0, adopted.stderr
        assert f"prefill-0 lives and is adopted (process {before['prefill-0']})" in adopted.stderr
        after = await until_all_live(client, *names)
        assert {name: after[name] == before[name] for name in names} == {
            "prefill-0": True,
            "decode-0": False,
            "decode-1": True,
        }
        await asking.more(3)
        assert f"a cluster runs at port {home.grpc_port} already" in (await up(home)).stderr

        os.kill(after["decode-1"], signal.SIGKILL)  # an adopted one: its end is noticed, and it comes back
        async with asyncio.timeout(BUSY_MACHINE_S):
            while (await until_all_live(client, *names))["decode-1"] == after["decode-1"]:
                await asyncio.sleep(0.05)
        await asking.more(3)
        counters = (await client.cluster())["counters"]
        assert counters["rejected"] == 0
    down = await asyncio.to_thread(home.say, "down")
    assert (down.returncode, down.stdout) == (0, "stopped\n"), down.stderr
    assert home.processes() == []
    assert sorted(path.name for path in home.folder.iterdir()) == ["cluster.json"]


@pytest.mark.campaign
async def test_a_cluster_without_a_supervisor_goes_down_and_others_stay(homes: Callable[..., Home]) -> None:
    home = homes(prefill=0)
    settings = json.loads(home.config.read_text())
    del settings["cluster"]["key"]  # the first supervisor draws one
    home.config.write_text(json.dumps(settings))
    assert (await up(home)).returncode == 0
    run = home.run / str(home.grpc_port)
    keys = run / "keys.json"
    key = json.loads(keys.read_text())["key"]
    assert keys.stat().st_mode & 0o077 == 0
    assert not any(key in " ".join(process.cmdline()) for process in home.processes())

    kill_supervisor(home)
    serve = await asyncio.to_thread(_serve, home)
    assert serve.returncode == 2
    assert "members of a cluster that nobody supervises live" in serve.stderr
    first, second = await asyncio.gather(*(asyncio.to_thread(_up_process, home) for _ in range(2)))
    assert sorted((first.returncode, second.returncode)) == [0, 2], (first, second)
    restarted = await asyncio.to_thread(home.say, "restart", "--rolling")  # with the drawn key
    assert restarted.returncode == 0, restarted.stderr

    kill_supervisor(home)
    (run / "deployment.json").unlink()  # now its members are in no record
    stranger = subprocess.Popen(
        [sys.executable, "-c", "input()", NAME_OPTION, name_of(home.run / "1", "x")], stdin=subprocess.PIPE
    )
    try:
        old = {process.pid for process in home.processes()}
        assert len(old) == 2
        anew = await up(home)
        assert anew.returncode == 0, anew.stderr
        assert not old & {process.pid for process in home.processes()}
        kill_supervisor(home)
        down = await asyncio.to_thread(home.say, "down")
        assert (down.returncode, down.stdout) == (0, "stopped\n"), down.stderr
        assert stranger.poll() is None
    finally:
        stranger.communicate()
    assert home.processes() == []
    assert sorted(path.name for path in home.folder.iterdir()) == ["cluster.json"]


def _up_process(home: Home) -> subprocess.CompletedProcess[str]:
    return _command(home, "up")


def _serve(home: Home) -> subprocess.CompletedProcess[str]:
    return _command(home, "serve")


def _command(home: Home, verb: str) -> subprocess.CompletedProcess[str]:
    mine = {"XDG_RUNTIME_DIR": str(home.folder), "TMPDIR": str(home.folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "twostroke.cli.main", verb, "--config", str(home.config)]
    return subprocess.run(
        command, env=os.environ | mine, capture_output=True, text=True, timeout=BUSY_MACHINE_S, check=False
    )
