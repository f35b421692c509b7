"""Every kernel becomes machine code for every target, on a machine without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import twostroke

KERNELS = Path(twostroke.__file__).parent / "kernels"
SHARED_KIB = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # one block may have this much
COMPILE_S = 300  # 20 s of computing, but a busy machine may take many times that
pytestmark = pytest.mark.timeout(COMPILE_S + 10)
NAMES = ["_store_kv_kernel", "_attend_split_kernel", "_combine_splits_kernel"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The interpreter is chosen when triton is imported, so the compiler needs a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_DISABLE_LINE_INFO"] = "1"  # less to compile, the same machine code
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    script = Path(__file__).parent / "compile_ahead.py"
    command = [sys.executable, str(script), str(KERNELS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=COMPILE_S, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return results


def test_every_kernel_is_compiled(compiled: dict[str, dict[str, Any]]) -> None:
    assert sorted(compiled) == sorted(NAMES)


@pytest.mark.parametrize("target", list(SHARED_KIB))
@pytest.mark.parametrize("name", NAMES)
def test_compiles_to_machine_code_within_the_target_s_limits(
    compiled: dict[str, dict[str, Any]], name: str, target: str
) -> None:
    result = compiled[name][target]
    artefact = "hsaco" if target == "gfx942" else "cubin"
    assert result["artefacts"].get(artefact, 0) > 1000
    assert result["shared_bytes"] <= SHARED_KIB[target] * 1024
    # Bits must not depend on a compiler's default.
    assert result["fp_fusion"] is False
    assert not result["fused"]
