"""Tests of kernels on a GPU: the public functions take a test's CPU tensors there and bring their answers back.

A tensor's whole storage goes over, once per call, so that views of one memory are views of one memory there too, with
their offsets and strides; what a kernel wrote comes back into it. Calls without a CPU tensor are left as they are.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from twostroke.kernels.gpu import activation, move_tokens, norm, paged_decode, ragged_prefill, rotary_store, store_kv

PUBLIC = (
    (activation, "act_mul"),
    (move_tokens, "gather_tokens"),
    (move_tokens, "scatter_tokens"),
    (norm, "add_rms_norm"),
    (norm, "rms_norm"),
    (paged_decode, "paged_decode_attention"),
    (ragged_prefill, "ragged_prefill_attention"),
    (rotary_store, "rotary_store_kv"),
    (store_kv, "store_kv"),
)


def move_kernels_to_gpu() -> None:
    """Wrap what `PUBLIC` names, before the tests import it."""
    for module, name in PUBLIC:
        setattr(module, name, _on_gpu(getattr(module, name)))


def _on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        twins = _Twins()
        args, options = _each(twins.of, args), {name: _each(twins.of, value) for name, value in options.items()}
        if not twins:
            return function(*args, **options)
        try:
            return _each(torch.Tensor.cpu, function(*args, **options))
        finally:  # also of a call that was refused: the test may want to see that nothing was written
            twins.bring_back()

    return call


class _Twins:
    """The memory of one call's tensors, each with its twin on the GPU."""

    def __init__(self) -> None:
        self._twins: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # bytes here and there, by their address here

    def __bool__(self) -> bool:
        return bool(self._twins)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type != "cpu":
            return tensor
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._twins:
            here = torch.tensor([], dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]
            self._twins[storage.data_ptr()] = here, here.to("cuda")
        twin = self._twins[storage.data_ptr()][1].untyped_storage()
        there = torch.tensor([], dtype=tensor.dtype, device="cuda")
        return there.set_(twin, tensor.storage_offset(), tensor.size(), tensor.stride())  # type: ignore[call-overload]

    def bring_back(self) -> None:
        for here, there in self._twins.values():
            here.copy_(there)


def _each(move: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """A value with each of its tensors moved; tuples, named ones too, and lists are looked into."""
    if isinstance(value, torch.Tensor):
        return move(value)
    if isinstance(value, tuple | list):
        parts = [_each(move, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
