"""Tensors of the Open Inference Protocol as single values, and back. Pure.

A tensor here holds one value: `[1]` or `[1, 1]`. Its data stand in `raw_input_contents`, little-endian, with a text's
length in four bytes before it; or in the field of its type.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from ....core.errors import InvalidRequest, UnsupportedParameter
from ....protos import kserve_pb2
from ..checks import short

Value = bool | int | float | str

_NUMBERS = {  # data type to its format in bytes, and its field
    "BOOL": ("<?", "bool_contents"),
    "INT8": ("<b", "int_contents"),
    "INT16": ("<h", "int_contents"),
    "INT32": ("<i", "int_contents"),
    "INT64": ("<q", "int64_contents"),
    "UINT8": ("<B", "uint_contents"),
    "UINT16": ("<H", "uint_contents"),
    "UINT32": ("<I", "uint_contents"),
    "UINT64": ("<Q", "uint64_contents"),
    "FP32": ("<f", "fp32_contents"),
    "FP64": ("<d", "fp64_contents"),
}


def values_of(message: kserve_pb2.ModelInferRequest) -> dict[str, Value]:
    """The values of all input tensors, by their names.

    Raises:
        InvalidRequest: a tensor holds no single value, is there twice, or has no data; `param` names it.
        UnsupportedParameter: its data are in shared memory.
    """
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise InvalidRequest(
            f"raw_input_contents has {len(raw)} entries for {len(message.inputs)} inputs; give one for each, or none",
            param="raw_input_contents",
        )
    found: dict[str, Value] = {}
    for place, tensor in enumerate(message.inputs):
        if tensor.name in found:
            raise InvalidRequest(f"input {short(tensor.name)} is given twice; give it once", param=tensor.name)
        found[tensor.name] = _value(tensor, raw[place] if raw else None)
    return found


def _value(tensor: kserve_pb2.ModelInferRequest.InferInputTensor, raw: bytes | None) -> Value:
    name, kind = tensor.name, tensor.datatype
    if "shared_memory_region" in tensor.parameters:
        raise UnsupportedParameter(f"input {short(name)} is in shared memory; send its data", param=name)
    if any(size != 1 for size in tensor.shape) or len(tensor.shape) > 2:
        raise InvalidRequest(
            f"input {short(name)} has the shape {short(list(tensor.shape[:8]))}; must be [1]: one request at a time",
            param=name,
        )
    if kind != "BYTES" and kind not in _NUMBERS:
        raise InvalidRequest(
            f"input {short(name)} has the datatype {short(kind)}; must be BYTES, {', '.join(_NUMBERS)}", param=name
        )
    form, field = _NUMBERS.get(kind, ("", "bytes_contents"))
    others = [one.name for one, _ in tensor.contents.ListFields() if raw is not None or one.name != field]
    if others:
        place = "raw_input_contents" if raw is not None else field
        raise InvalidRequest(
            f"input {short(name)} has {others[0]}; the data of its {kind} stand in {place}: give them once", param=name
        )
    if kind == "BYTES":
        return _text(name, _framed(name, raw) if raw is not None else _only(name, tensor.contents.bytes_contents))
    if raw is None:
        return _in_range(name, kind, _only(name, getattr(tensor.contents, field)))
    if len(raw) != struct.calcsize(form):
        raise InvalidRequest(
            f"input {short(name)} has {len(raw)} bytes; a {kind} has {struct.calcsize(form)}", param=name
        )
    (number,) = struct.unpack(form, raw)
    return number  # type: ignore[no-any-return]


def _in_range(name: str, kind: str, value: Value) -> Value:
    """Check a number of a field that holds larger ones than its data type does."""
    try:
        struct.pack(_NUMBERS[kind][0], value)
    except (struct.error, OverflowError):
        raise InvalidRequest(f"input {short(name)} is {short(value)}, which is no {kind}", param=name) from None
    return value


def _framed(name: str, raw: bytes) -> bytes:
    size = int.from_bytes(raw[:4], "little")
    if len(raw) < 4 or len(raw) != 4 + size:
        raise InvalidRequest(
            f"input {short(name)} has {len(raw)} bytes; BYTES have the length of a text in four bytes, then the text",
            param=name,
        )
    return raw[4:]


def _only(name: str, values: Sequence[Any]) -> Any:
    if len(values) != 1:
        raise InvalidRequest(f"input {short(name)} has {len(values)} values; must be one", param=name)
    return values[0]


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"input {short(name)} is no UTF-8 (byte {error.start}); encode it as UTF-8", param=name
        ) from None


def parameter_of(parameter: kserve_pb2.InferParameter) -> Value | None:
    """The value of a parameter; None: it has none."""
    which = parameter.WhichOneof("parameter_choice")
    return None if which is None else getattr(parameter, which)


def text_tensor(name: str, text: str) -> tuple[kserve_pb2.ModelInferResponse.InferOutputTensor, bytes]:
    """An output of one text, and its data."""
    data = text.encode("utf-8", "replace")
    tensor = kserve_pb2.ModelInferResponse.InferOutputTensor(name=name, datatype="BYTES", shape=[1])
    return tensor, len(data).to_bytes(4, "little") + data


def count_tensor(name: str, count: int) -> tuple[kserve_pb2.ModelInferResponse.InferOutputTensor, bytes]:
    """An output of one number of tokens, and its data."""
    tensor = kserve_pb2.ModelInferResponse.InferOutputTensor(name=name, datatype="UINT32", shape=[1])
    return tensor, count.to_bytes(4, "little")
