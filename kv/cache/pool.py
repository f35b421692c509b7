"""Pool of the blocks of one worker's KV memory: free blocks in eviction order, owner counts of the others.

Knows integers only. A block is *live* while it has an owner, else *free*. Free blocks stand in one eviction order, the
next to be taken on the left:

    | plain: no findable contents | cached: contents of a findable prefix, least recently used first |

so "free" and "evictable" are the same list. `prefix.py` knows which prefix is cached in which block; it marks blocks
here and is told when one is evicted.

Source: the free list in eviction order with O(1) removal, as in vLLM's block pool; leaf-first return as in its
sequence-wise reverse free.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence

from ..block import BlockId


class OutOfBlocks(Exception):
    """Fewer blocks are free or evictable than were asked for. Nothing was taken."""

    def __init__(self, wanted: int, free: int) -> None:
        super().__init__(f"{wanted} blocks wanted, {free} free")
        self.wanted = wanted
        self.free = free


class BlockPool:
    """Owners, free order and generations of `num_blocks` blocks of `block_tokens` tokens each."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        assert num_blocks > 0, num_blocks
        assert block_tokens > 0, block_tokens
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.allocated_total = 0  # times a block went from free to live
        self.freed_total = 0  # times a block went from live to free
        self._owners = [0] * num_blocks
        self._generations = [0] * num_blocks
        self._is_cached = bytearray(num_blocks)
        # An OrderedDict, not a dict: taking the first key of a dict whose front was deleted is linear.
        self._plain: OrderedDict[BlockId, None] = OrderedDict.fromkeys(BlockId(i) for i in range(num_blocks))
        self._cached: OrderedDict[BlockId, None] = OrderedDict()
        self._on_evict: Callable[[BlockId], None] | None = None

    @property
    def num_free(self) -> int:
        """Blocks that `take` could hand out now: plain and cached."""
        return len(self._plain) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Free blocks whose contents can still be found."""
        return len(self._cached)

    @property
    def num_live(self) -> int:
        """Blocks that have an owner."""
        return self.num_blocks - self.num_free

    def take(self, num_blocks: int) -> list[BlockId]:
        """Take blocks, evicting the least recently used free ones.

        The caller owns them until `give_back`. All or nothing. The generation of each block grows by one.

        Raises:
            OutOfBlocks: fewer than `num_blocks` are free or evictable. Nothing was taken.
        """
        assert num_blocks >= 0, num_blocks
        if num_blocks > self.num_free:
            raise OutOfBlocks(num_blocks, self.num_free)
        taken = []
        for _ in range(num_blocks):
            if not self._plain:
                self._evict()
            block, _ = self._plain.popitem(last=False)
            self._owners[block] = 1
            self._generations[block] += 1
            taken.append(block)
        self.allocated_total += num_blocks
        return taken

    def retain(self, blocks: Sequence[BlockId]) -> None:
        """Add one owner to each block. A block must be live, or free and cached; the latter becomes live."""
        for block in blocks:
            if self._owners[block] == 0:
                assert self._is_cached[block], f"block {block} is free and holds nothing: nobody can retain it"
                del self._cached[block]
                self.allocated_total += 1
            self._owners[block] += 1

    def give_back(self, blocks: Sequence[BlockId]) -> None:
        """Remove one owner from each block. `blocks` are in sequence order: the last one is evicted first."""
        for block in reversed(blocks):
            assert self._owners[block] > 0, f"block {block} was given back but has no owner"
            self._owners[block] -= 1
            if self._owners[block] == 0:
                (self._cached if self._is_cached[block] else self._plain)[block] = None
                self.freed_total += 1

    def owners(self, block: BlockId) -> int:
        """Number of owners of a block; 0 means free."""
        return self._owners[block]

    def generation(self, block: BlockId) -> int:
        """Number of times that the block was taken; (block, generation) identifies one use of the block."""
        return self._generations[block]

    # ------------------------------------------------------------------ for the prefix cache

    def watch_evictions(self, on_evict: Callable[[BlockId], None]) -> None:
        """Call `on_evict` with each cached block that `take` is about to reuse. One watcher per pool."""
        assert self._on_evict is None, "a pool has one prefix cache"
        self._on_evict = on_evict

    def mark_cached(self, block: BlockId) -> None:
        """Mark a live block: its contents can be found from now on."""
        assert self._owners[block] > 0, f"block {block} is free: its contents are nobody's to publish"
        self._is_cached[block] = 1

    def mark_plain(self, block: BlockId) -> None:
        """Mark a block: its contents can no longer be found. If it is free, it is reused before any cached block."""
        self._is_cached[block] = 0
        if block in self._cached:
            del self._cached[block]
            self._plain[block] = None

    def is_cached(self, block: BlockId) -> bool:
        """True if the block's contents can be found, be it live or free."""
        return bool(self._is_cached[block])

    def _evict(self) -> None:
        """Turn the least recently used cached block, and what depends on it, into plain ones."""
        block = next(iter(self._cached))
        if self._on_evict is not None:
            self._on_evict(block)
        self.mark_plain(block)

    # ------------------------------------------------------------------ integrity

    def check_integrity(self, owned: Mapping[str, Sequence[BlockId]] | None = None, among: range | None = None) -> None:
        """Prove the pool's invariants; with `owned` (owner to its blocks) also that owners add up.

        `among`: the blocks to check, if checking all of a large pool would take too long.

        Raises:
            AssertionError: names the fault and the block.
        """
        for block in map(BlockId, range(self.num_blocks) if among is None else among):
            owners, cached = self._owners[block], bool(self._is_cached[block])
            free_as = [name for name, queue in (("plain", self._plain), ("cached", self._cached)) if block in queue]
            expected = [] if owners else ["cached" if cached else "plain"]
            assert owners >= 0, f"block {block} has {owners} owners"
            assert free_as == expected, f"block {block} ({owners} owners) is free as {free_as}, should be {expected}"
        live = self.allocated_total - self.freed_total
        assert live == self.num_live, f"allocated - freed is {live}, live are {self.num_live}"
        if owned is not None:
            self._check_owners(owned, among)

    def _check_owners(self, owned: Mapping[str, Sequence[BlockId]], among: range | None) -> None:
        claims: Counter[BlockId] = Counter()
        for blocks in owned.values():
            claims.update(blocks)
        for block in map(BlockId, range(self.num_blocks) if among is None else among):
            if self._owners[block] != claims[block]:
                names = [name for name, blocks in owned.items() if block in blocks]
                counted = f"block {block} counts {self._owners[block]} owners"
                raise AssertionError(f"{counted} but {claims[block]} claim it: {names}")
