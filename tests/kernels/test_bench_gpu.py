"""`bench/gpu`, checked without a GPU: it runs with torch and triton only, and a wrong kernel does not pass."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import twostroke

ROOT = Path(twostroke.__file__).resolve().parents[2]
FOLDER = ROOT / "bench" / "gpu"
# What the machines we bench on lack, and what a kernel has no business with.
ABSENT = ["pydantic", "ray", "fastapi", "redis", "kubernetes", "grpc", "transformers", "yaml"]
WITHOUT = f"""
import runpy, sys
for name in {ABSENT}:
    sys.modules[name] = None  # importing it raises ImportError
sys.argv = [{str(FOLDER)!r}, *sys.argv[1:]]
runpy.run_path({str(FOLDER)!r}, run_name="__main__")
"""


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_gpu_{name.strip('_')}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_one_command_finds_every_kernel_right_with_torch_and_triton_only(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT, "--interpret", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    results = json.loads((tmp_path / "kernels.json").read_text())
    assert len(results["kernels"]) == 17
    assert all(found["right"] and "seconds" not in found for found in results["kernels"])
    assert "| rotary_store_kv, fp8 | yes |" in (tmp_path / "kernels.md").read_text()


def test_a_wrong_answer_is_no_result() -> None:
    cases, main = load("cases"), load("__main__")
    case = next(cases.cases(cases.Sizes.tiny()))
    right = case.expected()
    case.ours = lambda: right
    assert main.check(case) == 0.0
    for wrong in (right * 1.02, right.float(), right[:-1], right.masked_fill(right == right.max(), torch.nan)):
        case.ours = lambda wrong=wrong: wrong
        with pytest.raises(AssertionError):
            main.check(case)


def test_the_facts_about_bits_hold_where_products_are_even(monkeypatch: pytest.MonkeyPatch) -> None:
    def matmul(a: Any, b: Any, dtype: Any = None) -> Any:
        return np.einsum("ik,kj->ij", a.astype(dtype), b.astype(dtype), optimize=False)

    monkeypatch.setattr(np, "matmul", matmul)
    facts = load("bits").shared_bits("cpu")
    assert len(facts) == 4
    assert all(facts.values()), facts
