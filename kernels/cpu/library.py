"""The native CPU kernels as Python calls: structs and functions of `api.h` as ctypes. Knows no tensor library.

Calls release the GIL. One thread at a time may use one `Threads`. `api.h` documents arguments, shapes and units.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, c_float, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from .build import NativeUnavailable, built_library, found_library

FLOAT32, BFLOAT16, INT8, FP8, CODED, INT4, FLOAT16, E5M2, CHANNEL = range(9)
WHOLE, KEYS_ONLY, QUERIES_ONLY = range(3)  # part of the last layer that a call computes
ADAPTED_QKV, ADAPTED_OUTPUT, ADAPTED_GATE_UP, ADAPTED_DOWN, NUM_ADAPTED = range(5)  # matrices of a layer
NO_ACTIVATION, SILU, GELU_TANH, CLAMPED_SWIGLU = range(-1, 3)
GROUP_DIFFERS = -1  # failure of a group's call; others are why * 256 + 1 + the rank that is gone
DECLARED, SILENT, LEFT, LATE = range(4)  # why a rank is gone
GROUP_FAILED = 1 - (1 << 63)  # plus such a failure: the answer of `layers` when its group failed
LANES = 16  # columns per panel
ALIGNMENT = 64


class Matrix(ctypes.Structure):
    """A matrix in panels of 16 columns."""

    _fields_ = (
        ("panels", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("panel_bytes", c_int64),
        ("kind", c_int32),
        ("columns", c_int32),
        ("inner", c_int32),
        ("float32_out", c_int32),  # 1: answers are float32, for rows of any dtype
        *((name, c_int32) for name in ("group", "scale_kind", "has_zeros", "reserved")),  # INT4 only
        ("order", c_void_p),
    )


class Rows(ctypes.Structure):
    """Rows of numbers; the stride is in numbers."""

    _fields_ = (("data", c_void_p), ("stride", c_int64), ("rows", c_int32), ("kind", c_int32))


class StorePart(ctypes.Structure):
    """Rows of one component to store, and the planes that they go into."""

    _fields_ = (
        ("x", Rows),
        ("payload", c_void_p),
        ("scales", c_void_p),
        ("heads", c_int32),
        ("width", c_int32),
        ("codec", c_int32),
        ("block_tokens", c_int32),
    )


class Plane(ctypes.Structure):
    """One component of one layer in the cache."""

    _fields_ = (
        ("payload", c_void_p),
        ("scales", c_void_p),
        ("codec", c_int32),
        ("heads", c_int32),
        ("block_tokens", c_int32),
        ("width", c_int32),
    )


class AttendSpan(ctypes.Structure):
    """Rows of a batch that belong to one sequence, and its blocks (int32)."""

    _fields_ = (("blocks", c_void_p), ("row", c_int32), ("start", c_int32), ("count", c_int32), ("reserved", c_int32))


class Attend(ctypes.Structure):
    """Attention of one layer."""

    _fields_ = (
        ("queries", Rows * 2),
        ("keys", Plane * 2),
        ("values", Plane),
        ("out", Rows),
        ("spans", c_void_p),  # of AttendSpan
        ("sinks", c_void_p),  # float32 per head, or null
        ("num_parts", c_int32),
        ("num_spans", c_int32),
        ("heads", c_int32),
        ("window", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
    )


class NormWeight(ctypes.Structure):
    """Weight and epsilon of a norm; without a weight there is no norm."""

    _fields_ = (("weight", c_void_p), ("eps", c_float), ("reserved", c_int32))


class Layer(ctypes.Structure):
    """A decoder layer with plain attention and a dense gate, and its planes in the cache."""

    _fields_ = (
        *((name, NormWeight) for name in ("attention_norm", "after_attention", "ffn_norm", "after_ffn")),
        *((name, NormWeight) for name in ("q_norm", "k_norm")),
        *((name, Matrix) for name in ("qkv", "output", "gate_up", "down")),
        ("keys", Plane),
        ("values", Plane),
        ("scale", c_float),
        ("softcap", c_float),
        ("window", c_int32),
        ("rope", c_int32),
    )


class LowRank(ctypes.Structure):
    """Part of a low-rank change of a matrix."""

    _fields_ = (
        ("down", c_void_p),
        ("up", c_void_p),
        ("scale", c_float),
        *((name, c_int32) for name in ("kind", "rank", "inner", "count", "first", "step", "reserved")),
    )


class AdapterRows(ctypes.Structure):
    """Rows of a batch that one adapter changes, and its parts by place."""

    _fields_ = (
        ("parts", c_void_p),  # of LowRank
        ("starts", c_void_p),
        ("rows", c_void_p),
        ("num_rows", c_int32),
        ("reserved", c_int32),
    )


class Step(ctypes.Structure):
    """Rows of one step and the buffers that they pass through."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "h", "qkv", "mixed", "gated", "delta", "scratch")),
        ("cos", c_void_p * 2),
        ("sin", c_void_p * 2),
        ("slots", c_void_p),
        ("spans", c_void_p),  # of AttendSpan
        ("refused", c_void_p),
        ("non_finite", c_void_p),
        *((name, c_int32) for name in ("rows", "kind", "num_spans", "hidden", "heads", "kv_heads", "width", "ffn")),
        ("activation", c_int32),
        ("half", c_int32 * 2),
        ("last_layer", c_int32),
        ("group", c_void_p),
        ("adapters", c_void_p),  # of AdapterRows
        ("halves", c_void_p),
        ("num_adapters", c_int32),
        ("reserved", c_int32),
    )


class SealedPlanes(ctypes.Structure):
    """Planes of one component over all layers, the keys of its digests, and the digests."""

    _fields_ = (
        ("payload", c_void_p),
        ("scales", c_void_p),
        ("keys", c_void_p),
        ("scale_keys", c_void_p),
        ("first_places", c_void_p),
        ("digests", c_void_p),
        ("multiplier_seed", c_uint64),
        ("addend_seed", c_uint64),
        ("num_blocks", c_int64),
        ("layers", c_int32),
        ("heads", c_int32),
        ("block_tokens", c_int32),
        ("words", c_int32),
    )


class HashBlock(ctypes.Structure):
    """A hash block to seal."""

    _fields_ = tuple((name, c_int64) for name in ("block", "unit", "generation", "number", "tokens"))


class DeltaSpan(ctypes.Structure):
    """Rows of a sequence, the state from which it goes on, and its marks."""

    _fields_ = (
        ("memory", c_void_p),
        ("conv", c_void_p),
        ("row", c_int32),
        ("count", c_int32),
        ("first_mark", c_int32),
        ("num_marks", c_int32),
    )


class DeltaMark(ctypes.Structure):
    """A state that receives a sequence's after so many of its rows."""

    _fields_ = (("memory", c_void_p), ("conv", c_void_p), ("rows", c_int32), ("reserved", c_int32))


class Delta(ctypes.Structure):
    """One gated delta net in one step."""

    _fields_ = (
        ("x", Rows),
        *((name, c_void_p) for name in ("rates", "taps", "decay", "step_bias", "mixed", "numbers")),
        ("out", Rows),
        ("spans", c_void_p),  # of DeltaSpan
        ("marks", c_void_p),  # of DeltaMark
        *((name, c_int32) for name in ("num_spans", "num_taps", "key_heads", "heads", "key_width", "value_width")),
    )


_ROWS = POINTER(Rows)
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "level": (ctypes.c_char_p, ()),
    "start_threads": (c_void_p, (c_int32,)),
    "stop_threads": (None, (c_void_p,)),
    "panel_bytes": (c_int64, (c_int32, c_int32, c_int32)),
    "coded_panel_bytes": (c_int64, (c_void_p, c_void_p, c_int32, c_int32)),
    "pack": (None, (c_void_p, c_void_p, c_int32, c_int32, c_int32, c_int32, c_int64, c_void_p)),
    "int4_panel_bytes": (c_int64, (c_int32, c_int32, c_int32, c_int32)),
    "pack_int4": (None, (c_void_p, c_void_p, c_void_p, c_void_p, POINTER(Matrix))),
    "linear": (None, (c_void_p, POINTER(Matrix), _ROWS, _ROWS, c_int32, c_int32, c_void_p)),
    "add_changes": (None, (c_void_p, POINTER(AdapterRows), c_int32, c_int32, _ROWS, _ROWS)),
    "gate": (None, (c_void_p, _ROWS, _ROWS, c_int32, c_int32)),
    "rms_norm": (None, (c_void_p, _ROWS, _ROWS, c_void_p, c_float, c_int32, c_int32, _ROWS)),
    "delta": (None, (c_void_p, POINTER(Delta))),
    "rotary": (None, (c_void_p, _ROWS, c_int32, c_int32, c_void_p, c_void_p, c_int32, c_int32)),
    "extremes": (None, (c_void_p, _ROWS, c_int32, c_void_p, c_void_p, c_void_p)),
    "head": (None, (c_void_p, POINTER(Matrix), c_void_p, c_float, _ROWS, _ROWS, _ROWS, *[c_void_p] * 4)),
    "write": (None, (c_void_p, POINTER(StorePart), c_int32, c_void_p, c_int32, c_void_p)),
    "attend": (None, (c_void_p, POINTER(Attend))),
    "layers": (c_int64, (c_void_p, POINTER(Layer), c_int32, POINTER(Step))),
    "digest": (None, (POINTER(SealedPlanes), c_int32, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p)),
    "take": (None, (POINTER(SealedPlanes), c_int32, *[c_void_p] * 7)),
    "put": (None, (POINTER(SealedPlanes), c_int32, *[c_void_p] * 5)),
    "seal": (None, (POINTER(SealedPlanes), c_int32, c_void_p, c_int32, c_int32, c_void_p, c_void_p)),
    "group_bytes": (c_int64, (c_int32, c_int64)),
    "join_group": (c_void_p, (c_void_p, c_int32, c_int32, c_int64, c_int32, c_int32)),
    "leave_group": (None, (c_void_p,)),
    "fail_group": (None, (c_void_p, c_int32)),
    "group_failure": (c_int32, (c_void_p,)),
    "all_reduce": (c_int32, (c_void_p, c_void_p, c_void_p, c_int64, c_int32)),
    "all_gather": (c_int32, (c_void_p, c_void_p, c_int64, c_int64, c_void_p)),
    "agree": (c_int32, (c_void_p, c_int64, c_void_p)),
    "self_check": (c_int32, ()),
}


class Library:
    """The functions of one built library, by their names without the prefix `twostroke_`."""

    def __init__(self, path: Path) -> None:
        handle = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            # By index: by attribute, all libraries would share one function object.
            function = handle[f"twostroke_{name}"]
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the native library has no {name!r}")


@functools.cache
def load() -> Library:
    """The library of this machine.

    Raises:
        NativeUnavailable: as for `build.built_library`.
    """
    return Library(built_library())


def load_built() -> Library | None:
    """The library of this machine if it is built already, or None: nothing is compiled for it."""
    try:
        return load() if load.cache_info().currsize or found_library() is not None else None
    except NativeUnavailable:
        return None
