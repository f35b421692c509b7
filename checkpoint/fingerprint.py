"""Fingerprint of a checkpoint: choice of the bytes of a file that are hashed. Knows places of tensors, no format.

Small files and small tensors are hashed completely. Of a large tensor one page per 2 MiB is hashed, including its first
and its last page: 2 MB are read per GB, so that 16 GB take less than a second from a fast disk. So two checkpoints have
different fingerprints if any of their tensors was trained, merged or rounded differently, or if 2 MiB in a row differ.
A few numbers that were edited by hand inside a large tensor may not be noticed: give such a checkpoint another file
name, which is hashed too.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

WHOLE_FILE_BYTES = 64 << 20  # files up to this size are hashed completely
WHOLE_TENSOR_BYTES = 64 << 10
SPACING_BYTES = 2 << 20
PAGE_BYTES = 4096


def hash_content(hasher: hashlib.blake2b, path: Path, tensors: Iterable[range]) -> None:
    """Add a file's content to the hash. `tensors`: byte ranges of the tensors in the file."""
    size = path.stat().st_size
    parts = _pieces(range(size), 1 << 20) if size <= WHOLE_FILE_BYTES else counted(tensors)
    file = os.open(path, os.O_RDONLY)
    try:
        for part in parts:
            hasher.update(os.pread(file, len(part), part.start))
    finally:
        os.close(file)


def counted(tensors: Iterable[range]) -> Iterator[range]:
    """Byte ranges of a large file that are hashed, in order of the tensors."""
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
