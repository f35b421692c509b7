"""The host blocks of swapped sequences, and when copying beats computing again. Pure: knows integers, moves no byte.

    device  | shared | own: s0 s1 s2 | t |     preempted: own blocks and the partial tail go to host blocks,
    host             | h5 h1 h7 | h2 |         with their seals; the device blocks are given back
    device  | found again | fresh blocks |     back: what the prefix cache still holds is shared again, the rest copied

The host is another `BlockPool` without a prefix cache: a block's generation names its use, as on the device.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ..kv.block import BlockId
from ..kv.cache.pool import BlockPool
from .sequence import Sequence, Swapped, Table


@dataclass(frozen=True, slots=True)
class SwapRule:
    """What one swap costs (out, in, and the check of its digests), in tokens that could be computed meanwhile.

    What a sequence owns alone counts as lost by recompute: its cached blocks are free, and it was preempted because
    free blocks are gone. Measured on one CPU core with 16 layers of 8 heads of 64, FP8: 0.3 ms per block of 16 tokens
    out, in and verified, which is about a token of that model's prefill; twice that is charged, so that a doubtful
    swap is not made. A much smaller model computes as fast as it copies: then little is won, and nothing breaks.
    """

    tokens_per_block: float = 2.0
    tokens_per_swap: float = 8.0

    def prefers_swap(self, num_tokens: int, num_blocks: int) -> bool:
        """Whether computing `num_tokens` tokens again costs more than copying their `num_blocks` blocks."""
        return num_tokens > self.tokens_per_swap + self.tokens_per_block * num_blocks


class SwapSpace:
    """Host blocks and their owners: sequences in the state SWAPPED."""

    def __init__(self, num_blocks: int, block_tokens: int, rule: SwapRule | None = None) -> None:
        self.pool = BlockPool(num_blocks, block_tokens)
        self.rule = rule or SwapRule()
        self.refused_total = 0  # swaps that would have paid and found no host block
        self.gaps_total = 0  # came back to a shared prefix that was evicted: computed again

    def accepts(self, num_tokens: int, num_blocks: int) -> bool:
        """Whether a swap pays and there is room for it."""
        if not self.rule.prefers_swap(num_tokens, num_blocks):
            return False
        if num_blocks > self.pool.num_free:
            self.refused_total += 1
            return False
        return True

    def put(self, start: int, end: int) -> Swapped:
        """Take host blocks for tokens [start, end); `start` begins a block."""
        skipped = start // self.pool.block_tokens
        blocks = self.pool.take(-(-end // self.pool.block_tokens) - skipped)
        return Swapped(start, end, tuple(blocks), tuple([self.pool.generation(block) for block in blocks]))

    def table(self, swapped: Swapped) -> Table:
        """The host blocks indexed like a sequence's; the entries before `swapped.start` mean nothing."""
        skipped = swapped.start // self.pool.block_tokens
        return Table((BlockId(0),) * skipped + swapped.blocks, (0,) * skipped + swapped.generations)

    def drop(self, sequence: Sequence) -> None:
        """Give a sequence's host blocks back, if it has any."""
        if sequence.swapped is not None:
            self.pool.give_back(sequence.swapped.blocks)
            sequence.swapped = None

    def check_integrity(self, sequences: Collection[Sequence], among: range | None = None) -> None:
        """Prove that every host block in use belongs to exactly one live sequence. `among`: host blocks to look at.

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
