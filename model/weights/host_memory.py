"""Gives memory back to the system that loading a model took for a while. Knows addresses, no weights."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterable
from pathlib import Path

_MADV_DONTNEED = 4

_log = logging.getLogger(__name__)


def give_back_after_load(files: Iterable[Path]) -> None:
    """Let go of the pages of mapped files, and of memory that was freed.

    Pages of a file come back from it when they are touched again; a packed copy of most of them stays here. Where the
    system offers neither, nothing happens: it only costs memory.
    """
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        for start, size in _mappings({str(path.resolve()) for path in files}):
            if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _MADV_DONTNEED):
                _log.debug("madvise: errno %d", ctypes.get_errno())
        libc.malloc_trim(0)
    except (OSError, AttributeError) as error:
        _log.debug("memory is not given back: %s", error)


def _mappings(paths: set[str]) -> list[tuple[int, int]]:
    """Where these files are mapped unwritten: address and size."""
    found = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] in paths:
            start, _, end = fields[0].partition("-")
            found.append((int(start, 16), int(end, 16) - int(start, 16)))
    return found
