"""Contestant without a model: what this machine reads and multiplies at most. Answers `limits` figures as `extra`.

Reads and products in registers are timed by limits.c (built with the machine's compiler; reads by torch's sum where
there is none), products of matrices by torch at sizes where nothing but the multipliers counts.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from protocol import Trace, arguments, serve

READ_BYTES = 1 << 30  # far beyond any last-level cache
SIZE = 2048
TRIES = 5

_TIMES = 5_000_000  # steps of a loop in registers: some tens of milliseconds


def _compiled() -> ctypes.CDLL | None:
    """limits.c, built for this machine, or for the instruction set that the campaign compares."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return None
    march = f"-march={os.environ.get('TWOSTROKE_BENCH_ISA', 'native')}"
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "limits.so"
        source = Path(__file__).with_suffix(".c")
        command = [compiler, "-O3", march, "-fopenmp", "-shared", "-fPIC", str(source), "-o", str(library)]
        if subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode:
            return None
        made = ctypes.CDLL(str(library))
    made.read_all.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    made.read_all.restype = ctypes.c_uint64
    for name in ("multiply_floats", "multiply_bytes"):
        getattr(made, name).argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p]
        getattr(made, name).restype = ctypes.c_double
    return made


class Limits:
    """Satisfies protocol.Contestant in form: a `prefill` measures, whatever the batch; the trace is empty."""

    ramp_tokens = 0

    def __init__(self, given: argparse.Namespace) -> None:
        self.threads = given.threads
        self.figures: dict[str, float] = {}

    def prepare(self) -> dict[str, Any]:
        torch.set_num_threads(self.threads)
        self.words = torch.ones(READ_BYTES // 8, dtype=torch.int64)
        self.loops = _compiled()
        generator = torch.Generator().manual_seed(1)
        self.bf16 = torch.randn(SIZE, SIZE, generator=generator).to(torch.bfloat16)
        self.int8 = torch.randint(-127, 128, (SIZE, SIZE), generator=generator, dtype=torch.int8)
        return {"reader": "C" if self.loops else "torch.sum", "threads": self.threads, "pid_cores": os.cpu_count()}

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Trace:
        operations = 2 * SIZE**3
        self.figures = {
            "read_gb_per_s": READ_BYTES / _best_s(self._read) / 1e9,
            "float_tmul_per_s": self._products_per_s("multiply_floats", torch.tensor([0.5, 0.25, 0.0])) / 1e12,
            "byte_tmul_per_s": self._products_per_s("multiply_bytes", torch.ones(3, dtype=torch.int32)) / 1e12,
            "bf16_tflop_per_s": operations / _best_s(lambda: self.bf16 @ self.bf16) / 1e12,
            "int8_top_per_s": operations / _best_s(lambda: torch._int_mm(self.int8, self.int8)) / 1e12,
        }
        return Trace(0)

    def _read(self) -> None:
        if self.loops is None:
            self.words.sum()
        else:
            self.loops.read_all(self.words.data_ptr(), self.words.numel(), self.threads)

    def _products_per_s(self, name: str, kept: torch.Tensor) -> float:
        """Products per second of a loop in registers; 0.0 where there is none."""
        if self.loops is None:
            return 0.0
        call = getattr(self.loops, name)
        products: float = call(1, self.threads, kept.data_ptr()) * _TIMES
        return products / _best_s(lambda: call(_TIMES, self.threads, kept.data_ptr()))

    def extra(self) -> dict[str, float]:
        """What was measured last."""
        return self.figures


def _best_s(call: Callable[[], Any]) -> float:
    """The shortest of a few calls: a limit is what the machine can, not what it does on average."""
    call()
    times = []
    for _ in range(TRIES):
        began_s = time.perf_counter()
        call()
        times.append(time.perf_counter() - began_s)
    return min(times)


if __name__ == "__main__":
    serve(Limits(arguments()))
