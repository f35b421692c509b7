"""Meeting point of the two ranks of a paired channel: each side has a copy, entries travel on the control stream.

torch's own store would listen on a port of its own, which anybody may connect to. The control stream is a call inside
the cluster, with its proof or certificates. Knows no message.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed

_dist: Any = torch.distributed  # its stubs leave out stores


class PairStore(_dist.Store):  # type: ignore[misc]
    """One side's copy. The library calls `set`, `get` and `wait` in its thread, the control stream `put` in its own."""

    def __init__(self, patience_s: float, told: Callable[[str, bytes], None]) -> None:
        """`told`: called with each entry that this side sets, in the library's thread."""
        super().__init__()
        self._patience_s = patience_s
        self._told = told
        self._entries: dict[str, bytes] = {}
        self._changed = threading.Condition()

    def put(self, key: str, value: bytes) -> None:
        """Take an entry of the other side."""
        with self._changed:
            self._entries[key] = value
            self._changed.notify_all()

    def set(self, key: str, value: bytes) -> None:
        """Set an entry, here and on the other side."""
        self.put(key, bytes(value))
        self._told(key, bytes(value))

    def get(self, key: str) -> bytes:
        """The entry of a key.

        Raises:
            RuntimeError: it does not come within the patience.
        """
        self.wait([key])
        return self._entries[key]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Wait until all keys have entries.

        Raises:
            RuntimeError: they do not come within `timeout`, at most the patience.
        """
        longest_s = self._patience_s if timeout is None else min(timeout.total_seconds(), self._patience_s)
        with self._changed:
            if not self._changed.wait_for(lambda: all(key in self._entries for key in keys), longest_s):
                raise RuntimeError(f"the other rank did not come within {longest_s:g} s")
