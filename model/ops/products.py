"""Matrix products whose bits do not depend on the number of rows in a call. Knows shapes, no model.

A library chooses its kernel, and so its order of summation, by the shape of a product: the result of one row alone and
of the same row among a thousand may differ in the last bits. Here the *definition* of a product is the library's result
for a tile of 16 rows on one thread. Faster forms (more rows per call, several matrices per call, several threads) are
used only in fixed shapes for which `prove` found the definition's bits on this machine. Products of any size are
composed of those shapes.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from ...core.errors import ConfigError

TILE_ROWS = 16
_ROW_STEPS = (1024, 256, 64)  # candidates for rows per call
_BATCH_STEPS = (64, 16, 4)  # candidates for matrices of one tile per call

_log = logging.getLogger(__name__)


def padded(num_rows: int) -> int:
    """`num_rows` rounded up to whole tiles."""
    return -(-num_rows // TILE_ROWS) * TILE_ROWS


class Product:
    """Product `x @ right` for one shape of `right`: [inner, columns], stored by rows or (`transposed`) by columns."""

    def __init__(self, inner: int, columns: int, dtype: torch.dtype, *, transposed: bool) -> None:
        self.columns = columns
        self.row_steps, self.batch_steps = prove(inner, columns, dtype, transposed, torch.get_num_threads())

    def rows(self, x: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
        """Multiply x [rows, inner] (rows % 16 == 0) by right [inner, columns]; out [rows, columns] contiguous."""
        result = x.new_empty(x.shape[0], self.columns) if out is None else out
        done = 0
        for step in (*self.row_steps, TILE_ROWS):
            while x.shape[0] - done >= step:
                torch.mm(x[done : done + step], right, out=result[done : done + step])
                done += step
        return result

    def batch(self, x: Tensor, right: Tensor) -> Tensor:
        """Multiply one tile per matrix: x [batch, 16, inner], right [batch, inner, columns]; [batch, 16, columns]."""
        result = x.new_empty(x.shape[0], TILE_ROWS, self.columns)
        done = 0
        for step in self.batch_steps:
            while x.shape[0] - done >= step:
                part = slice(done, done + step)
                torch.bmm(x[part], right[part], out=result[part])
                done += step
        for index in range(done, x.shape[0]):
            torch.mm(x[index], right[index], out=result[index])
        return result


@functools.cache
def prove(
    inner: int, columns: int, dtype: torch.dtype, transposed: bool, num_threads: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Find the row steps and batch steps that give the definition's bits on this machine with this many threads.

    Shape and layout determine the kernel and its order of summation, not the numbers. With random numbers a different
    order is visible at once, because thousands of sums could differ.

    Raises:
        ConfigError: already one tile depends on the thread count or on a row's place in the tile.
    """
    generator = torch.Generator().manual_seed(inner * 1_000_003 + columns)
    tall = max(_ROW_STEPS) if columns <= 8192 else 64  # fewer rows for a vocabulary's columns: the test is slow
    x = torch.randn(tall, inner, generator=generator).to(dtype)
    right = _right((1, inner, columns), dtype, transposed, generator)[0]
    torch.set_num_threads(1)
    definition = _by_rows(x, right, TILE_ROWS)
    few = x[: 4 * TILE_ROWS]
    turned = _by_rows(few.roll(5, 0), right, TILE_ROWS).roll(-5, 0)
    torch.set_num_threads(num_threads)
    threaded = _by_rows(few, right, TILE_ROWS)
    if not (torch.equal(definition[: len(few)], turned) and torch.equal(turned, threaded)):
        raise ConfigError(
            f"the {dtype} product of 16 x {inner} by {inner} x {columns} is not reproducible on this machine with "
            f"{num_threads} threads: set step.num_threads to 1"
        )
    row_steps = tuple(s for s in _ROW_STEPS if s <= tall and torch.equal(definition, _by_rows(x, right, s)))
    batch_steps: tuple[int, ...] = ()
    if inner * columns <= 1 << 18:  # only attention multiplies in batches
        rights = _right((max(_BATCH_STEPS), inner, columns), dtype, transposed, generator)
        tiles = x[: TILE_ROWS * len(rights)].view(-1, TILE_ROWS, inner)
        alone = torch.stack([_by_rows(tile, right, TILE_ROWS) for tile, right in zip(tiles, rights, strict=True)])
        batch_steps = tuple(s for s in _BATCH_STEPS if torch.equal(alone[:s], torch.bmm(tiles[:s], rights[:s])))
    _log.debug("product %dx%d %s: rows %s, batches %s", inner, columns, dtype, row_steps, batch_steps)
    return row_steps, batch_steps


def _right(shape: tuple[int, int, int], dtype: torch.dtype, transposed: bool, generator: torch.Generator) -> Tensor:
    batch, inner, columns = shape
    right = torch.randn((batch, columns, inner) if transposed else shape, generator=generator).to(dtype)
    return right.transpose(1, 2) if transposed else right


def _by_rows(x: Tensor, right: Tensor, step: int) -> Tensor:
    result = x.new_empty(x.shape[0], right.shape[1])
    for start in range(0, x.shape[0], step):
        torch.mm(x[start : start + step], right, out=result[start : start + step])
    return result
