"""Host blocks of swapped sequences, and the choice between swap and recomputation. Pure: integers only, no bytes.

    device  | shared | own: s0 s1 s2 | t |     preempted: own blocks and the partial tail go to host blocks,
    host             | h5 h1 h7 | h2 |         with their seals; the device blocks are given back
    device  | found again | fresh blocks |     back: the part in the prefix cache is shared again, the rest copied

The host blocks are another `BlockPool`, without a prefix cache; generations have the same meaning as on the device.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ..kv.block import BlockId
from ..kv.cache.pool import BlockPool
from .sequence import Sequence, Swapped, Table


@dataclass(frozen=True, slots=True)
class SwapRule:
    """Cost of one swap (out, in, and the check of its digests), in prefill tokens of the same duration.

    Unshared blocks count as lost by a recomputation: after the preemption they are free, and free blocks are short.
    Measured on one CPU core with 16 layers of 8 heads of 64, FP8: 0.3 ms per block of 16 tokens for out, in and check,
    which is about one token of that model's prefill. Twice that is charged, so that a doubtful swap is not made. A much
    smaller model computes as fast as it copies: then a swap gains little, and does no harm.
    """

    tokens_per_block: float = 2.0
    tokens_per_swap: float = 8.0

    def prefers_swap(self, num_tokens: int, num_blocks: int) -> bool:
        """True if recomputing `num_tokens` tokens costs more than copying their `num_blocks` blocks."""
        return num_tokens > self.tokens_per_swap + self.tokens_per_block * num_blocks


class SwapSpace:
    """Host blocks and their owners: sequences in the state SWAPPED."""

    def __init__(self, num_blocks: int, block_tokens: int, rule: SwapRule | None = None) -> None:
        self.pool = BlockPool(num_blocks, block_tokens)
        self.rule = rule or SwapRule()
        self.refused_total = 0  # swaps cheaper than a recomputation, refused for lack of host blocks
        self.gaps_total = 0  # swaps whose shared prefix was evicted before they came back: recomputed

    def accepts(self, num_tokens: int, num_blocks: int) -> bool:
        """True if a swap is cheaper than a recomputation and host blocks are free; counts refusals."""
        if not self.rule.prefers_swap(num_tokens, num_blocks):
            return False
        if num_blocks > self.pool.num_free:
            self.refused_total += 1
            return False
        return True

    def put(self, start: int, end: int, lacking: Collection[int] = ()) -> Swapped:
        """Take host blocks for tokens [start, end); `start` must be the beginning of a block.

        `lacking`: hash blocks of the sequence without their windowed layers.
        """
        skipped = start // self.pool.block_tokens
        blocks = self.pool.take(-(-end // self.pool.block_tokens) - skipped)
        generations = tuple([self.pool.generation(block) for block in blocks])
        return Swapped(start, end, tuple(blocks), generations, frozenset(lacking))

    def table(self, swapped: Swapped) -> Table:
        """The host blocks, indexed like a sequence's; entries before `swapped.start` are invalid."""
        skipped = swapped.start // self.pool.block_tokens
        return Table((BlockId(0),) * skipped + swapped.blocks, (0,) * skipped + swapped.generations)

    def drop(self, sequence: Sequence) -> None:
        """Give a sequence's host blocks back, if it has any."""
        if sequence.swapped is not None:
            self.pool.give_back(sequence.swapped.blocks)
            sequence.swapped = None

    def check_integrity(self, sequences: Collection[Sequence], among: range | None = None) -> None:
        """Prove that every host block in use belongs to exactly one live sequence. `among`: host blocks to check.

        Raises:
            AssertionError: names the fault and the block.
        """
        owned = {str(s.key): s.swapped.blocks for s in sequences if s.swapped is not None}
        self.pool.check_integrity(owned, among)
        for sequence in sequences:
            swapped = sequence.swapped
            if swapped is not None:
                now = tuple([self.pool.generation(block) for block in swapped.blocks])
                assert now == swapped.generations, f"{sequence.key}: its host blocks changed hands"
