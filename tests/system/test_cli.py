"""The command `twostroke` as a user runs it: real subprocesses, output, exit codes, and what they leave behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from support.clusters.observer import POLL_S, Footprint, Observer, descendants

from twostroke.core.ports import free_ports

pytestmark = pytest.mark.timeout(400)

BUSY_MACHINE_S = 200.0
TWOSTROKE = [sys.executable, "-m", "twostroke.cli.main"]
HOME_S = 30.0  # from a signal to the end of every process; seconds on a quiet machine


class Served:
    """`twostroke serve --launcher process` on free ports, in a temporary directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.port, self.grpc_port = free_ports("127.0.0.1", 2)
        self.directory = directory
        self._output = directory / "output"
        flags = ["--launcher", "process", "--port", str(self.port), "--grpc-port", str(self.grpc_port)]
        flags += ["--threads", "1", "--kv-cache-tokens", "8192"]
        patience = {"TWOSTROKE__CLUSTER__READY_TIMEOUT_S": "180", "TWOSTROKE__CLUSTER__DRAIN_TIMEOUT_S": "60"}
        environment = _environment() | {"TMPDIR": str(directory)} | patience
        with self._output.open("wb") as out:
            self.process = subprocess.Popen(
                [*TWOSTROKE, "serve", *flags], stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=environment
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def until_said(self, words: str) -> None:
        end_s = time.monotonic() + BUSY_MACHINE_S
        while words not in self.output:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < end_s, self.output
            time.sleep(POLL_S)

    def footprint(self) -> Footprint:
        """The members; the command itself is seen by its exit code."""
        return Footprint(descendants(self.process.pid))

    def end(self) -> None:
        """For tests that failed: leave nothing, whatever happened."""
        if self.process.poll() is None:
            members = psutil.Process(self.process.pid).children(recursive=True)
            for process in [*members, psutil.Process(self.process.pid)]:
                process.kill()
        self.process.wait()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path)
    yield served
    served.end()


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("TWOSTROKE__")} | {"OMP_NUM_THREADS": "1"}


def _twostroke(*words: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TWOSTROKE, *words],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=BUSY_MACHINE_S,
        env=_environment() | {"COLUMNS": "160"} | environment,
        check=False,
    )


# ---------------------------------------------------------------- serve


def test_serves_answers_reports_drains_and_leaves_nothing(served: Served):
    served.until_said("Ctrl-C drains and stops.")
    url = f"http://127.0.0.1:{served.port}"
    assert f"{url}/v1" in served.output
    _ask_as_the_printed_line_says(served)
    document = json.loads(_twostroke("status", "--json", "--grpc", served.grpc).stdout)
    assert [(w["worker_id"], w["state"]) for w in document["workers"]] == [("decode-0", "live"), ("prefill-0", "live")]
    table = _twostroke("status", "--grpc", served.grpc)
    assert table.returncode == 0, table.stderr
    said = re.sub(r"serve\.py:\d+|\s", "", served.output)  # lines are wrapped, with their origin at the right
    for worker in document["workers"]:
        assert ", bfloat16, fp8 cache, " in worker["numerics"]
        assert f"{worker['worker_id']} is ready: {worker['numerics']}".replace(" ", "") in said
        line = next(line for line in table.stdout.splitlines() if worker["worker_id"] in line)
        assert str(worker["pid"]) in line
        assert f"0/{worker['blocks']['total']:,}" in line
        assert worker["metrics_address"] in line
        assert httpx.get(f"http://{worker['metrics_address']}/health", timeout=60).status_code == 200
    _interrupt_in_mid_stream(served, url)


def _ask_as_the_printed_line_says(served: Served) -> None:
    line = next(line for line in served.output.splitlines() if line.strip().startswith("curl "))
    found = re.fullmatch(r"\s*curl (\S+) -H '([\w-]+): ([\w/]+)' -d '(.*)'", line)
    assert found, line
    url, header, value, body = found.groups()
    reply = httpx.post(url, headers={header: value}, content=body, timeout=BUSY_MACHINE_S)
    assert reply.status_code == 200, reply.text
    answer = reply.json()
    assert answer["usage"]["completion_tokens"] > 0
    assert answer["choices"][0]["message"]["content"]


def _interrupt_in_mid_stream(served: Served, url: str) -> None:
    """Ctrl-C while a client reads: its stream comes to its end, then everything goes."""
    footprint = served.footprint()
    assert len(footprint.processes) == 3
    body: dict[str, Any] = {"prompt": "def add(", "max_tokens": 150, "temperature": 0, "stream": True}
    events = []
    with httpx.stream("POST", f"{url}/v1/completions", json=body | {"ignore_eos": True}, timeout=60) as reply:
        for line in reply.iter_lines():
            if not events:
                served.process.send_signal(signal.SIGINT)
            events.append(line)
    assert [line for line in events if line][-1] == "data: [DONE]", events[-4:]
    assert served.process.wait(HOME_S) == 0, served.output
    footprint.until_gone(5.0)
    assert [path.name for path in served.directory.iterdir()] == ["output"]  # not even a log or a configuration


def test_ctrl_c_on_the_way_up_stops_at_once(served: Served):
    end_s = time.monotonic() + BUSY_MACHINE_S
    while len(psutil.Process(served.process.pid).children()) < 3:
        assert time.monotonic() < end_s
        time.sleep(POLL_S)
    footprint = served.footprint()
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(HOME_S) == 130, served.output
    footprint.until_gone(5.0)
    assert [path.name for path in served.directory.iterdir()] == ["output"]


@pytest.mark.campaign
def test_a_dead_worker_is_started_again(served: Served):
    served.until_said("Ctrl-C drains and stops.")
    observer = Observer(served.grpc)
    before = observer.workers()
    os.kill(before["decode-0"]["pid"], signal.SIGKILL)
    observer.until(
        lambda workers: (
            "decode-0" in workers
            and workers["decode-0"]["state"] == "live"
            and workers["decode-0"]["incarnation"] != before["decode-0"]["incarnation"]
        ),
        BUSY_MACHINE_S,
        "a new decode-0 live",
    )
    observer.close()
    _ask_as_the_printed_line_says(served)
    assert "decode-0 ended (exit code -9" in served.output


# ---------------------------------------------------------------- without starting anything


def test_dry_run_prints_the_plan_and_starts_nothing():
    amounts = ("--kv-cache-tokens", "8192", "--swap-space", "0.25")
    arithmetic = ("--quantization", "int8", "--kernels", "torch")
    on_cpu = {"TWOSTROKE__MODEL__DEVICE": "cpu", "TWOSTROKE__CLUSTER__WORKER_METRICS_PORT": "9100"}
    done = _twostroke("serve", "--dry-run", "--prefill", "2", "--decode", "3", *amounts, *arithmetic, **on_cpu)
    assert done.returncode == 0, done.stderr
    assert "computes in bfloat16, weights rounded to int8, torch kernels on cpu" in done.stdout
    assert "swap space of each worker: 0.25 GiB = " in done.stdout
    for member in ("router-0", "prefill-0", "prefill-1", "decode-0", "decode-1", "decode-2"):
        assert member in done.stdout
    assert "512 × 16 = 8,192 tokens" in done.stdout
    assert "HTTP 127.0.0.1:8000" in done.stdout
    assert "their metrics: 9100 to 9104" in done.stdout


MISTAKES: list[tuple[list[str], dict[str, str], list[str]]] = [
    (["--block-size", "24"], {}, ["cache.block_size", "24"]),
    (["--decode", "0"], {}, ["cluster.decode", "0", "greater than or equal to 1"]),
    (["--host", "0.0.0.0"], {}, ["router.host", "0.0.0.0", "--insecure"]),
    (["--port", "7000", "--grpc-port", "7000"], {}, ["7000", "must differ"]),
    ([], {"TWOSTROKE__CLUSTER__WORKER_METRICS_PORT": "some"}, ["cluster.worker_metrics_port", "some"]),
    (["--model", "/nowhere/at-all"], {}, ["/nowhere/at-all"]),
    (["--prefill-tp", "2", "--model", "/nowhere"], {}, ["prefill workers have 2", "--tensor-parallel-size 2"]),
    (["--decode-tp", "2", "--dry-run"], {}, ["decode workers 2", "MODEL__DETERMINISTIC=false"]),
    (["--api-key", "seven77"], {}, ["router.api_keys", "8"]),
    (["--api-key", "@/nowhere/key"], {}, ["--api-key", "/nowhere/key"]),
    (["--config", "/nowhere.yaml"], {}, ["--config /nowhere.yaml"]),
    ([], {"TWOSTROKE__CACHE__BLOK_SIZE": "16"}, ["cache.blok_size", "did you mean 'block_size'?"]),
]


@pytest.mark.parametrize(("flags", "environment", "words"), MISTAKES, ids=lambda value: str(value)[:30])
def test_a_mistake_in_the_configuration_is_one_line_that_names_it(
    flags: list[str], environment: dict[str, str], words: list[str]
):
    done = _twostroke("serve", "--launcher", "process", *flags, **environment)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith("twostroke: ")
    for word in words:
        assert word in done.stderr
    assert "seven77" not in done.stderr


def test_status_of_nobody_says_where_it_looked():
    (port,) = free_ports("127.0.0.1", 1)
    done = _twostroke("status", "--grpc", f"127.0.0.1:{port}")
    assert done.returncode == 2
    assert f"127.0.0.1:{port}" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("command", ["status", "chat"])
def test_another_machine_is_asked_in_the_clear_only_where_that_is_said(command: str):
    done = _twostroke(command, "--grpc", "192.0.2.1:1")
    assert done.returncode == 2
    assert "--insecure" in done.stderr


def test_a_chat_with_nobody_says_so_before_it_asks_for_a_question():
    (port,) = free_ports("127.0.0.1", 1)
    done = _twostroke("chat", "--grpc", f"127.0.0.1:{port}", stdin="hello\n")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"127.0.0.1:{port}: connection refused" in done.stderr
    assert "`twostroke serve` starts one" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
