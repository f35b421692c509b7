"""KV cache manager: blocks of each sequence in a worker's pool and prefix cache. Knows no queue, policy or clock."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Series
from typing import NamedTuple

from ..kv.block import BlockId, BlockIdentity, chain
from ..kv.cache.pool import BlockPool
from ..kv.cache.prefix import PrefixCache
from ..kv.cache.residency import Residency
from ..kv.spec import HASH_BLOCK_TOKENS
from ..kv.windows import furthest_start
from .link.messages import CacheDelta, CacheSnapshot
from .plan import SequenceStep
from .sequence import Sequence, Table
from .speculation.draft_model.holdings import DraftHoldings
from .states import StateHoldings
from .store_ops import SwapInOp, SwapOutOp
from .swap import SwapSpace


class Cost(NamedTuple):
    """Blocks that a sequence needs to begin."""

    held_tokens: int  # leading tokens that are cached here now
    new_blocks: int  # blocks beyond the cached ones; a promise counts these
    from_free: int  # decrease of `num_free`: new blocks, and cached ones without an owner


class KvCacheManager:
    """Takes, shares, publishes and gives back blocks for sequences; numbers the deltas of the prefix cache."""

    def __init__(
        self,
        pool: BlockPool,
        prefix: PrefixCache,
        key: bytes,
        swap: SwapSpace | None = None,
        states: StateHoldings | None = None,
        *,
        drafts: DraftHoldings | None = None,
    ) -> None:
        self.pool = pool
        self.prefix = prefix
        self.swap = swap  # None: no host blocks, preemption is recompute
        self.states = states  # None: the model has no recurrent layers
        self.drafts = drafts  # None: there is no draft model
        self.residency = Residency(pool.num_blocks)
        self._key = key  # identity key of the cluster, for the chain over generated tokens
        self._delta = 0

    def blocks_for(self, num_tokens: int) -> int:
        """Number of blocks that cover `num_tokens` tokens."""
        return -(-num_tokens // self.pool.block_tokens)

    def cost(self, sequence: Sequence) -> Cost:
        """Blocks that a sequence without blocks needs. Changes no state."""
        span = self.pool.block_tokens // HASH_BLOCK_TOKENS
        findable = sequence.findable
        held = self.matched(findable)
        num_held = held // span
        asleep = 0
        for i in range(num_held):
            block = self.prefix.locate(findable[(i + 1) * span - 1])
            assert block is not None, f"hash block {i} of {sequence.key} is matched but nowhere"
            asleep += self.pool.owners(block) == 0
        new_blocks = self.blocks_for(sequence.tokens_to_hold) - num_held
        return Cost(held * HASH_BLOCK_TOKENS, new_blocks, new_blocks + asleep)

    def cached_tokens(self, sequence: Sequence) -> int:
        """Leading tokens of `sequence` that are cached here now."""
        return self.matched(sequence.findable) * HASH_BLOCK_TOKENS

    def matched(self, findable: Series[BlockIdentity]) -> int:
        """Number of leading hash blocks that a sequence can start after: KV is held, and the state if there is one."""
        held = self.prefix.match(findable)
        return held if self.states is None else self.states.matched(findable, held)

    def attach(self, sequence: Sequence) -> None:
        """Retain the cached prefix, and set `num_computed` to its length."""
        assert not sequence.blocks, f"{sequence.key} holds blocks already"
        findable = sequence.findable
        if self.states is not None:
            findable = findable[: self.states.attach(sequence, self.prefix.match(findable))]
            if not self.prefix.enabled:
                sequence.wanted_states.clear()
        sequence.blocks, sequence.table = self.prefix.acquire(findable), None
        self._note_lacking(sequence)
        sequence.num_computed = len(sequence.blocks) * self.pool.block_tokens
        sequence.num_published = len(sequence.blocks)
        self.residency.found(sequence.blocks)

    def _note_lacking(self, sequence: Sequence) -> None:
        span = self.pool.block_tokens // HASH_BLOCK_TOKENS
        lacking = (i for i, block in enumerate(sequence.blocks) if self.prefix.lacks_windows(block))
        sequence.lacking = {number for i in lacking for number in range(i * span, (i + 1) * span)}

    def furthest_start(self, sequence: Sequence, num_tokens: int) -> int:
        """Most of the first `num_tokens` tokens, in whole hash blocks, after which computing may begin."""
        num_blocks = num_tokens // HASH_BLOCK_TOKENS
        return furthest_start(self.prefix.windowed, num_blocks, sequence.lacking) * HASH_BLOCK_TOKENS

    def extend(self, sequence: Sequence, num_tokens: int) -> None:
        """Take the missing blocks that cover `num_tokens` tokens. All or nothing.

        Raises:
            OutOfBlocks: nothing was taken.
        """
        missing = self.blocks_for(num_tokens) - len(sequence.blocks)
        if missing > 0:
            taken = self.pool.take(missing)
            self.residency.taken(taken)
            sequence.blocks += taken
            sequence.table = None

    def trim(self, sequence: Sequence, num_tokens: int) -> None:
        """Give back the blocks beyond those that cover `num_tokens` tokens: they held rejected drafts only."""
        spare = sequence.blocks[self.blocks_for(num_tokens) :]
        if spare:
            assert len(sequence.blocks) - len(spare) >= sequence.num_published, f"{sequence.key} published drafts"
            self.pool.give_back(spare)
            del sequence.blocks[-len(spare) :]
            sequence.table = None
        if self.drafts is not None:
            self.drafts.trim(sequence)

    def release(self, sequence: Sequence) -> None:
        """Give all blocks back, host blocks too; published blocks stay findable until they are evicted."""
        if self.states is not None:
            self.states.release(sequence)
        if self.drafts is not None:
            self.drafts.release(sequence)
        self.pool.give_back(sequence.blocks)
        sequence.blocks, sequence.table = [], None
        sequence.num_computed = sequence.num_published = 0
        sequence.written.clear()
        sequence.lacking.clear()
        if self.swap is not None:
            self.swap.drop(sequence)

    def swap_out(self, sequence: Sequence) -> SwapOutOp | None:
        """Give the blocks back; returns the copy of the unshared ones to host blocks, to be made before their reuse.

        None: recomputation is cheaper, or host blocks are lacking; no state has changed.
        """
        shared = 0
        while shared < len(sequence.blocks) and self.pool.owners(sequence.blocks[shared]) > 1:
            shared += 1
        start, end = shared * self.pool.block_tokens, sequence.num_computed
        if self.swap is None or end <= start or not self.swap.accepts(end - start, self.blocks_for(end) - shared):
            return None
        table, swapped = self.table(sequence, end), self.swap.put(start, end, sequence.lacking)
        self.release(sequence)
        sequence.swapped, sequence.num_computed = swapped, end
        return SwapOutOp(sequence.key, start, end - start, *table, *self.swap.table(swapped))

    def swap_in(self, sequence: Sequence) -> SwapInOp | None:
        """The copy back of a swapped sequence, after its `attach` and `extend`. Its host blocks are given back.

        None: the prefix cache holds all of it; or its shared prefix was evicted, and it is recomputed from the end of
        the prefix that was found.
        """
        swapped, found = sequence.swapped, sequence.num_computed
        assert swapped is not None, f"{sequence.key} is not swapped"
        assert self.swap is not None, f"{sequence.key} is swapped, and there are no host blocks"
        host = self.swap.table(swapped)
        self.swap.drop(sequence)
        if found < swapped.start:
            self.swap.gaps_total += 1
        if not swapped.start <= found < swapped.end:
            return None
        sequence.num_computed = swapped.end
        sequence.lacking |= {number for number in swapped.lacking if number * HASH_BLOCK_TOKENS >= found}
        table = self.table(sequence, swapped.end)
        return SwapInOp(sequence.key, found, swapped.end - found, *table, *host)

    def publish(self, sequence: Sequence) -> None:
        """Make newly computed full blocks findable. A block may be replaced by its canonical copy."""
        num_full = min(sequence.num_computed, len(sequence.tokens)) // self.pool.block_tokens
        if num_full <= sequence.num_published:
            return
        num_hashed = num_full * self.pool.block_tokens // HASH_BLOCK_TOKENS
        known = len(sequence.identities)
        if known < num_hashed:
            link = sequence.identities[-1] if known else sequence.identity_root
            fresh = sequence.tokens[known * HASH_BLOCK_TOKENS : num_hashed * HASH_BLOCK_TOKENS]
            sequence.identities += chain(self._key, link, fresh)
        identities = sequence.identities[:num_hashed]
        root = sequence.identity_root
        span = self.pool.block_tokens // HASH_BLOCK_TOKENS
        lacking = {number // span for number in sequence.lacking}
        sequence.blocks = self.prefix.publish(identities, sequence.blocks, sequence.num_published, root, lacking)
        self.residency.published(sequence.blocks[sequence.num_published : num_full])
        sequence.table = None
        sequence.num_published = num_full

    def before_last(self, step: SequenceStep) -> int:
        """Where a deferred sequence goes on: its last row is computed again, from the beginning of its hash block.

        With a recurrent state, from the beginning of the step. The rows overwrite what is stored with the same bits.
        """
        last = step.end - 1
        return step.start if self.states is not None else max(step.start, last - last % HASH_BLOCK_TOKENS)

    def keep_state(self, sequence: Sequence, step: SequenceStep) -> None:
        """After `publish`: keep the states that a computed step has written, if the sequence has gone on."""
        if self.states is None:
            return
        if sequence.num_computed == step.end:
            self.states.moved(sequence, step.start)
        else:
            self.states.stay(sequence)

    def table(self, sequence: Sequence, num_tokens: int) -> Table:
        """Blocks and generations that cover the first `num_tokens` tokens."""
        if sequence.table is None:
            sequence.table = self.table_of(sequence.blocks)
        blocks, generations = sequence.table
        count = self.blocks_for(num_tokens)
        return sequence.table if count == len(blocks) else Table(blocks[:count], generations[:count])

    def table_of(self, blocks: Iterable[BlockId]) -> Table:
        """Blocks with their present generations."""
        listed = tuple(blocks)
        return Table(listed, tuple([self.pool.generation(block) for block in listed]))

    # ------------------------------------------------------------------ news for the routers

    def news(self) -> CacheDelta | CacheSnapshot | None:
        """Changes since the last call: a numbered delta, or a snapshot if there were too many; None: no change."""
        if self.prefix.resync_needed:
            self.prefix.drain_events()
            self._delta += 1  # this number is never sent as a delta: the gap tells
            return self.snapshot()
        stored, removed = self.prefix.drain_events()
        if not stored and not removed:
            return None
        self._delta += 1
        return CacheDelta(self._delta, tuple(stored), tuple(removed), self.prefix.lacking(stored))

    def snapshot(self) -> CacheSnapshot:
        """All held identities. Call `news` before, so that pending changes are sent as a delta first."""
        identities = self.prefix.snapshot()
        return CacheSnapshot(self._delta, tuple(identities), self.prefix.lacking(identities))
