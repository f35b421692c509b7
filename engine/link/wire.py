"""Encoding of commands, events and plans as bytes, for a link between processes and for other ranks. Pure; no pickle.

A value is a tag and its content. Tuples of small whole numbers (token ids, block tables) are sent as one packed array,
planes as their raw bytes. Classes are numbered by `CLASSES`: both ends must be of the same release and machine.
"""

from __future__ import annotations

import dataclasses
import struct
from array import array
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

import numpy as np

from ...core.request import FinishReason, Grammar, Role, SamplingParams, SequenceKey, TokenLogprobs
from ...core.tally import Spread
from ...kv.section import SectionData
from ..link import messages as m
from ..plan import History, SampledPlace, SequenceStep, StepPlan, StepResult
from ..store_ops import FetchOp, ReadOp, SwapInOp, SwapOutOp, WriteOp

CLASSES: tuple[Any, ...] = (
    *(m.Submit, m.CancelSequence, m.Bind, m.WriteKv, m.KvComplete, m.PrefillLocally, m.PeerBound, m.PeerNotYet),
    *(m.ReadKv, m.FetchBlocks, m.Release, m.AskSnapshot, m.SetRole, m.Stop),
    *(m.LoadAdapter, m.DropAdapter, m.AdapterLoaded, m.AdapterRefused),
    *(m.Promised, m.Offered, m.Bound, m.NotYet, m.KvWritten, m.Progress, m.TokenNews, m.StepTokens, m.KvRead),
    *(m.BlocksFetched, m.Ended, m.CacheDelta, m.CacheSnapshot, m.LoadNews),
    *(SequenceKey, SamplingParams, TokenLogprobs, Spread, SectionData),
    *(History, SampledPlace, SequenceStep, StepPlan, StepResult),
    *(ReadOp, WriteOp, FetchOp, SwapOutOp, SwapInOp, Grammar),
)
ENUMS: tuple[type[Enum], ...] = (m.Source, FinishReason, Role, m.Reading)

_NUMBER = {cls: number for number, cls in enumerate(CLASSES)}
_FIELDS = {
    cls: tuple(f.name for f in dataclasses.fields(cls) if not f.metadata.get("is_local"))
    if dataclasses.is_dataclass(cls)
    else cls._fields
    for cls in CLASSES
}
_MEMBERS = [tuple(cls) for cls in ENUMS]
_MEMBER_NUMBER = {member: (e, i) for e, members in enumerate(_MEMBERS) for i, member in enumerate(members)}
_LENGTH = struct.Struct("<I")
_REAL = struct.Struct("<d")
assert array("I").itemsize == 4
_LEAST_PACKED = 4  # shorter tuples are smaller without packing


class WireError(ValueError):
    """Malformed bytes, or a value that cannot be encoded."""


def encode(value: object) -> bytes:
    """Encode a value.

    Raises:
        WireError: it contains an object of an unknown type.
    """
    out = bytearray()
    _put(value, out)
    return bytes(out)


def decode(data: bytes) -> Any:
    """Decode the bytes of `encode`. Arrays are read-only.

    Raises:
        WireError: the bytes are malformed, cut off, or more than one value.
    """
    try:
        value, end = _get(data, 0)
    except (struct.error, IndexError, KeyError, TypeError, ValueError, RecursionError, SyntaxError) as error:
        raise WireError(f"{len(data)} bytes are no value: {error}") from None
    if end != len(data):
        raise WireError(f"{len(data) - end} bytes follow the value")
    return value


def _put(value: Any, out: bytearray) -> None:
    kind = type(value)
    if value is None:
        out += b"N"
    elif kind is bool:
        out += b"T" if value else b"F"
    elif kind is int:
        size = value.bit_length() // 8 + 1
        out += b"i%c" % size + value.to_bytes(size, "little", signed=True)
    elif kind is float:
        out += b"f" + _REAL.pack(value)
    elif kind is str:
        _put_sized(b"s", value.encode("utf-8", "surrogatepass"), out)
    elif kind is bytes:
        _put_sized(b"b", value, out)
    elif kind in _NUMBER:
        out += b"c%c" % _NUMBER[kind]
        for name in _FIELDS[kind]:
            _put(getattr(value, name), out)
    elif kind is tuple:
        _put_tuple(value, out)
    elif kind in (list, frozenset):
        out += (b"l" if kind is list else b"z") + _LENGTH.pack(len(value))
        for each in value:
            _put(each, out)
    elif value in _MEMBER_NUMBER if isinstance(value, Enum) else False:
        out += b"e%c%c" % _MEMBER_NUMBER[value]
    elif isinstance(value, Mapping):
        out += b"m" + _LENGTH.pack(len(value))
        for key, each in value.items():
            _put(key, out)
            _put(each, out)
    elif isinstance(value, np.ndarray):
        _put_sized(b"a", value.dtype.str.encode(), out)
        _put(value.shape, out)
        _put_sized(b"", np.ascontiguousarray(value).tobytes(), out)
    else:
        raise WireError(f"a {kind.__name__} is no plain value: {value!r:.80}")


def _put_tuple(values: tuple[Any, ...], out: bytearray) -> None:
    if len(values) >= _LEAST_PACKED and set(map(type, values)) == {int}:
        try:
            packed = array("I", values).tobytes()
        except OverflowError:
            pass
        else:
            _put_sized(b"p", packed, out)
            return
    out += b"t" + _LENGTH.pack(len(values))
    for value in values:
        _put(value, out)


def _put_sized(tag: bytes, data: bytes, out: bytearray) -> None:
    out += tag + _LENGTH.pack(len(data)) + data


def _get(data: bytes, at: int) -> tuple[Any, int]:
    return _READERS[data[at : at + 1]](data, at + 1)


def _sized(data: bytes, at: int) -> tuple[bytes, int]:
    (size,) = _LENGTH.unpack_from(data, at)
    end = at + 4 + size
    if end > len(data):
        raise WireError(f"{end - len(data)} bytes are missing")
    return data[at + 4 : end], end


def _get_int(data: bytes, at: int) -> tuple[int, int]:
    end = at + 1 + data[at]
    if end > len(data):
        raise WireError("a number is cut")
    return int.from_bytes(data[at + 1 : end], "little", signed=True), end


def _get_str(data: bytes, at: int) -> tuple[str, int]:
    text, end = _sized(data, at)
    return text.decode("utf-8", "surrogatepass"), end


def _get_packed(data: bytes, at: int) -> tuple[tuple[int, ...], int]:
    packed, end = _sized(data, at)
    values = array("I")
    values.frombytes(packed)
    return tuple(values), end


def _get_many(data: bytes, at: int) -> tuple[list[Any], int]:
    (count,) = _LENGTH.unpack_from(data, at)
    at += 4
    values = []
    for _ in range(count):
        value, at = _get(data, at)
        values.append(value)
    return values, at


def _as(make: Callable[[list[Any]], Any]) -> Callable[[bytes, int], tuple[Any, int]]:
    def read(data: bytes, at: int) -> tuple[Any, int]:
        values, at = _get_many(data, at)
        return make(values), at

    return read


def _get_map(data: bytes, at: int) -> tuple[dict[Any, Any], int]:
    (count,) = _LENGTH.unpack_from(data, at)
    at += 4
    found = {}
    for _ in range(count):
        key, at = _get(data, at)
        found[key], at = _get(data, at)
    return found, at


def _get_class(data: bytes, at: int) -> tuple[Any, int]:
    cls = CLASSES[data[at]]
    at += 1
    values = []
    for _ in _FIELDS[cls]:
        value, at = _get(data, at)
        values.append(value)
    return cls(*values), at


def _get_array(data: bytes, at: int) -> tuple[Any, int]:
    dtype, at = _sized(data, at)
    shape, at = _get(data, at)
    planes, at = _sized(data, at)
    return np.frombuffer(planes, dtype=dtype.decode()).reshape(shape), at  # SyntaxError: numpy parses the dtype


_READERS: dict[bytes, Callable[[bytes, int], tuple[Any, int]]] = {
    b"N": lambda _, at: (None, at),
    b"T": lambda _, at: (True, at),
    b"F": lambda _, at: (False, at),
    b"i": _get_int,
    b"f": lambda data, at: (_REAL.unpack_from(data, at)[0], at + 8),
    b"s": _get_str,
    b"b": _sized,
    b"p": _get_packed,
    b"t": _as(tuple),
    b"l": _as(list),
    b"z": _as(frozenset),
    b"m": _get_map,
    b"c": _get_class,
    b"a": _get_array,
    b"e": lambda data, at: (_MEMBERS[data[at]][data[at + 1]], at + 2),
}
