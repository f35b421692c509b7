"""Returns memory to the system that only the loading of a model needed. Knows addresses, no weights."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterable
from pathlib import Path

_MADV_DONTNEED = 4

_log = logging.getLogger(__name__)


def give_back_after_load(files: Iterable[Path]) -> None:
    """Release the pages of mapped files, and freed memory.

    The system reads a page again when it is used; for most pages the process keeps a packed copy. On a system without
    these calls nothing happens, and the process uses more memory.
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
    """Address and size of each mapping of these files in this process."""
    found = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] in paths:
            start, _, end = fields[0].partition("-")
            found.append((int(start, 16), int(end, 16) - int(start, 16)))
    return found
