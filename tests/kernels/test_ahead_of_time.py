"""Every kernel becomes machine code for every target, as its wrapper launches it, on a machine without a GPU.

`make test` compiles one shape for sm_80, sm_90 and gfx942; `make targets` more shapes for all targets.
"""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import twostroke
from twostroke.kernels.gpu import launch

ROOT = Path(twostroke.__file__).resolve().parents[2]
SHARED_KIB = {
    "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64,
}  # fmt: skip # one block may have this much
IN_SUITE = ("sm_80", "sm_90", "gfx942")
COMPILE_S = 900  # about a minute on two quiet cores, but a busy machine may take many times that
pytestmark = [
    pytest.mark.timeout(COMPILE_S + 10),
    pytest.mark.skipif(not launch.interpreted(), reason="a minute of compiling that no GPU changes"),
]


Compile = Callable[[bool], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Results of compiling one shape for the targets of the suite, or all that ships for all; each once.

    The interpreter is chosen when triton is imported, so the compiler needs a process of its own.

    What this checkout compiled before is not compiled again: triton finds it by its source, options and release.
    """
    kept = getattr(request.config, "cache", None)  # none where pytest's cache is switched off
    folder = tmp_path_factory.mktemp("triton") if kept is None else kept.mkdir("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_DISABLE_LINE_INFO"] = "1"  # less to compile, the same machine code
    environment["TRITON_CACHE_DIR"] = str(folder)
    environment["OMP_NUM_THREADS"] = "1"

    @functools.cache
    def compile_them(quick: bool) -> list[dict[str, Any]]:
        what = ["--quick", *IN_SUITE] if quick else list(SHARED_KIB)
        command = [sys.executable, str(ROOT / "bench" / "gpu" / "ahead.py"), *what]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=COMPILE_S, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        results: list[dict[str, Any]] = json.loads(done.stdout)
        return results

    return compile_them


def written_kernels() -> set[str]:
    """Names of all kernels in the source: jitted functions called *_kernel."""
    lines = [
        line
        for path in (ROOT / "kernels" / "gpu").glob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    names = [line.removeprefix("def ").split("(")[0] for line in lines if line.startswith("def ")]
    return {name for name in names if name.endswith("_kernel")}


def of_target(compiled: Compile, target: str, quick: bool = False) -> list[dict[str, Any]]:
    return [result for result in compiled(quick) if result["target"] == target]


@pytest.mark.parametrize(
    ("target", "quick"),
    [
        *((target, True) for target in IN_SUITE),
        *(pytest.param(target, False, marks=pytest.mark.campaign) for target in SHARED_KIB),
    ],
)
def test_every_kernel_becomes_machine_code_within_the_target_s_limits(
    compiled: Compile, target: str, quick: bool
) -> None:
    results = of_target(compiled, target, quick)
    assert {result["kernel"] for result in results} == written_kernels()
    for result in results:
        assert result["code_bytes"] > 1000
        assert result["shared_bytes"] <= SHARED_KIB[target] * 1024, result
        # Bits must not depend on a compiler's default.
        assert result["fusion"] is False
        assert not result["fused"]


@pytest.mark.campaign
def test_nothing_that_ships_for_sm_90_spills_registers(compiled: Compile) -> None:
    results = of_target(compiled, "sm_90")
    assert len({result["shape"] for result in results}) > 4
    assert [result for result in results if result["spilled_bytes"]] == []


def test_the_committed_table_has_every_kernel_and_no_spill_on_sm_90() -> None:
    saved = ROOT / "bench" / "results" / "kernels" / "resources.json"
    results = json.loads(saved.read_text(encoding="utf-8"))["compiled"]
    for target, kib in SHARED_KIB.items():
        found = [result for result in results if result["target"] == target]
        assert {result["kernel"] for result in found} == written_kernels()
        assert max(result["shared_bytes"] for result in found) <= kib * 1024
    assert not any(result["spilled_bytes"] for result in results if result["target"] == "sm_90")
