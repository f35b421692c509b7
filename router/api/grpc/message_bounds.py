"""Bounds of a client's protobuf message, checked on its bytes before any object is built. Pure.

A field costs two bytes on the wire and a hundred in memory, so the length of a message bounds neither time nor memory.
The walk follows the known message fields only, skips every other field by its length, and stops at the first bound.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from ....core.errors import InvalidRequest
from ....core.sampling import FIELDS
from ..http.structure import MAX_COMMAS
from ..messages import MAX_MESSAGES
from .chat_wire import MAX_ITEMS

MAX_FIELDS = 40_960  # per message: 2,048 chat messages and 16,384 parts with their texts have 39,000

MAX_TENSORS = 256  # inputs, outputs and parameters of one inference request (KServe)
_KSERVE_KINDS = ("bool", "int", "int64", "uint", "uint64", "fp32", "fp64", "bytes")

# Most entries of the repeated fields, over the whole message.
MAX_ENTRIES: Mapping[str, int] = {
    "messages": MAX_MESSAGES,
    "parts": MAX_ITEMS,
    "tool_calls": MAX_ITEMS,
    **{field.api: field.max_entries for field in FIELDS if field.max_entries},
    **dict.fromkeys(("inputs", "outputs", "raw_input_contents", "parameters"), MAX_TENSORS),
    **dict.fromkeys(("shape", *(f"{kind}_contents" for kind in _KSERVE_KINDS)), 4 * MAX_TENSORS),
    "ids": MAX_COMMAS,  # of tokens: whether they fit the model is seen when they are here, eight bytes each
}

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types; 3 and 4 are groups, which proto3 does not have
_MAX_VARINT_BYTES = 10
_NOT_LAST = bytes(range(0x80, 0x100))  # every byte of a varint but its last


@dataclass(frozen=True, slots=True)
class _Field:
    name: str
    most: int | None  # entries
    inner: Mapping[int, _Field] | None  # of a message field
    is_packed: bool  # several whole numbers may stand in one field


def check_bounds(raw: bytes, kind: Descriptor) -> None:
    """Refuse the bytes of a message of this kind with too many fields or entries.

    Raises:
        InvalidRequest: there are too many, or the bytes are no message; `param` names a repeated field.
    """
    try:
        _walk(raw, _fields_of(kind))
    except IndexError:
        raise _malformed("it ends within a field") from None


def _walk(raw: bytes, top: Mapping[int, _Field]) -> None:
    num_fields = 0
    num_entries: Counter[str] = Counter()
    todo = [(0, len(raw), top)]
    while todo:
        place, end, fields = todo.pop()
        while place < end:
            num_fields += 1
            if num_fields > MAX_FIELDS:
                raise InvalidRequest(
                    f"the message has more than {MAX_FIELDS} fields; send fewer, and lists of numbers packed"
                )
            start = place
            tag, place = _varint(raw, place)
            field = fields.get(tag >> 3)
            wire_type = tag & 7
            if wire_type == _BYTES:
                size, place = _varint(raw, place)
                start = place
                place += size
            elif wire_type == _VARINT:
                _, place = _varint(raw, place)
            elif wire_type == _FIXED64:
                place += 8
            elif wire_type == _FIXED32:
                place += 4
            else:
                raise _malformed(f"field {tag >> 3} has the wire type {wire_type}")
            if place > end:
                raise _malformed("a field is longer than the message")
            if field is None:
                continue
            if field.most is not None:
                is_packed = wire_type == _BYTES and field.is_packed
                num_entries[field.name] += _num_varints(raw[start:place]) if is_packed else 1
                if num_entries[field.name] > field.most:
                    raise InvalidRequest(f"{field.name} has more than {field.most} entries", param=field.name)
            if wire_type == _BYTES and field.inner is not None:
                todo.append((start, place, field.inner))


def _varint(raw: bytes, place: int) -> tuple[int, int]:
    """Decode a varint; returns its value and the offset after it."""
    byte = raw[place]
    if byte < 0x80:
        return byte, place + 1
    value, shift = byte & 0x7F, 7
    for after in range(place + 1, place + _MAX_VARINT_BYTES):
        byte = raw[after]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, after + 1
        shift += 7
    raise _malformed("a number has more than 10 bytes")


def _num_varints(packed: bytes) -> int:
    return len(packed.translate(None, _NOT_LAST))


@cache
def _fields_of(kind: Descriptor) -> Mapping[int, _Field]:
    return {field.number: _field(field) for field in kind.fields}


def _field(field: Any) -> _Field:
    is_message = field.type == FieldDescriptor.TYPE_MESSAGE
    numbers = (
        *(FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_UINT64),
        *(FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_BOOL),
    )
    return _Field(
        field.name,
        MAX_ENTRIES.get(field.name),
        _fields_of(field.message_type) if is_message else None,
        field.is_repeated and field.cpp_type in numbers,
    )


def _malformed(why: str) -> InvalidRequest:
    return InvalidRequest(f"the message cannot be read: {why}")
