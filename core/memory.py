"""How this process gives memory back to the system. Knows glibc, and does nothing elsewhere."""

from __future__ import annotations

import ctypes

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _ARENA_MAX = -3, -1, -8  # Source: malloc.h of glibc
LARGE_BYTES = 256 << 10
MAX_ARENAS = 2


def give_large_memory_back() -> None:
    """From now on what is large returns to the system when it is freed, and no thread keeps a heap of its own.

    glibc keeps freed blocks of up to 32 MiB once it has seen such a block, per thread: a process that reads a message
    of some MiB now and then would grow by several of them.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_MMAP_THRESHOLD, LARGE_BYTES)
    mallopt(_TRIM_THRESHOLD, LARGE_BYTES)
    mallopt(_ARENA_MAX, MAX_ARENAS)
