"""Which device a worker computes on, and what a GPU refuses by name."""

import sys
import types
from pathlib import Path

import pytest
import torch

from twostroke.core.errors import ConfigError
from twostroke.kernels.cpu.build import NativeUnavailable
from twostroke.model.ops import device as device_module
from twostroke.model.ops.device import chosen_kernels, chosen_kind, gpu_free_bytes, resolve_device


@pytest.fixture(autouse=True)
def _compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_auto_is_a_gpu_where_there_is_one():
    assert chosen_kind("auto", 0) == "cpu"
    assert chosen_kind("auto", 2) == "cuda"
    assert chosen_kind("cpu", 2) == "cpu"
    with pytest.raises(ConfigError, match="torch sees no GPU here"):
        chosen_kind("cuda", 0)


def test_auto_kernels_are_native_where_they_can_be_had(caplog: pytest.LogCaptureFixture):
    def none() -> None:
        raise NativeUnavailable("nothing builds here")

    assert chosen_kernels("auto", "cpu", lambda: None) == "native"
    assert chosen_kernels("torch", "cpu", none) == "torch"
    assert chosen_kernels("native", "cuda", none) == "triton"
    assert not caplog.text
    assert chosen_kernels("auto", "cpu", none) == "torch"
    assert "slower: nothing builds here" in caplog.text
    with pytest.raises(ConfigError, match=r"model.kernels is 'native', but nothing builds here"):
        chosen_kernels("native", "cpu", none)


def test_a_worker_takes_the_gpu_it_was_given(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto", 1) == torch.device("cuda", 1)
    assert resolve_device("cpu", 1) == torch.device("cpu")
    with pytest.raises(ConfigError, match="was given GPU 2, and torch sees 2"):
        resolve_device("cuda", 2)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # interpreted kernels take CPU tensors
    assert resolve_device("auto") == torch.device("cpu")


def test_memory_is_asked_of_each_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(device_module, "_DRIVERS", (tmp_path,))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,2")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (10 + index, 80))
    assert gpu_free_bytes() == (10, 11)
    monkeypatch.setattr(device_module, "_DRIVERS", (tmp_path / "none",))
    assert gpu_free_bytes() == ()


def test_the_driver_is_asked_where_it_can_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(device_module, "_DRIVERS", (tmp_path,))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    driver = types.ModuleType("pynvml")
    vars(driver).update(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=lambda index: types.SimpleNamespace(free=70 + index),
    )
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert gpu_free_bytes() == (70, 71)
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed: torch is asked
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (5, 80))
    assert gpu_free_bytes() == (5,)
