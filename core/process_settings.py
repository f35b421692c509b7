"""Settings of a process that serves: glibc's malloc (no effect without glibc), Python's collector and its threads."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _ARENA_MAX = -3, -1, -8  # Source: malloc.h of glibc
LARGE_BYTES = 256 << 10
MAX_ARENAS = 2
SWITCH_S = 0.0005  # longest wait of a thread for another one that runs Python; 5 ms by default


def give_large_memory_back() -> None:
    """Let freed blocks of `LARGE_BYTES` and more return to the system, and bound the heaps to `MAX_ARENAS`.

    By default glibc raises its threshold up to 32 MiB once it frees such a block, and has heaps per thread: a process
    that sometimes reads a message of some MiB would keep several blocks of that size.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_MMAP_THRESHOLD, LARGE_BYTES)
    mallopt(_TRIM_THRESHOLD, LARGE_BYTES)
    mallopt(_ARENA_MAX, MAX_ARENAS)


@contextmanager
def uncollected() -> Iterator[None]:
    """Import modules in this block: no collection runs, and later ones skip the objects that exist at its end.

    Modules stay for good, and importing them starts collections over all that were imported before: with torch that is
    a sixth of the time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def keep_present_objects() -> None:
    """Collect once, then let all later collections skip the objects that exist now; call it when a process is ready.

    A whole collection holds the interpreter, and so every stream: 126 ms in a worker, mostly over torch's objects.
    """
    gc.collect()
    gc.freeze()


def switch_often() -> None:
    """Let threads take the interpreter from each other after `SWITCH_S`.

    A thread gives it away at every call of the system and of a kernel, and waits so long to get it back if another one
    computes in Python: an event loop with 24 streams, or a step of the engine, waits some ten times.
    """
    sys.setswitchinterval(SWITCH_S)
