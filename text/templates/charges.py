"""Work limits of a template's render: sizes of values, and the meter that counts them. Knows no template.

A unit of work is one character. Each element of a container, number and text costs ELEMENT units more, because it takes
about 4 × ELEMENT bytes and more time than a character. So the live values of a render take at most about 4 bytes ×
`max_work` (160 MB). One operation of up to `max_step` units may hold the GIL: copying, joining or searching 16 M
characters takes about 10 ms; changing the case of 2 M non-ASCII characters, or 1 M elements, takes up to 100 ms.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from time import thread_time as _now_s  # computing: a busy machine must not refuse what a quiet one takes
from typing import Any

from jinja2.utils import Namespace

ELEMENT = 16
MAX_INT_BITS = 64
WRITTEN_GROWTH = 10  # a character in a list may be printed as "\U000e0001"
_CONTAINERS: tuple[type[Any], ...] = (list, tuple, set, frozenset, type({}.keys()), type({}.values()), type({}.items()))


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one render."""

    max_output_chars: int = 4_000_000
    max_work: int = 40_000_000  # units: loop rounds, and characters and elements made or read
    max_seconds: float = 2.0  # of computing, in one thread
    max_step: int = 16_000_000  # units of work in one operation


class LimitExceeded(Exception):
    """A render exceeded its limits."""


class Meter:
    """Counter of the work that one render may still do."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._work_left = limits.max_work
        self._max_step = min(limits.max_step, limits.max_work)
        self._ends_s = _now_s() + limits.max_seconds

    def charge(self, work: int) -> None:
        """Subtract `work` from the remaining work; call it before the operation."""
        if work > self._max_step:
            raise LimitExceeded(f"more than {self._max_step} steps and characters of work in one operation")
        self._work_left -= work
        if self._work_left < 0:
            raise LimitExceeded(f"more than {self._limits.max_work} steps and characters of work")
        if _now_s() > self._ends_s:
            raise LimitExceeded(f"more than {self._limits.max_seconds:g} s of computing")

    def foresee(self, work: int) -> None:
        """Refuse an operation whose worst case exceeds the remaining work; subtracts nothing."""
        self.charge(work)
        self._work_left += work

    def charge_size(self, value: Any) -> int:
        """Charge the size of `value` as if written out (shared parts count each time), and return it."""
        size = ELEMENT + len(value) if type(value) is str else size_of(value, min(self._work_left, self._max_step))
        self.charge(size)
        return size

    def charge_written(self, value: Any, growth: int = 1) -> int:
        """Charge the size of a value that is converted to text. `growth`: largest output characters per character."""
        size = self.charge_size(value)
        if not isinstance(value, str):
            growth *= WRITTEN_GROWTH
        if growth > 1:
            self.foresee(growth * size)
        return size

    def ticking(self, values: Iterable[Any], work: int = ELEMENT) -> Iterator[Any]:
        """Yield the same values, and charge `work` for each."""
        for value in values:
            self.charge(work)
            yield value

    def taken(self, values: Any) -> Any:
        """Return the same values in a container, and charge their size."""
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
    """Size of `value` as if written out. Counting stops above `at_most`, because nested copies can be huge."""
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
        elif isinstance(one, dict):  # dict's own methods: counting must not mark fields of a message as read
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
    """Return `value`; raises LimitExceeded for an integer of more than MAX_INT_BITS bits."""
    if isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
        raise LimitExceeded(f"an integer of more than {MAX_INT_BITS} bits")
    return value


def _attributes(namespace: Namespace) -> Any:
    return object.__getattribute__(namespace, "_Namespace__attrs")
