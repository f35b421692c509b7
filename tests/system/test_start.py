"""How `twostroke serve` starts: from any folder, in any environment; how it fails, and how a start is given up."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.clusters.observer import POLL_S

from twostroke import Client
from twostroke.checkpoint.config import BUNDLED
from twostroke.core.ports import free_ports

ROOT = Path(__file__).resolve().parents[2]
BUSY_MACHINE_S = 200.0
MARK = "TEST_OF_START"
MODULES = ("yaml", "random", "tokenizers", "numpy", "uvloop", "uvicorn", "safetensors", "grpc", "prometheus_client")
DEAD_PROXY = dict.fromkeys(("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY"), "http://127.0.0.1:9")
UP = "Ctrl-C drains and stops."


class Start:
    """`twostroke serve` in a folder of its own that holds a model and traps, with a temporary folder of its own."""

    def __init__(self, *flags: str, **environment: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="st-"))  # short: Ray keeps sockets in it
        self.here, self.temporary = self.folder / "here", self.folder / "tmp"
        self.temporary.mkdir()
        self.here.mkdir()
        self.mark = f"{MARK}={self.folder.name}"
        self.port, self.grpc_port = free_ports("127.0.0.1", 2)
        self.flags = ["--port", str(self.port), "--grpc-port", str(self.grpc_port), "--threads", "1", *flags]
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("TWOSTROKE__")} | environment
        self.environment |= {MARK: self.folder.name, "TMPDIR": str(self.temporary), "COLUMNS": "300"}
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def output(self) -> str:
        return (self.folder / "output").read_text()

    @property
    def last_line(self) -> str:
        return self.output.strip().splitlines()[-1]

    def run(self) -> None:
        main = "from twostroke.cli.entry import main; main()"  # as the console script does
        with (self.folder / "output").open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", main, "serve", "--prefill", "0", "--decode", "1", *self.flags],
                stdout=out, stderr=out, env=self.environment, cwd=self.here,
            )  # fmt: skip

    def until(self, holds: Callable[[], Any]) -> None:
        assert self.process is not None
        end_s = time.monotonic() + BUSY_MACHINE_S
        while not holds():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < end_s, self.output
            time.sleep(POLL_S)

    def ended(self, *numbers: int) -> int:
        """The exit code, after these signals."""
        assert self.process is not None
        for number in numbers:
            self.process.send_signal(number)
        return self.process.wait(BUSY_MACHINE_S)

    def set_traps(self) -> None:
        for name in MODULES:
            (self.here / f"{name}.py").write_text(f"open({str(self.folder / name)!r}, 'w')\nraise SystemExit('a trap')")

    def sprung(self) -> list[str]:
        return [name for name in MODULES if (self.folder / name).exists()]

    def left(self) -> list[str]:
        """Processes and temporary files."""
        files = [path.name for path in self.temporary.iterdir()]
        return files + [f"process {process}" for process in self.processes()]

    def processes(self) -> list[int]:
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def end(self) -> None:
        for process in self.processes():
            os.kill(process, signal.SIGKILL)
        if self.process is not None:
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture
def start() -> Iterator[Callable[..., Start]]:
    started: list[Start] = []

    def make(*flags: str, **environment: str) -> Start:
        started.append(Start(*flags, **environment))
        return started[-1]

    yield make
    for each in started:
        each.end()


# ---------------------------------------------------------------- from any folder, in any environment


@pytest.mark.campaign
@pytest.mark.timeout(400)
@pytest.mark.parametrize("launcher", ["process", pytest.param("ray", marks=pytest.mark.ray)])
def test_serves_a_model_of_the_folder_and_runs_none_of_its_files(start, monkeypatch, launcher):
    """Traps in the folder, proxies that lead nowhere, another Ray named: a user's shell may look like that."""
    elsewhere = {"RAY_ADDRESS": "127.0.0.1:9", "RAY_NAMESPACE": "other", "RAY_RUNTIME_ENV_HOOK": "no.such.hook"}
    begun = start("--launcher", launcher, "--model", ".", **DEAD_PROXY, **elsewhere)
    for file in (ROOT / "model" / BUNDLED).iterdir():
        (begun.here / file.name).symlink_to(file)
    begun.set_traps()
    begun.run()
    begun.until(lambda: UP in begun.output)
    for name, value in DEAD_PROXY.items():
        monkeypatch.setenv(name, value)
    with Client(f"127.0.0.1:{begun.grpc_port}", timeout_s=BUSY_MACHINE_S) as client:
        assert client.generate("def add(", max_tokens=2).usage.completion_tokens == 2
    again = start("--launcher", launcher, "--grpc-port", str(begun.grpc_port))
    again.run()
    assert again.ended() == 2
    assert again.output == f"twostroke: port {begun.grpc_port} is in use; choose another with --grpc-port\n"
    assert begun.ended(signal.SIGINT, signal.SIGINT) in (0, 130), begun.output  # the second may come too late
    assert begun.sprung() == []
    assert begun.left() == []


# ---------------------------------------------------------------- failures


def test_a_worker_that_cannot_load_says_why_in_the_last_line_and_is_not_started_again(start):
    begun = start("--launcher", "process", "--model", ".", "--kernels", "torch")
    for file in (ROOT / "model" / BUNDLED).iterdir():
        shutil.copyfile(file, begun.here / file.name)
    (begun.here / "tokenizer.json").write_text("{}")
    begun.run()
    assert begun.ended() == 2
    assert begun.last_line.startswith("twostroke: combined-0 cannot start: "), begun.output
    assert "tokenizer.json" in begun.last_line
    assert "Traceback" not in begun.output
    assert "starting it again" not in begun.output
    assert begun.left() == []


def test_a_start_that_takes_too_long_names_who_is_late_and_the_setting(start):
    begun = start("--launcher", "process", "--kernels", "torch", TWOSTROKE__CLUSTER__READY_TIMEOUT_S="0.2")
    begun.run()
    assert begun.ended() == 2
    assert begun.last_line.startswith("twostroke: not ready within 0.2 s: router-0, combined-0"), begun.output
    assert "cluster.ready_timeout_s" in begun.last_line
    assert begun.left() == []


@pytest.mark.ray
def test_a_ray_cluster_that_is_not_there_is_named_in_the_last_line(start):
    begun = start("--launcher", "ray", TWOSTROKE__CLUSTER__RAY_ADDRESS="nowhere:0")
    begun.run()
    assert begun.ended() == 2
    assert "the Ray cluster at nowhere:0 cannot be joined" in begun.last_line, begun.output
    assert begun.left() == []


# ---------------------------------------------------------------- Ctrl-C


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_while_kernels_are_compiled_leaves_no_compiler_and_no_file(start, number: int, code: int):
    begun = start("--launcher", "process")
    compiler = begun.folder / "c++"
    compiler.write_text(f"#!/bin/sh\ncase $1 in --version) ;; *) touch {begun.folder}/began; sleep 300 & wait;; esac\n")
    compiler.chmod(0o755)
    cache = begun.folder / "cache"
    begun.environment |= {"PATH": f"{begun.folder}:{begun.environment['PATH']}", "XDG_CACHE_HOME": str(cache)}
    begun.run()
    begun.until((begun.folder / "began").exists)
    assert begun.ended(number) == code
    assert "compiling native kernels for this CPU (about 20 s where nothing else runs)" in begun.output
    end_s = time.monotonic() + BUSY_MACHINE_S
    while begun.left() and time.monotonic() < end_s:
        time.sleep(POLL_S)  # the compiler's children are killed, which takes the system a moment
    assert begun.left() == []
    assert [path.name for path in (cache / "twostroke" / "kernels").iterdir()] == ["lock"]


@pytest.mark.ray
def test_ctrl_c_while_ray_starts_leaves_nothing_of_it(start):
    begun = start("--launcher", "ray", "--kernels", "torch")
    begun.run()
    begun.until(lambda: len(begun.processes()) > 2)  # Ray's first ones
    assert begun.ended(signal.SIGINT) == 130
    assert begun.left() == []
