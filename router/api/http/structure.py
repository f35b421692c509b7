"""Parser of JSON requests: checks bounds before any Python value is built, and builds in slices. Knows no field.

`json` builds a value in one uninterruptible call, whose time and memory depend on the number of values, not of bytes.
So the raw bytes are scanned first for marks outside strings, and long lists and objects are built in runs of members.
The driver of the generators can do other work between two steps.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ....core.errors import InvalidRequest
from ..checks import refuse_constant

SLICE_BYTES = 64 << 10  # scanned or built per step, in a few milliseconds; a text of one slice is built at once
MAX_DEPTH = 64  # arguments of tool calls nest up to 32
MAX_CONTAINERS = 32_768  # 2,048 messages with several parts and tool calls each
MAX_KEYS = 65_536
MAX_COMMAS = 640_000  # token ids of a prompt of 512 Ki tokens, and other fields

T = TypeVar("T")

_OPEN, _CLOSE, _COMMA, _COLON = 1, 2, 3, 4
_KIND = np.zeros(256, np.uint8)
for _kind, _chars in ((_OPEN, b"[{"), (_CLOSE, b"]}"), (_COMMA, b","), (_COLON, b":")):
    _KIND[list(_chars)] = _kind
_STEP = np.array([0, 1, -1, 0, 0], np.int32)
_QUOTE = ord('"')
_PAIRS = {ord("["): b"]", ord("{"): b"}"}


@dataclass(frozen=True, slots=True)
class Bounds:
    """Largest numbers of lists and objects, of keys, of commas, and of nesting levels in one text."""

    containers: int = MAX_CONTAINERS
    keys: int = MAX_KEYS
    commas: int = MAX_COMMAS
    depth: int = MAX_DEPTH


@dataclass(frozen=True, slots=True)
class Marks:
    """Brackets, braces, commas and colons outside strings, in order. All arrays: [num_marks]."""

    places: npt.NDArray[np.signedinteger[Any]]  # byte offset; 32 bits
    kinds: npt.NDArray[np.uint8]
    depths: npt.NDArray[np.int32]  # nesting depth after the mark: an opening mark has the depth of its members


def finished(steps: Generator[None, None, T]) -> T:
    """Run a generator to its result at once."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


def check(text: str, bounds: Bounds) -> None:
    """Check the bounds of a JSON text that will be built at once.

    Raises:
        InvalidRequest: it exceeds a bound.
    """
    finished(scanned(text.encode(errors="replace"), bounds))


def num_containers(text: str) -> int:
    """Number of lists and objects in a JSON text; MAX_CONTAINERS + 1 if there are more."""
    try:
        marks = finished(scanned(text.encode(errors="replace"), Bounds(keys=1 << 30, commas=1 << 30, depth=1 << 30)))
    except InvalidRequest:
        return MAX_CONTAINERS + 1
    return int(np.count_nonzero(marks.kinds == _OPEN))


def built(data: bytes | bytearray, bounds: Bounds | None = None) -> Generator[None, None, Any]:
    """Build the value of a JSON text in UTF-8; a text of one slice is not scanned, because it is small.

    Raises:
        InvalidRequest: it exceeds a bound; no value was built.
        ValueError, RecursionError: it is not JSON; the errors of `json.loads`.
    """
    if len(data) <= SLICE_BYTES:
        return _loads(data)
    marks = yield from scanned(data, bounds or Bounds())
    value = yield from _Builder(data, marks).value(0, len(data), 0, len(marks.places))
    return value


def scanned(data: bytes | bytearray, bounds: Bounds) -> Generator[None, None, Marks]:
    """Find the marks of a text.

    Raises:
        InvalidRequest: it exceeds a bound; the rest of the text is not scanned.
    """
    found: list[Marks] = []
    num = np.zeros(5, np.int64)  # marks of each kind so far
    depth, is_inside, is_escaped = 0, False, False
    for start in range(0, len(data), SLICE_BYTES):
        part = bytes(data[start : start + SLICE_BYTES])
        if is_escaped:
            part = b"." + part[1:]
        if b"\\" in part:
            part = part.replace(b"\\\\", b"..").replace(b'\\"', b"..")
        is_escaped = part.endswith(b"\\")
        chars = np.frombuffer(part, np.uint8)
        inside = np.logical_xor.accumulate(chars == _QUOTE) ^ is_inside
        is_inside = bool(inside[-1])
        places = np.flatnonzero((_KIND[chars] > 0) & ~inside)
        if places.size:
            kinds = _KIND[chars[places]]
            depths: npt.NDArray[np.int32] = (depth + np.cumsum(_STEP[kinds])).astype(np.int32)
            num += np.bincount(kinds, minlength=5)
            depth = int(depths[-1])
            _check(bounds, num, int(depths.max()))
            found.append(Marks((places + start).astype(np.int32), kinds, depths))
        yield
    if not found:
        return Marks(np.zeros(0, np.int32), np.zeros(0, np.uint8), np.zeros(0, np.int32))
    places = np.concatenate([part.places for part in found])
    yield
    kinds, depths = np.concatenate([part.kinds for part in found]), np.concatenate([part.depths for part in found])
    yield
    return Marks(places, kinds, depths)


def _check(bounds: Bounds, num: npt.NDArray[np.int64], depth: int) -> None:
    held = (
        (int(num[_OPEN]), bounds.containers, "lists and objects"),
        (int(num[_COLON]), bounds.keys, "keys of objects"),
        (int(num[_COMMA]), bounds.commas, "items of lists and objects"),
        (depth, bounds.depth, "levels of lists and objects within each other"),
    )
    for count, most, what in held:
        if count > most:
            raise InvalidRequest(f"the JSON holds {count} {what} or more; at most {most} are taken: send less at once")


class _Builder:
    """Builds the values of one scanned text. Bytes are [low, high), marks [first, last)."""

    def __init__(self, data: bytes | bytearray, marks: Marks) -> None:
        self._data = data
        self._marks = marks

    def value(self, low: int, high: int, first: int, last: int) -> Generator[None, None, Any]:
        """Build one value; a long list or object is built in runs of members, each of one slice or one member."""
        data, marks = self._data, self._marks
        if high - low <= SLICE_BYTES or first == last:
            return _loads(data[low:high], low)
        yield
        opening, closing = int(marks.places[first]), int(marks.places[last - 1])
        closes = marks.kinds[last - 1] == _CLOSE and marks.depths[last - 1] == marks.depths[first] - 1
        is_whole = not bytes(data[low:opening] + data[closing + 1 : high]).strip(b" \t\r\n")
        if not (closes and is_whole and _PAIRS.get(data[opening]) == data[closing : closing + 1]):
            raise ValueError(f"a value that begins at byte {low} is not one list or object")
        inner = slice(first, last)
        is_own = (marks.kinds[inner] == _COMMA) & (marks.depths[inner] == marks.depths[first])
        commas = first + np.flatnonzero(is_own)
        ends = np.append(marks.places[commas], closing)
        edges = np.concatenate(([first], commas, [last - 1]))  # marks around each member
        yield
        is_list = data[opening] == ord("[")
        items: list[Any] = []
        fields: dict[str, Any] = {}
        member = 0
        while member < len(ends):
            start = int(marks.places[edges[member]]) + 1
            behind = max(member + 1, int(np.searchsorted(ends, start + SLICE_BYTES, side="right")))
            end = int(ends[behind - 1])
            if end - start <= SLICE_BYTES:
                run = _loads(data[opening : opening + 1] + data[start:end] + data[closing : closing + 1], start - 1)
                if not run and len(ends) > 1:
                    raise ValueError(f"a value is missing at byte {start}")
            else:
                run = yield from self._member(start, end, int(edges[member]) + 1, int(edges[behind]), is_list)
            items.extend(run) if is_list else fields.update(run)
            member = behind
            yield
        return items if is_list else fields

    def _member(self, start: int, end: int, first: int, last: int, is_list: bool) -> Generator[None, None, Any]:
        """Build one long member; returns it in a list or object with one member."""
        if is_list:
            value = yield from self.value(start, end, first, last)
            return [value]
        if first == last or self._marks.kinds[first] != _COLON:
            raise ValueError(f"a key and a colon are missing at byte {start}")
        colon = int(self._marks.places[first])
        key = _loads(self._data[start:colon], start)
        if not isinstance(key, str):
            raise ValueError(f"the key at byte {start} is not a string")
        value = yield from self.value(colon + 1, end, first + 1, last)
        return {key: value}


def _loads(data: bytes | bytearray, offset: int = 0) -> Any:
    try:
        return json.loads(data.decode(), parse_constant=refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg}: about byte {offset + error.pos}") from None
    except UnicodeDecodeError as error:
        start = offset + error.start
        raise UnicodeDecodeError(error.encoding, b"", start, start + 1, error.reason) from None
    except ValueError as error:
        if "set_int_max_str_digits" in str(error):  # Python's message has a remedy that a client cannot use
            raise ValueError(f"a number has more than {sys.get_int_max_str_digits()} digits") from None
        raise
