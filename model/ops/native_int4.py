"""Panels of 4-bit groups for the CPU kernels (`kernels/cpu/linear/int4.h`)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ...kernels.cpu import library as native
from ...kernels.cpu.memory import take_memory
from .int4 import Int4Matrix

_SCALE_KINDS = {torch.float32: native.FLOAT32, torch.bfloat16: native.BFLOAT16, torch.float16: native.FLOAT16}


def int4_panels(library: native.Library, threads: ctypes.c_void_p, matrix: Int4Matrix) -> tuple[native.Matrix, Tensor]:
    """Panels of a matrix (uint8), and its description for the kernels, which points to them and to `matrix.order`."""
    columns, inner, group = len(matrix.numbers), matrix.columns, matrix.group
    assert group % 8 == 0 == inner % group, "groups are whole and multiples of 8"
    numbers, scales = matrix.numbers.contiguous(), matrix.scales.contiguous()
    zeros = None if matrix.zeros is None else matrix.zeros.contiguous()
    kind, has_zeros = _SCALE_KINDS[scales.dtype], int(zeros is not None)
    panel_bytes = library.int4_panel_bytes(inner, group, kind, has_zeros)
    panels = take_memory(-(-columns // native.LANES) * panel_bytes)
    packed = native.Matrix(
        panels=panels.data_ptr(), panel_bytes=panel_bytes, kind=native.INT4, columns=columns, inner=inner,
        group=group, scale_kind=kind, has_zeros=has_zeros,
        order=None if matrix.order is None else matrix.order.data_ptr(),
    )  # fmt: skip
    library.pack_int4(
        threads, numbers.data_ptr(), scales.data_ptr(), None if zeros is None else zeros.data_ptr(), packed
    )
    return packed, panels
