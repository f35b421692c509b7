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
from twostroke.kernels.gpu import launch

ROOT = Path(twostroke.__file__).resolve().parents[2]
FOLDER = ROOT / "bench" / "gpu"
pytestmark = [
    pytest.mark.timeout(510),  # half a minute on a quiet machine; a busy one may take many times that
    pytest.mark.skipif(not launch.interpreted(), reason="of what `bench/gpu` is without a GPU"),
]
# What the machines we bench on lack, and what a kernel has no business with.
ABSENT = ["pydantic", "ray", "fastapi", "redis", "kubernetes", "grpc", "google", "transformers", "tokenizers", "yaml"]
WITHOUT = f"""
import runpy, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from support.session.quick_interpreter import quicken
quicken()
del sys.path[0]
for name in {ABSENT}:
    sys.modules[name] = None  # importing it raises ImportError
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
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
    command = [sys.executable, "-c", WITHOUT, str(FOLDER), "--interpret", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    results = json.loads((tmp_path / "kernels.json").read_text())
    assert len(results["kernels"]) == 17
    assert all(found["right"] and "seconds" not in found for found in results["kernels"])
    assert "| rotary_store_kv, fp8 | yes |" in (tmp_path / "kernels.md").read_text()


@pytest.mark.campaign
def test_the_engine_runs_end_to_end_with_torch_and_triton_only(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT, str(FOLDER / "engine.py"), "--interpret", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    results = json.loads((tmp_path / "engine.json").read_text())
    assert set(results["caches"]) == {"fp8", "bfloat16"}
    for found in results["caches"].values():
        assert [each["batch"] for each in found["decode"]] == [1, 2]
        assert all(each["tokens_equal"] and "graphs" not in each for each in found["decode"])  # no speeds
        assert found["padded_tokens_equal"]
        assert found["hand_over"] == {"tokens": 16, "arrived": True, "arrived_across": True}
    assert "fp8 cache, decode at batch 2: tokens equal True" in (tmp_path / "engine.md").read_text()


def test_what_a_step_must_read_and_multiply() -> None:
    sys.path.insert(0, str(FOLDER))
    try:
        shape = load("llama").Shape.llama_8b()
    finally:
        sys.path.remove(str(FOLDER))
    parameters = shape.linear_numbers + 2 * shape.hidden * shape.vocab
    assert 8.02e9 < parameters < 8.04e9  # the published count, norms apart
    kv_bytes = shape.spec.kv_spec("bfloat16").bytes_per_token
    assert shape.decode_bytes(1, kv_bytes) == 2 * (parameters - shape.hidden * shape.vocab) + 1036 * kv_bytes
    # One token attends to itself: products of 2 * width per head for its score and as many for its value.
    one = 2 * (parameters - shape.hidden * shape.vocab) + 4 * shape.layers * shape.heads * shape.width
    assert shape.prefill_flops(1, 1) == one


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
