"""A checkpoint's numbers as a name: which of a file's bytes count. Knows where tensors lie, no format.

Small files and small tensors count whole. Of a large tensor one page in 2 MiB counts, its first and its last among
them: 2 MB are read per GB, so that 16 GB take less than a second from a disk that is quick at it. So two checkpoints
have different names if any tensor of theirs was trained, merged or rounded differently, and if 2 MiB in a row differ
anywhere. A few numbers that somebody changed by hand within a large tensor may go unseen: give such a checkpoint
another file name, which counts too.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

WHOLE_FILE_BYTES = 64 << 20  # files up to this size are hashed whole
WHOLE_TENSOR_BYTES = 64 << 10
SPACING_BYTES = 2 << 20
PAGE_BYTES = 4096


def hash_content(hasher: hashlib.blake2b, path: Path, tensors: Iterable[range]) -> None:
    """Add a file's content. `tensors`: the places in it that each of them takes, in bytes."""
    size = path.stat().st_size
    parts = _pieces(range(size), 1 << 20) if size <= WHOLE_FILE_BYTES else counted(tensors)
    file = os.open(path, os.O_RDONLY)
    try:
        for part in parts:
            hasher.update(os.pread(file, len(part), part.start))
    finally:
        os.close(file)


def counted(tensors: Iterable[range]) -> Iterator[range]:
    """The places of a large file that count, in order of the tensors."""
    for tensor in sorted(tensors, key=lambda place: place.start):
        if len(tensor) <= WHOLE_TENSOR_BYTES:
            yield tensor
            continue
        last = -(-len(tensor) // SPACING_BYTES)
        for page in range(last + 1):
            start = tensor.start + (len(tensor) - PAGE_BYTES) * page // last
            yield range(start, start + PAGE_BYTES)


def _pieces(whole: range, size: int) -> Iterator[range]:
    for start in range(whole.start, whole.stop, size):
        yield range(start, min(start + size, whole.stop))
