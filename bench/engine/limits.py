"""Contestant without a model: what this machine reads and multiplies at most. Answers `limits` figures as `extra`.

Reads are timed by a few lines of C (built with the machine's compiler; torch's sum where there is none), products by
torch at sizes where nothing but the multipliers counts.
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

_READ_C = """
#include <stddef.h>
#include <stdint.h>
/* The sum of all words; four sums, so that additions are never what it waits for. */
uint64_t read_all(const uint64_t *words, size_t count, int threads) {
    uint64_t total = 0;
    #pragma omp parallel for num_threads(threads) reduction(+:total) schedule(static)
    for (size_t block = 0; block < count / 4096; block++) {
        const uint64_t *p = words + block * 4096;
        uint64_t a = 0, b = 0, c = 0, d = 0;
        for (size_t i = 0; i < 4096; i += 32) {
            __builtin_prefetch((const char *)(p + i) + 4096);
            __builtin_prefetch((const char *)(p + i) + 4160);
            __builtin_prefetch((const char *)(p + i) + 4224);
            __builtin_prefetch((const char *)(p + i) + 4288);
            for (size_t j = 0; j < 8; j++) {
                a += p[i + j]; b += p[i + 8 + j]; c += p[i + 16 + j]; d += p[i + 24 + j];
            }
        }
        total += a + b + c + d;
    }
    return total;
}
"""


def _compiled_reader() -> Callable[[torch.Tensor, int], Any] | None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "read.c", Path(folder) / "read.so"
        source.write_text(_READ_C)
        command = [compiler, "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", str(source), "-o", str(library)]
        if subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode:
            return None
        function = ctypes.CDLL(str(library)).read_all
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    function.restype = ctypes.c_uint64
    return lambda tensor, threads: function(tensor.data_ptr(), tensor.numel(), threads)


class Limits:
    """Satisfies protocol.Contestant in form: a `prefill` measures, whatever the batch; the trace is empty."""

    ramp_tokens = 0

    def __init__(self, given: argparse.Namespace) -> None:
        self.threads = given.threads
        self.figures: dict[str, float] = {}

    def prepare(self) -> dict[str, Any]:
        torch.set_num_threads(self.threads)
        self.words = torch.ones(READ_BYTES // 8, dtype=torch.int64)
        self.reader = _compiled_reader()
        generator = torch.Generator().manual_seed(1)
        self.bf16 = torch.randn(SIZE, SIZE, generator=generator).to(torch.bfloat16)
        self.int8 = torch.randint(-127, 128, (SIZE, SIZE), generator=generator, dtype=torch.int8)
        return {"reader": "C" if self.reader else "torch.sum", "threads": self.threads, "pid_cores": os.cpu_count()}

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Trace:
        operations = 2 * SIZE**3
        read = (lambda: self.reader(self.words, self.threads)) if self.reader else self.words.sum  # type: ignore[misc]
        self.figures = {
            "read_gb_per_s": READ_BYTES / _best_s(read) / 1e9,
            "bf16_tflop_per_s": operations / _best_s(lambda: self.bf16 @ self.bf16) / 1e12,
            "int8_top_per_s": operations / _best_s(lambda: torch._int_mm(self.int8, self.int8)) / 1e12,
        }
        return Trace(0)

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
