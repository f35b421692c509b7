"""Sizes of a template's values, and the meter that a render pays them from. Knows no template.

A unit of work is one character. An element of a container, a number, a text cost ELEMENT units more, as they take
about 4 × ELEMENT bytes and more than a character's time. So what a render keeps alive is at most about 4 bytes ×
`max_work` (160 MB). One operation of `max_step` units may hold the interpreter's lock: 16 M characters copied, joined
or searched take about 10 ms, 2 M characters of upper case that is not ASCII, or 1 M elements, up to 100 ms.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from time import monotonic as _now_s
from typing import Any

from jinja2.utils import Namespace

ELEMENT = 16
MAX_INT_BITS = 64
WRITTEN_GROWTH = 10  # a character in a list may be printed as "\U000e0001"
_CONTAINERS: tuple[type[Any], ...] = (list, tuple, set, frozenset, type({}.keys()), type({}.values()), type({}.items()))


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one render may take."""

    max_output_chars: int = 4_000_000
    max_work: int = 40_000_000  # loop rounds, and characters and elements made or looked at
    max_seconds: float = 2.0
    max_step: int = 16_000_000  # of work in one operation


class LimitExceeded(Exception):
    """A render took more than its limits allow."""


class Meter:
    """What one render may still take."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._work_left = limits.max_work
        self._max_step = min(limits.max_step, limits.max_work)
        self._ends_s = _now_s() + limits.max_seconds

    def charge(self, work: int) -> None:
        """Take `work` off what is left; before the operation that it is for."""
        if work > self._max_step:
            raise LimitExceeded(f"more than {self._max_step} steps and characters of work in one operation")
        self._work_left -= work
        if self._work_left < 0:
            raise LimitExceeded(f"more than {self._limits.max_work} steps and characters of work")
        if _now_s() > self._ends_s:
            raise LimitExceeded(f"more than {self._limits.max_seconds:g} s")

    def foresee(self, work: int) -> None:
        """Refuse an operation whose worst case is more than what is left, and take nothing."""
        self.charge(work)
        self._work_left += work

    def charge_size(self, value: Any) -> int:
        """Charge `value` as large as it is written out, and return that size."""
        size = ELEMENT + len(value) if type(value) is str else size_of(value, min(self._work_left, self._max_step))
        self.charge(size)
        return size

    def charge_written(self, value: Any, growth: int = 1) -> int:
        """Charge the size of `value`, of which a text is about to be made; `growth`: characters per character."""
        size = self.charge_size(value)
        if not isinstance(value, str):
            growth *= WRITTEN_GROWTH
        if growth > 1:
            self.foresee(growth * size)
        return size

    def ticking(self, values: Iterable[Any], work: int = ELEMENT) -> Iterator[Any]:
        """The same values; each is charged `work` when it is taken."""
        for value in values:
            self.charge(work)
            yield value

    def taken(self, values: Any) -> Any:
        """The same values in a container, charged as large as they are."""
        if isinstance(values, str):
            self.charge(ELEMENT * len(values))
        elif isinstance(values, (list, tuple, Mapping)):
            self.charge_size(values)
        else:
            found = []
            for value in values:
                self.charge_size(value)
                found.append(value)
            return found
        return values


def size_of(value: Any, at_most: int) -> int:
    """The size of `value` as it is written out; counting stops above `at_most`, as nested copies can be endless."""
    if isinstance(value, str):
        return ELEMENT + len(value)
    size = 0
    waiting = [value]
    while waiting and size <= at_most:
        one = waiting.pop()
        size += ELEMENT
        if isinstance(one, (str, bytes)):
            size += len(one)
        elif one is None or isinstance(one, (bool, int, float)):
            continue
        elif isinstance(one, dict):  # its own methods: looking at the size of a message reads nothing of it
            waiting.extend(dict.keys(one))
            waiting.extend(dict.values(one))
        elif isinstance(one, _CONTAINERS):
            if ELEMENT * len(one) > at_most:
                return size + ELEMENT * len(one)
            waiting.extend(one)
        elif isinstance(one, Namespace):
            waiting.append(_attributes(one))
    return size


def checked(value: Any) -> Any:
    """`value`, unless it is too large an integer."""
    if isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
        raise LimitExceeded(f"an integer of more than {MAX_INT_BITS} bits")
    return value


def _attributes(namespace: Namespace) -> Any:
    return object.__getattribute__(namespace, "_Namespace__attrs")
