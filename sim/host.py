"""Host memory of a simulated worker: cells of swapped sequences, each hash block with its seal. Knows no scheduler."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..kv.spec import HASH_BLOCK_TOKENS
from ..model.store_op import SwapInOp, SwapOutOp
from .invariants import Violation


@dataclass(frozen=True, slots=True)
class SealedCells:
    """One hash block of a sequence, perhaps its partial last one."""

    unit: int  # which of the sequence
    cells: tuple[int, ...]
    digest: int


class Host:
    """Host blocks by place; every access says in which use."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._held: dict[tuple[int, int], tuple[int, SealedCells]] = {}  # by host block and place in it: use, what

    def put(self, op: SwapOutOp, units: Iterable[SealedCells]) -> None:
        """Copied out."""
        for sealed in units:
            block, place, use = self._place(op, sealed.unit)
            self._held[block, place] = (use, sealed)

    def get(self, op: SwapInOp) -> list[SealedCells]:
        """What lies there for `op`.

        Raises:
            Violation: a host block is asked for in a use that is not the one it was filled in.
        """
        found = []
        stop = op.token_start + op.token_count
        for unit in range(op.token_start // HASH_BLOCK_TOKENS, -(-stop // HASH_BLOCK_TOKENS)):
            block, place, use = self._place(op, unit)
            filled, sealed = self._held.get((block, place), (None, None))
            if sealed is None or filled != use or sealed.unit != unit:
                raise Violation("K3", f"{op.key} takes hash block {unit} from host block {block}, which is another's")
            found.append(sealed)
        return found

    def _place(self, op: SwapOutOp | SwapInOp, unit: int) -> tuple[int, int, int]:
        index, offset = divmod(unit * HASH_BLOCK_TOKENS, self._block_tokens)
        return op.host_table[index], offset, op.host_generations[index]
