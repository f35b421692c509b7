"""Commands over the socket: who is heard, what is refused, and what a drain says."""

import asyncio
import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.clusters.asking import Asking
from support.clusters.supervised import BUSY_MACHINE_S, supervised
from typer.testing import CliRunner

from twostroke.cli.main import app
from twostroke.client.async_client import AsyncClient
from twostroke.cluster.operations import control as control_module
from twostroke.cluster.operations.control import Answer, Control, command
from twostroke.cluster.operations.run_folder import RunFolder, State
from twostroke.core.errors import ConfigError
from twostroke.engine.link.draining import Draining

pytestmark = pytest.mark.timeout(600)
INSIDE = {"cluster.launcher": "inprocess"}


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ts-") as name:  # short: it holds a socket
        yield Path(name)


async def test_a_drained_worker_goes_and_its_streams_go_on_elsewhere(tiny_checkpoint, folder):
    said: list[str] = []
    flags = INSIDE | {"cluster.prefill": 0, "cluster.decode": 2, "router.local_prefill": True}
    async with supervised(tiny_checkpoint, **flags) as supervisor:
        control = Control(supervisor.changes, lambda: supervisor.seen.cluster["workers"], lambda: None)
        await control.start(folder / "s")
        control.is_ready = True
        async with (
            AsyncClient(supervisor.grpc_address, timeout_s=BUSY_MACHINE_S) as client,
            Asking(client, 2) as asking,
        ):
            asked = {"verb": "drain", "worker": "combined-0", "timeout_s": 0.0}
            answer = await command(folder / "s", asked, said.append, BUSY_MACHINE_S)
            assert "its process is gone" in answer.said
            assert (answer.code == 1) == ("go on at other workers" in answer.said)
            await asking.more(2)
            assert set(supervisor.members) == {"router-0", "combined-1"}
            asked["worker"] = "combined-1"
            last = await command(folder / "s", asked, said.append, BUSY_MACHINE_S)
            assert last.code == 2
            assert "combined-1 alone decodes" in last.said
            await asking.more(2)
        await control.close()


async def test_a_worker_that_drains_is_taken_back_with_its_process_and_its_place(tiny_checkpoint, folder, monkeypatch):
    said: list[str] = []
    busy, until = [True], Draining.until

    async def as_if_streams_ran(self: Draining, idle: asyncio.Event, timeout_s: float) -> bool:
        return await until(self, asyncio.Event() if busy else idle, timeout_s)

    monkeypatch.setattr(Draining, "until", as_if_streams_ran)
    flags = INSIDE | {"cluster.prefill": 0, "cluster.decode": 2, "router.local_prefill": True}
    async with supervised(tiny_checkpoint, **flags) as supervisor:
        control = Control(supervisor.changes, lambda: supervisor.seen.cluster["workers"], lambda: None)
        await control.start(folder / "s")
        control.is_ready = True
        undrain = {"verb": "undrain", "worker": "combined-0"}
        refused = await command(folder / "s", undrain, said.append, BUSY_MACHINE_S)
        assert (refused.code, refused.said.split(",")[0]) == (2, "combined-0 does not drain for an operator")
        async with AsyncClient(supervisor.grpc_address, timeout_s=BUSY_MACHINE_S) as client:

            async def until_state(state: str) -> dict:
                async with asyncio.timeout(BUSY_MACHINE_S):
                    while True:
                        (found,) = [w for w in (await client.cluster())["workers"] if w["worker_id"] == "combined-0"]
                        if found["state"] == state:
                            return found
                        await asyncio.sleep(0.05)

            before = await until_state("live")
            asked = {"verb": "drain", "worker": "combined-0", "timeout_s": 600.0}
            draining = asyncio.create_task(command(folder / "s", asked, said.append, BUSY_MACHINE_S))
            await until_state("draining")
            shown = await asyncio.to_thread(CliRunner().invoke, app, ["status", "--grpc", supervisor.grpc_address])
            assert "`twostroke undrain combined-0` takes it back" in " ".join(shown.output.split())
            answer = await command(folder / "s", undrain, said.append, BUSY_MACHINE_S)
            assert answer == Answer(0, "combined-0 takes work again")
            assert await draining == Answer(1, "combined-0 stays: its drain was undone")
            busy.clear()
            assert (await until_state("live"))["pid"] == before["pid"]
            assert supervisor.num_owned == 2
            assert supervisor.changes.is_serving("combined-0")
            gone = await command(folder / "s", asked, said.append, BUSY_MACHINE_S)
            assert gone.code == 0, "it can be drained again"
            assert set(supervisor.members) == {"router-0", "combined-1"}
        await control.close()


async def served(folder: Path, line: bytes) -> Answer:
    reader, writer = await asyncio.open_unix_connection(folder / "s")
    writer.write(line)
    answer = Answer(**json.loads(await asyncio.wait_for(reader.readline(), 30)))
    writer.close()
    return answer


async def test_what_is_no_command_is_refused_and_the_next_one_is_heard(folder):
    stopped: list[bool] = []
    control = Control(None, list, lambda: stopped.append(True))  # type: ignore[arg-type]  # nothing reaches it
    await control.start(folder / "s")
    assert (folder / "s").stat().st_mode & 0o777 == 0o600
    for line in (b"\n", b"no json\n", b"[]\n", b"{}\n", b'{"verb": {}}\n', b'"' + b"x" * 70_000 + b'"\n'):
        assert (await served(folder, line)).code == 2, line[:20]
    assert await served(folder, b'{"verb": "drain"}\n') == Answer(2, "the cluster is still starting")
    assert await served(folder, b'{"verb": "state"}\n') == Answer(0, "starts")
    control.is_ready = True
    assert await served(folder, b'{"verb": "state"}\n') == Answer(0, "serves")
    assert (await served(folder, b'{"verb": "dance"}\n')).said.startswith("'dance' is no command; there are:")
    for timeout in ("-1", "1e9", "NaN"):
        asked = b'{"verb": "drain", "worker": "w", "timeout_s": %s}\n' % timeout.encode()
        assert "must be from 0 to 86400" in (await served(folder, asked)).said
    assert not stopped
    assert (await served(folder, b'{"verb": "stop"}\n')).code == 0
    assert stopped == [True]
    await control.close()


async def test_another_user_is_not_heard(folder, monkeypatch):
    monkeypatch.setattr(control_module, "getuid", lambda: os.getuid() + 1)
    stopped: list[bool] = []
    control = Control(None, list, lambda: stopped.append(True))  # type: ignore[arg-type]  # nothing reaches it
    await control.start(folder / "s")
    reader, writer = await asyncio.open_unix_connection(folder / "s")
    writer.write(b'{"verb": "stop"}\n')
    with contextlib.suppress(ConnectionResetError):
        assert await asyncio.wait_for(reader.read(), 30) == b""
    writer.close()
    assert not stopped
    await control.close()


def test_one_process_holds_a_folder_and_its_end_frees_it(folder, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    first, second = RunFolder(1), RunFolder(1)
    assert not first.is_held
    first.hold()
    first.write(State(os.getpid(), "http://x", "x:1", "m", 1.0))
    assert second.is_held
    assert second.state() == State(os.getpid(), "http://x", "x:1", "m", 1.0)
    with pytest.raises(ConfigError, match=r"a cluster runs at port 1 already \(process \d+, http://x\)"):
        second.hold()
    assert {file.stat().st_mode & 0o077 for file in (first.path, *first.path.iterdir())} == {0}
    RunFolder(2).hold()
    first.release()
    assert not second.is_held
    second.hold()
    second.release()
    assert [path.name for path in folder.rglob("*")] == ["twostroke", "2", "in-use"]


def test_a_folder_that_others_can_enter_is_refused(folder, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    (folder / "twostroke").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="must be a folder of yours that nobody else can enter"):
        RunFolder(1).hold()
    (folder / "twostroke").rmdir()
    (folder / "elsewhere").mkdir(mode=0o700)
    (folder / "twostroke").symlink_to(folder / "elsewhere")
    with pytest.raises(ConfigError, match="must be a folder of yours"):
        RunFolder(1).hold()
    deep = folder / ("d" * 90)
    deep.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    with pytest.raises(ConfigError, match="too long for a socket"):
        RunFolder(1).hold()
    assert list(deep.iterdir()) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"pid": "x", "http_url": 1}', "\x00"])
def test_a_damaged_state_counts_as_none(folder, monkeypatch, text):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    run = RunFolder(1)
    run.make()
    (run.path / "state.json").write_text(text)
    assert run.state() is None
