"""Cache of a pure function's results, keyed by object identity. Knows no sampling."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Key = TypeVar("Key")
Made = TypeVar("Made")

MAX_VALUES = 1024  # results kept; steps rarely have more sequences


class Memo(Generic[Key, Made]):
    """Results of a pure function for the most recently used objects, found by identity.

    Hashing a long tuple at every step would cost as much as the cache saves.
    """

    def __init__(self, make: Callable[[Key], Made]) -> None:
        self._make = make
        self._known: OrderedDict[int, tuple[Key, Made]] = OrderedDict()

    def of(self, key: Key) -> Made:
        """Result of the function for `key`, which must not change."""
        known = self._known.get(id(key))
        if known is None or known[0] is not key:
            known = (key, self._make(key))
            self._known[id(key)] = known
        self._known.move_to_end(id(key))
        while len(self._known) > MAX_VALUES:
            self._known.popitem(last=False)
        return known[1]
