"""Blocks of the draft model's KV: a pool and a prefix cache of its own. Pure; knows no target KV and no step.

They are named by the same identities as the target's, because the same tokens give the same KV. Nothing of them is
handed over, swapped or announced: what is lost is computed again, and costs time only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from ....kv.block import BlockId
from ....kv.cache.pool import BlockPool, OutOfBlocks
from ....kv.cache.prefix import PrefixCache
from ....kv.spec import HASH_BLOCK_TOKENS
from ...sequence import Sequence
from .proposer import ModelProposer


def proposer_of(sequence: Sequence) -> ModelProposer | None:
    """The draft model's state of a sequence; None: nothing was guessed for it so far."""
    drafting = sequence.drafting
    return drafting.proposer if drafting is not None and isinstance(drafting.proposer, ModelProposer) else None


class DraftHoldings:
    """Takes, shares, publishes and gives back blocks of the draft model's pool."""

    def __init__(self, num_blocks: int, block_tokens: int, *, finds_prefixes: bool = True) -> None:
        self.pool = BlockPool(num_blocks, block_tokens)
        # Routers do not hear of these blocks: the events are not kept.
        self.prefix = PrefixCache(self.pool, max_pending_events=0, enabled=finds_prefixes)

    def attach(self, sequence: Sequence, proposer: ModelProposer) -> None:
        """Retain the cached prefix, of all tokens but the last one, whose logits are needed."""
        assert not proposer.blocks, f"{sequence.key} holds draft blocks already"
        findable = sequence.identities[: (len(sequence.tokens) - 1) // HASH_BLOCK_TOKENS]
        proposer.blocks = self.prefix.acquire(findable)
        proposer.num_computed = len(proposer.blocks) * self.pool.block_tokens
        proposer.num_published = len(proposer.blocks)

    def covers(self, proposer: ModelProposer, num_tokens: int) -> bool:
        """Take the missing blocks that cover `num_tokens` tokens. False: there are not so many, and none was taken."""
        missing = self._blocks_for(num_tokens) - len(proposer.blocks)
        if missing > 0:
            try:
                proposer.blocks += self.pool.take(missing)
            except OutOfBlocks:
                return False
        return True

    def publish(self, sequence: Sequence, proposer: ModelProposer) -> None:
        """Make full blocks of the sequence's own tokens findable. Call it when the guesses are settled."""
        num_named = len(sequence.identities) * HASH_BLOCK_TOKENS
        num_full = min(proposer.num_computed, num_named) // self.pool.block_tokens
        if num_full > proposer.num_published:
            named = sequence.identities[: num_full * self.pool.block_tokens // HASH_BLOCK_TOKENS]
            start, root = proposer.num_published, sequence.identity_root
            proposer.blocks = self.prefix.publish(named, proposer.blocks, start, root)
            proposer.num_published = num_full

    def trim(self, sequence: Sequence) -> None:
        """Give back the blocks that hold guesses only. If those are not judged yet, they are forgotten."""
        proposer = proposer_of(sequence)
        if proposer is not None:
            spare = proposer.blocks[self._blocks_for(len(sequence.tokens)) :]
            if spare and proposer.guessed_after == len(sequence.tokens):
                proposer.guessed = ()  # else they would count as computed when they come true
            self.pool.give_back(spare)
            del proposer.blocks[len(proposer.blocks) - len(spare) :]

    def release(self, sequence: Sequence) -> None:
        """Give all draft blocks of a sequence back; published ones stay findable until they are evicted."""
        proposer = proposer_of(sequence)
        if proposer is not None:
            self.pool.give_back(proposer.blocks)
            proposer.blocks, proposer.guessed = [], ()
            proposer.num_computed = proposer.num_published = 0

    def check_integrity(self, sequences: Collection[Sequence], among: range | None = None) -> None:
        """Prove that pool, prefix cache and sequences agree. `among`: numbers of the blocks to check; None: all.

        Raises:
            AssertionError: names the fault and the sequence or block.
        """
        claims: Counter[BlockId] = Counter()
        for sequence in sequences:
            proposer = proposer_of(sequence)
            if proposer is None:
                continue
            claims.update(proposer.blocks)
            covered = len(proposer.blocks) * self.pool.block_tokens
            what = f"{sequence.key} has {proposer.num_computed} draft tokens in {covered}"
            assert proposer.num_published * self.pool.block_tokens <= proposer.num_computed <= covered, what
            assert proposer.num_computed < len(sequence.tokens), f"{what}, and {len(sequence.tokens)} tokens"
        looked_at = range(self.pool.num_blocks)[slice(None) if among is None else slice(among.start, among.stop)]
        for block in map(BlockId, looked_at):
            owners = self.pool.owners(block)
            assert owners == claims[block], f"draft block {block} counts {owners} owners, {claims[block]} claim it"
        self.pool.check_integrity(among=looked_at)
        self.prefix.check_integrity(None if among is None else looked_at)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.pool.block_tokens)
