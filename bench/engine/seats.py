"""Contestants as resident processes, of which one computes at a time. Knows processes and lines, no measure.

All but the asked one are stopped (SIGSTOP): nobody spins, polls or tidies up at another's expense. A contestant dies
with the campaign (protocol.py), stopped or not.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import environments
import psutil

HERE = Path(__file__).resolve().parent
PREPARE_TIMEOUT_S = 900.0
MEASURE_TIMEOUT_S = 300.0
SETTLE_S = 0.2  # between one's last work and the next one's first: worker threads stop spinning, freed pages go back


class ContestantFailed(Exception):
    """It answered with an error, died, or was silent for too long."""


@dataclass(frozen=True)
class Entry:
    """One line of the table: an engine with its options."""

    name: str
    script: str
    variant: str
    group: str  # "16-bit", "8-bit" or "4-bit"
    environment: str | None = None  # None: the project's own

    @property
    def is_ours(self) -> bool:
        """Whether it is what the others are compared with."""
        return self.environment is None


ENTRIES = (
    Entry("twostroke bf16", "ours.py", "none", "16-bit"),
    Entry("twostroke int8", "ours.py", "int8", "8-bit"),
    Entry("twostroke q4_0", "ours.py", "q4_0", "4-bit"),
    Entry("transformers bf16", "peer_transformers.py", "", "16-bit", "transformers"),
    Entry("llama.cpp bf16", "peer_llama_cpp.py", "bf16", "16-bit", "llama_cpp"),
    Entry("llama.cpp bf16, flash", "peer_llama_cpp.py", "bf16-fa", "16-bit", "llama_cpp"),
    Entry("llama.cpp q8_0", "peer_llama_cpp.py", "q8_0", "8-bit", "llama_cpp"),
    Entry("llama.cpp q8_0, flash", "peer_llama_cpp.py", "q8_0-fa", "8-bit", "llama_cpp"),
    Entry("llama.cpp q4_0", "peer_llama_cpp.py", "q4_0", "4-bit", "llama_cpp"),
    Entry("llama.cpp q4_0, flash", "peer_llama_cpp.py", "q4_0-fa", "4-bit", "llama_cpp"),
    Entry("openvino f16", "peer_openvino.py", "f16", "16-bit", "openvino"),
    Entry("openvino q8_0", "peer_openvino.py", "q8_0", "8-bit", "openvino"),
    Entry("vllm bf16, eager", "peer_vllm.py", "eager", "16-bit", "vllm"),
    Entry("vllm bf16, compiled", "peer_vllm.py", "compiled", "16-bit", "vllm"),
)
LIMITS = Entry("machine", "limits.py", "", "limits")
AVX2 = "x86-64-v3"
"""The compiler's name for a machine with AVX2 and FMA, and without AVX-512."""
_AVX2_ENTRIES = ("twostroke", "llama.cpp q8_0", "llama.cpp q4_0", "openvino")  # those that can be kept to AVX2
_AVX2_SURROUNDINGS = {"ATEN_CPU_CAPABILITY": "avx2", "TWOSTROKE_BENCH_ISA": AVX2}
# OpenVINO 2026.4 does not start under ONEDNN_MAX_CPU_ISA=AVX2 where the machine has more, so it has all of it.


@dataclass(frozen=True)
class Work:
    """What all contestants are given."""

    checkpoint: Path
    threads: int
    isa: str | None = None  # AVX2, or None for all that this machine has


class Seat:
    """A contestant's process. Stopped whenever it is not asked."""

    def __init__(self, entry: Entry, python: Path, work: Work, log: Path) -> None:
        self.entry = entry
        command = [str(python), str(HERE / entry.script), "--checkpoint", str(work.checkpoint)]
        command += ["--variant", entry.variant, "--threads", str(work.threads)]
        surroundings = {
            name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "VIRTUAL_ENV"))
        }
        surroundings["OMP_NUM_THREADS"] = str(work.threads)
        surroundings |= _AVX2_SURROUNDINGS if work.isa == AVX2 else {}
        log.parent.mkdir(parents=True, exist_ok=True)
        self._partial = b""
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=surroundings,
                start_new_session=True,
            )

    def ask(self, command: dict[str, Any], timeout_s: float = MEASURE_TIMEOUT_S) -> dict[str, Any]:
        """Wake it, let it do this, and stop it again. `foreign_cpu` in the answer: cores that others kept busy.

        Raises:
            ContestantFailed: with what it said.
        """
        self._signal(signal.SIGCONT)
        began_s, began_cpu_s = time.monotonic(), self._others_cpu_s()
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
            answer: dict[str, Any] = json.loads(self._line(timeout_s))
        except (OSError, ValueError) as error:
            raise ContestantFailed(f"no answer to {command['do']}: {error}") from None
        answer["foreign_cpu"] = (self._others_cpu_s() - began_cpu_s) / (time.monotonic() - began_s)
        time.sleep(SETTLE_S)
        self._signal(signal.SIGSTOP)
        if not answer["ok"]:
            raise ContestantFailed(answer["error"])
        return answer

    def close(self) -> None:
        """Ask it to end, and make sure of it."""
        self._signal(signal.SIGCONT)
        try:
            self._process.communicate(b'{"do": "quit"}\n', timeout=20)
        except (OSError, ValueError, subprocess.TimeoutExpired):
            pass
        self._signal(signal.SIGKILL)  # its children too
        self._process.wait()

    def _others_cpu_s(self) -> float:
        """CPU seconds of everybody but this contestant, since the machine's start."""
        times = psutil.cpu_times()
        try:
            own = psutil.Process(self._process.pid).cpu_times()
        except psutil.NoSuchProcess:
            return 0.0
        busy: float = times.user + times.nice + times.system
        return busy - sum(own[:4])

    def _line(self, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        deadline_s = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._partial:
                if not selector.select(max(0.0, deadline_s - time.monotonic())):
                    raise ContestantFailed(f"silent for {timeout_s:.0f} s")
                data = os.read(self._process.stdout.fileno(), 1 << 20)
                if not data:
                    raise ContestantFailed(f"it died with status {self._process.wait()}")
                self._partial += data
        line, _, self._partial = self._partial.partition(b"\n")
        return line

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            pass


def python_of(entry: Entry, own: str) -> Path:
    """The interpreter that an entry runs under."""
    return Path(own) if entry.environment is None else environments.BY_NAME[entry.environment].python


def chosen(names: Sequence[str], isa: str | None = None) -> list[Entry]:
    """Entries whose name begins with one of `names`; all without any; of those the ones that can be kept to `isa`."""
    entries = [entry for entry in ENTRIES if not names or entry.name.startswith(tuple(names))]
    if isa is None:
        return entries
    entries = [entry for entry in entries if entry.name.startswith(_AVX2_ENTRIES)]
    return [
        replace(entry, environment="llama_cpp_avx2") if entry.environment == "llama_cpp" else entry for entry in entries
    ]
