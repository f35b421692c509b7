"""A plan in which every sequence of the one before decodes its next token: by columns, for sender and receiver. Pure.

    steady step   "S" | message, step, number of tokens, number of growth words | tokens | growths
    growth        row, number of blocks, the blocks, their generations

Most steps of a busy engine are of this kind. Work per sequence is done by tuples as a whole, which takes a quarter of
the time of comparing and making steps one by one (bench/plans.py).
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from functools import partial
from typing import Any

from ...kv.block import BlockId
from ..plan import SequenceStep, StepPlan
from .wire import WireError

STEADY = b"S"
_HEAD = struct.Struct("<cQQII")
_TOKENS, _GROWTHS = "I", "q"  # codes of `array`: both ends are processes of one machine

Columns = tuple[Any, ...]
"""The fields of the steps of a plan: one tuple or list per field of `SequenceStep`."""

_make_step = partial(tuple.__new__, SequenceStep)


class Steady:
    """The steps of the last message, at one end of a link."""

    def __init__(self) -> None:
        self._columns: Columns = ()
        self._steps: Sequence[SequenceStep] = ()
        self._plain: Columns = ()

    @property
    def steps(self) -> Sequence[SequenceStep]:
        """The steps of the last message."""
        return self._steps

    def set(self, steps: Sequence[SequenceStep]) -> None:
        """Begin again with the steps of a message of another kind."""
        self._steps, self._columns = steps, tuple(zip(*steps, strict=True))
        n = len(steps)
        # seals_tail, from_place, draft_ids, history, targets
        self._plain = (False,) * n, (None,) * n, ((),) * n, (None,) * n, ((),) * n

    def put(self, message: int, plan: StepPlan) -> bytes | None:
        """The message of a plan; None: it is not steady, and nothing has changed here."""
        if not self._columns:
            return None
        now, last = tuple(zip(*plan.sequences, strict=True)), self._columns
        if not now or now[0] != last[0]:
            return None
        _, starts, ids, tables, uses, samples, params, numbers, tails, places, adapters, *rest = now
        if (
            (tails, places, *rest) != self._plain
            or adapters != last[10]
            or params != last[6]
            or not all(samples)
            or set(map(len, ids)) != {1}
            or list(starts) != _next_starts(last)
            or list(numbers) != [number + 1 for number in last[7]]
        ):
            return None
        growths = _growths(tables, uses, last)
        if growths is None:
            return None
        try:
            tokens = array(_TOKENS, [each[0] for each in ids])
        except OverflowError:
            return None
        self._steps, self._columns = plan.sequences, now
        head = _HEAD.pack(STEADY, message, plan.step, len(tokens), len(growths))
        return head + tokens.tobytes() + growths.tobytes()

    def message(self, data: bytes) -> int:
        """Number of a message.

        Raises:
            WireError: the bytes are cut.
        """
        try:
            number: int = _HEAD.unpack_from(data)[1]
        except struct.error as error:
            raise WireError(f"a plan is cut: {error}") from None
        return number

    def get(self, data: bytes) -> StepPlan:
        """The plan of a message.

        Raises:
            WireError: it does not fit the steps of the message before.
        """
        _, _, number, num_tokens, num_words = _HEAD.unpack_from(data)
        tokens, growths = array(_TOKENS), array(_GROWTHS)
        middle = _HEAD.size + num_tokens * tokens.itemsize
        if len(data) != middle + num_words * growths.itemsize or num_tokens != len(self._steps):
            raise WireError(f"a steady plan of {num_tokens} sequences in {len(data)} bytes after {len(self._steps)}")
        tokens.frombytes(data[_HEAD.size : middle])
        growths.frombytes(data[middle:])
        last = self._columns
        if not last:
            return StepPlan(number, ())
        keys, _, _, tables, uses, _, params, numbers, _, _, adapters, *_ = last
        tails, places, drafts, histories, targets = self._plain
        if growths:
            tables, uses = _grown(growths, list(tables), list(uses))
        now = (
            *(keys, _next_starts(last), list(zip(tokens, strict=True)), tables, uses, (True,) * num_tokens, params),
            *([number + 1 for number in numbers], tails, places, adapters, drafts, histories, targets),
        )
        steps: tuple[SequenceStep, ...] = tuple(map(_make_step, zip(*now, strict=True)))
        self._steps, self._columns = steps, now
        return StepPlan(number, steps)


def _next_starts(last: Columns) -> list[int]:
    return [start + len(ids) for start, ids in zip(last[1], last[2], strict=True)]


def _growths(tables: Columns, uses: Columns, last: Columns) -> array[int] | None:
    """Blocks that were added at the ends of tables; None: a table has changed in another way."""
    found = array(_GROWTHS)
    for row, (table, before, now, past) in enumerate(zip(tables, last[3], uses, last[4], strict=True)):
        if table is before and now is past:
            continue
        count, used = len(before), len(past)
        if table[:count] != before or now[:used] != past or len(table) - count != len(now) - used:
            return None
        if len(table) > count:
            try:
                found.extend((row, len(table) - count, *table[count:], *now[used:]))
            except OverflowError:
                return None
    return found


def _grown(growths: array[int], tables: list[Any], uses: list[Any]) -> tuple[list[Any], list[Any]]:
    """Tables and generations with the blocks that were added.

    Raises:
        WireError: a growth is cut, or of no sequence.
    """
    at = 0
    while at < len(growths):
        row, count = growths[at], growths[at + 1] if at + 1 < len(growths) else 0
        middle, end = at + 2 + count, at + 2 + 2 * count
        if count < 1 or end > len(growths) or not 0 <= row < len(tables):
            raise WireError("a growth is cut")
        tables[row] += tuple(map(BlockId, growths[at + 2 : middle]))
        uses[row] += tuple(growths[middle:end])
        at = end
    return tables, uses
