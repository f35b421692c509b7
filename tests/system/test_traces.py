"""What `twostroke serve` leaves to be seen while it runs and when it is killed: sockets, keys, files, processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.clusters.observer import POLL_S, Footprint, descendants
from support.clusters.sockets import check_listeners, declared_by, listeners

pytestmark = pytest.mark.timeout(400)

CLUSTER_KEY, API_KEY = "cluster-key-of-this-test", "api-key-of-this-test"
BUSY_MACHINE_S = 200.0
CACHE = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")  # its kernels are built already, mostly


class Killable:
    """`twostroke serve --launcher process` with both keys from outside, and home, folder and temporary folder empty."""

    def __init__(self, folder: Path) -> None:
        self.home, self.here, self.temporary = (folder / name for name in ("home", "here", "tmp"))
        for made in (self.home, self.here, self.temporary):
            made.mkdir()
        probes = [socket.socket() for _ in range(3)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        self.ports = dict(
            zip(("port", "grpc_port", "internal_port"), (p.getsockname()[1] for p in probes), strict=True)
        )
        for probe in probes:
            probe.close()
        self._output = folder / "output"
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("TWOSTROKE", "XDG_"))}
        self.environment = kept | {"HOME": str(self.home), "XDG_CACHE_HOME": CACHE, "TMPDIR": str(self.temporary)}
        keys = {"TWOSTROKE__CLUSTER__KEY": CLUSTER_KEY, "TWOSTROKE__ROUTER__API_KEYS": f'["{API_KEY}"]'}
        ports = {f"TWOSTROKE__ROUTER__{name.upper()}": str(port) for name, port in self.ports.items()}
        flags = ["--launcher", "process", "--threads", "1", "--kv-cache-tokens", "8192"]
        with self._output.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "twostroke.cli.main", "serve", *flags],
                stdout=out, stderr=out, stdin=subprocess.DEVNULL, cwd=self.here, env=self.environment | keys | ports,
            )  # fmt: skip

    @property
    def output(self) -> str:
        return self._output.read_text()

    def until_up(self) -> None:
        end_s = time.monotonic() + BUSY_MACHINE_S
        while "Ctrl-C drains and stops." not in self.output:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < end_s, self.output
            time.sleep(POLL_S)

    def status(self, key: str, typed: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*(sys.executable, "-P", "-m", "twostroke.cli.main", "status", "--json"),
             *("--grpc", f"127.0.0.1:{self.ports['grpc_port']}", "--api-key", key)],
            input=typed, capture_output=True, text=True, timeout=BUSY_MACHINE_S, cwd=self.here, env=self.environment,
            check=False,
        )  # fmt: skip


@pytest.fixture
def killable(tmp_path: Path) -> Iterator[Killable]:
    made = Killable(tmp_path)
    yield made
    if made.process.poll() is None:
        for process in [*psutil.Process(made.process.pid).children(recursive=True), psutil.Process(made.process.pid)]:
            process.kill()
    made.process.wait()


@pytest.mark.campaign
def test_sockets_are_declared_keys_are_nowhere_and_a_kill_leaves_no_member(killable: Killable, tmp_path: Path):
    killable.until_up()
    members = descendants(killable.process.pid)
    footprint = Footprint(members)
    assert len(members) == 3
    key_file = tmp_path / "key"
    key_file.write_text(API_KEY + "\n")
    cluster = json.loads(killable.status(f"@{key_file}").stdout)
    assert json.loads(killable.status("-", API_KEY + "\n").stdout)["workers"]
    found = listeners([psutil.Process(killable.process.pid), *members])
    assert check_listeners(found, declared_by(cluster, **killable.ports)) == []
    _check_that_no_key_is_seen(killable, members)
    killable.process.send_signal(signal.SIGKILL)
    killable.process.wait()
    footprint.until_gone(30.0)
    _check_files(killable)
    assert len(list(killable.temporary.iterdir())) == 1  # the next start removes it
    assert list(killable.home.rglob("*")) == list(killable.here.rglob("*")) == []


def _check_that_no_key_is_seen(killable: Killable, members: set[psutil.Process]) -> None:
    for member in members:
        for shown in (" ".join(member.cmdline()), *member.environ().values()):
            assert CLUSTER_KEY not in shown
            assert API_KEY not in shown
    assert CLUSTER_KEY not in killable.output
    assert API_KEY not in killable.output
    _check_files(killable)


def _check_files(killable: Killable) -> None:
    files = [path for path in killable.temporary.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"in-use", "router-0.log", "prefill-0.log", "decode-0.log"}
    for path in files:
        text = path.read_bytes()
        assert CLUSTER_KEY.encode() not in text
        assert API_KEY.encode() not in text
    for path in killable.temporary.iterdir():
        assert path.stat().st_mode & 0o77 == 0  # for its owner alone, and so is all in it


@pytest.mark.parametrize("given", ["@/nowhere", "@", "-"])
def test_a_key_that_is_not_there_is_an_error(given: str):
    from twostroke.cli.keys import read_key
    from twostroke.core.errors import ConfigError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115
        with pytest.raises(ConfigError, match="--api-key"):
            read_key(given)
    assert read_key("a-key") == "a-key"
    assert read_key(None) is None
