"""Prefix cache: index of the prefixes whose KV this worker holds. Knows identities and integers, no tensor, no token.

Callers count in hash blocks (16 tokens). An entry of the index is one *full* physical block of 1, 2 or 4 hash blocks;
its key is the identity of its last one. The index is closed under prefixes: an entry's parent is always present too.

    hash blocks      a    b  |  c    d  |  e            block_tokens = 32
    entries            (b) <---- (d)       e: not full, not findable

A block may lack its windowed layers (`kv/windows.py`): a match ends where computing may begin, so that every layer has
what its queries see from there on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from ..block import BlockId, BlockIdentity
from ..spec import HASH_BLOCK_TOKENS, WindowedLayers
from ..windows import last_start
from .pool import BlockPool

MAX_PENDING_EVENTS = 65_536


class _Entry:
    """One findable block: its hash blocks, and its place in the tree."""

    __slots__ = ("block", "children", "identities", "parent", "root")

    def __init__(
        self, block: BlockId, identities: tuple[BlockIdentity, ...], parent: _Entry | None, root: bytes
    ) -> None:
        self.block = block
        self.identities = identities
        self.parent = parent
        self.root = root  # of its chain: the isolation domain, weights and numerics of this KV
        self.children: dict[_Entry, None] = {}  # ordered: the order of removal must not depend on memory addresses

    @property
    def key(self) -> BlockIdentity:
        return self.identities[-1]


class PrefixCache:
    """The index over one pool. It owns no block: a cached block without owners is free and may be evicted."""

    def __init__(
        self,
        pool: BlockPool,
        max_pending_events: int = MAX_PENDING_EVENTS,
        *,
        enabled: bool = True,
        windowed: WindowedLayers | None = None,
    ) -> None:
        """`enabled` false: `publish` adds no entry, so `match` and `acquire` find no prefix.

        `max_pending_events`: with more events since the last `drain_events`, `resync_needed` is set instead.
        `windowed`: layers that a block may lack.
        """
        self.enabled = enabled
        self.windowed = windowed
        assert pool.block_tokens % HASH_BLOCK_TOKENS == 0, pool.block_tokens
        self._pool = pool
        self._span = pool.block_tokens // HASH_BLOCK_TOKENS  # hash blocks per physical block
        self._entry_by_key: dict[BlockIdentity, _Entry] = {}
        self._entry_by_block: dict[BlockId, _Entry] = {}
        # Hash blocks that are not the last of their block: two blocks with different later tokens can share one.
        self._holders_by_inner: dict[BlockIdentity, dict[BlockId, None]] = {}
        self._lacking: set[BlockId] = set()  # findable blocks without their windowed layers
        self._max_pending_events = max_pending_events
        self._pending: dict[BlockIdentity, bool] = {}  # True: stored, False: removed, net since the last drain
        self._changed: dict[BlockIdentity, None] = {}  # blocks that may have got or lost windowed layers since then
        self.resync_needed = False
        self.swapped_total = 0  # blocks replaced by the canonical copy
        pool.watch_evictions(self.drop)

    def __len__(self) -> int:
        """Findable blocks, live and free."""
        return len(self._entry_by_block)

    def match(self, identities: Sequence[BlockIdentity]) -> int:
        """Number of leading hash blocks of a chain after which computing may begin: a multiple of block_tokens / 16.

        All of them are held, with what windowed layers see from there on. Changes no state.
        """
        return self._matched_blocks(identities) * self._span

    def lacks_windows(self, block: BlockId) -> bool:
        """True if a findable block is here without its windowed layers."""
        return block in self._lacking

    def whole(self, num_hash_blocks: int) -> int:
        """A number of hash blocks, rounded down to whole physical blocks."""
        return num_hash_blocks // self._span * self._span

    def acquire(self, identities: Sequence[BlockIdentity]) -> list[BlockId]:
        """The blocks of `match`, in order. The caller owns them until it gives them back."""
        blocks = [self._entry_by_key[self._key(identities, i)].block for i in range(self._matched_blocks(identities))]
        self._pool.retain(blocks)
        return blocks

    def publish(
        self,
        identities: Sequence[BlockIdentity],
        blocks: list[BlockId],
        start: int = 0,
        root: bytes = b"",
        lacking: Collection[int] = (),
    ) -> list[BlockId]:
        """Make the full blocks of a sequence findable, from its `start`-th block on; idempotent.

        `identities` are the sequence's hash blocks from its first token on, `blocks` the caller's own blocks from its
        first token on, `root` the link before them (kv/block.py). A partial last block, or one beyond `identities`, is
        not published. Where another block already holds an identity, the caller's copy is given back and replaced by
        that canonical block: the caller owns the blocks of the returned list from now on. So a published block must be
        full and sealed and must not be written any more; another reader of the old copy must own it too.
        `lacking`: places in `blocks` of those without their windowed layers. A copy that has them becomes the canonical
        one instead of a block that lacks them.
        """
        full = min(len(identities) // self._span, len(blocks)) if self.enabled else 0
        # After `clear` parents can be missing or in other blocks: begin where the index still has the caller's blocks.
        start = min(start, full)
        while start > 0 and self.locate(self._key(identities, start - 1)) != blocks[start - 1]:
            start -= 1
        result = list(blocks)
        for i in range(start, full):
            entry = self._entry_by_key.get(self._key(identities, i))
            if entry is None:
                parent = self._entry_by_key[self._key(identities, i - 1)] if i else None
                self._insert(result[i], tuple(identities[i * self._span : (i + 1) * self._span]), parent, root)
                if i in lacking:
                    self._lacking.add(result[i])
                    self._note_layers(self._key(identities, i))
            elif entry.block != result[i] and entry.block in self._lacking and i not in lacking:
                self._replace(entry, result[i])
            elif entry.block != result[i]:
                assert not self._pool.is_cached(result[i]), f"block {result[i]} is already published as another prefix"
                self._pool.retain([entry.block])
                self._pool.give_back([result[i]])
                result[i] = entry.block
                self.swapped_total += 1
        return result

    def locate(self, identity: BlockIdentity) -> BlockId | None:
        """A block that holds this hash block, or None. The offset inside the block follows from the chain position."""
        entry = self._entry_by_key.get(identity)
        if entry is not None:
            return entry.block
        return next(iter(self._holders_by_inner.get(identity, ())), None)

    def is_of(self, block: BlockId, root: bytes) -> bool:
        """True if a findable block's chain begins at `root`: same isolation domain, weights and numerics."""
        entry = self._entry_by_block.get(block)
        return entry is not None and entry.root == root

    def drop(self, block: BlockId) -> None:
        """Remove a block and all its descendants, after an eviction or damage. Owners keep their blocks."""
        entry = self._entry_by_block.get(block)
        if entry is None:
            return
        if entry.parent is not None:
            del entry.parent.children[entry]
        doomed = [entry]
        for dying in doomed:  # grows while it runs
            doomed.extend(dying.children)
        for dying in reversed(doomed):  # leaves first
            self._remove(dying)

    def clear(self) -> None:
        """Remove all entries. Owners keep their blocks."""
        for entry in list(self._entry_by_block.values()):
            self._remove(entry)

    # ------------------------------------------------------------------ news for the routers

    def lacking(self, identities: Iterable[BlockIdentity]) -> tuple[BlockIdentity, ...]:
        """Those of these hash blocks that end a findable block without its windowed layers.

        With `block_tokens` and the window they tell what `match` finds.
        """
        if not self._lacking:
            return ()
        entries = ((identity, self._entry_by_key.get(identity)) for identity in identities)
        return tuple(identity for identity, entry in entries if entry is not None and entry.block in self._lacking)

    def drain_events(self) -> tuple[list[BlockIdentity], list[BlockIdentity]]:
        """Hash blocks (stored, removed), net since the last call; among the stored, parents come before children.

        Blocks that have their windowed layers now, and had them not, are among the stored again; so are the others.
        Read `resync_needed` before the call: if it is set, there were more changes than are kept, the answer is empty,
        and `snapshot` must be sent instead. This call resets it.
        """
        stored = [identity for identity, is_stored in self._pending.items() if is_stored]
        removed = [identity for identity, is_stored in self._pending.items() if not is_stored]
        stored += [key for key in self._changed if key in self._entry_by_key and key not in self._pending]
        self._pending.clear()
        self._changed.clear()
        self.resync_needed = False
        return stored, removed

    def snapshot(self) -> list[BlockIdentity]:
        """Every held hash block once, parents before children. Does not change the pending events."""
        seen: dict[BlockIdentity, None] = {}
        for entry in self._parents_first():
            seen.update(dict.fromkeys(entry.identities))
        return list(seen)

    def check_integrity(self, among: range | None = None) -> None:
        """Prove that index, tree and pool agree; with `among`, for these blocks only.

        Raises:
            AssertionError: names the fault and the block.
        """
        for block in map(BlockId, range(self._pool.num_blocks) if among is None else among):
            entry = self._entry_by_block.get(block)
            if entry is not None:
                self._check_entry(block, entry)
            elif self._pool.is_cached(block):
                raise AssertionError(f"block {block} is cached in the pool but not in the index")
        assert len(self._entry_by_key) == len(self._entry_by_block), "two identities lead to one block"
        assert self._entry_by_block.keys() >= self._lacking, "a block that cannot be found is said to lack layers"
        if among is not None:
            return
        holders = sum(len(blocks) for blocks in self._holders_by_inner.values())
        assert holders == len(self) * (self._span - 1), "a removed block is still a holder"
        assert sum(1 for _ in self._parents_first()) == len(self), "part of the tree hangs in the air"

    # ------------------------------------------------------------------ inside

    def _check_entry(self, block: BlockId, entry: _Entry) -> None:
        assert entry.block == block, f"entry of block {entry.block} stands under {block}"
        assert self._entry_by_key.get(entry.key) is entry, f"block {block} cannot be found by its identity"
        assert self._pool.is_cached(block), f"block {block} is in the index but plain in the pool"
        if entry.parent is not None:
            assert self._entry_by_key.get(entry.parent.key) is entry.parent, f"block {block} outlived its parent"
            assert entry in entry.parent.children, f"block {block} is no child of its parent"
            assert entry.root == entry.parent.root, f"block {block} belongs to another chain than its parent"
        for inner in entry.identities[:-1]:
            assert block in self._holders_by_inner[inner], f"block {block} is missing as a holder"

    def _key(self, identities: Sequence[BlockIdentity], i: int) -> BlockIdentity:
        """Identity of the sequence's `i`-th physical block."""
        return identities[(i + 1) * self._span - 1]

    def _held_blocks(self, identities: Sequence[BlockIdentity]) -> int:
        """Length of the held prefix in physical blocks; by bisection, since the index is closed under prefixes."""
        low, high = 0, len(identities) // self._span
        while low < high:
            middle = (low + high + 1) // 2
            if self._key(identities, middle - 1) in self._entry_by_key:
                low = middle
            else:
                high = middle - 1
        return low

    def _matched_blocks(self, identities: Sequence[BlockIdentity]) -> int:
        """Length in physical blocks of the longest held prefix after which computing may begin."""
        held = self._held_blocks(identities)
        if not self._lacking:
            return held

        def lacks(number: int) -> bool:
            return self._entry_by_key[self._key(identities, number)].block in self._lacking

        return last_start(self.windowed, held, self._pool.block_tokens, lacks)

    def _replace(self, entry: _Entry, block: BlockId) -> None:
        """Let another copy of the same tokens stand for an entry. Owners of the old one keep it."""
        assert block not in self._entry_by_block, f"block {block} is already published as another prefix"
        for inner in entry.identities[:-1]:
            del self._holders_by_inner[inner][entry.block]
            self._holders_by_inner[inner][block] = None
        del self._entry_by_block[entry.block]
        self._lacking.discard(entry.block)
        self._note_layers(entry.key)
        self._pool.mark_plain(entry.block)
        entry.block = block
        self._entry_by_block[block] = entry
        self._pool.mark_cached(block)

    def _insert(
        self, block: BlockId, identities: tuple[BlockIdentity, ...], parent: _Entry | None, root: bytes
    ) -> None:
        assert block not in self._entry_by_block, f"block {block} is already published as another prefix"
        entry = _Entry(block, identities, parent, root)
        if parent is not None:
            parent.children[entry] = None
        self._pool.mark_cached(block)
        self._entry_by_block[block] = entry
        self._entry_by_key[entry.key] = entry
        for inner in identities[:-1]:
            holders = self._holders_by_inner.setdefault(inner, {})
            if not holders:
                self._note(inner, is_stored=True)
            holders[block] = None
        self._note(entry.key, is_stored=True)

    def _remove(self, entry: _Entry) -> None:
        del self._entry_by_block[entry.block], self._entry_by_key[entry.key]
        if entry.block in self._lacking:
            self._lacking.remove(entry.block)
            self._note_layers(entry.key)  # it may come back with them before anybody hears that it was gone
        self._note(entry.key, is_stored=False)
        for inner in entry.identities[:-1]:
            holders = self._holders_by_inner[inner]
            del holders[entry.block]
            if not holders:
                del self._holders_by_inner[inner]
                self._note(inner, is_stored=False)
        self._pool.mark_plain(entry.block)

    def _note(self, identity: BlockIdentity, *, is_stored: bool) -> None:
        if self.resync_needed:
            return
        if self._pending.get(identity, is_stored) != is_stored:
            del self._pending[identity]  # undone before anybody heard of it
            return
        self._pending[identity] = is_stored
        self._perhaps_resync()

    def _note_layers(self, identity: BlockIdentity) -> None:
        if not self.resync_needed:
            self._changed[identity] = None
            self._perhaps_resync()

    def _perhaps_resync(self) -> None:
        if len(self._pending) + len(self._changed) > self._max_pending_events:
            self._pending.clear()
            self._changed.clear()
            self.resync_needed = True

    def _parents_first(self) -> Iterator[_Entry]:
        frontier = [entry for entry in self._entry_by_block.values() if entry.parent is None]
        while frontier:
            entry = frontier.pop()
            yield entry
            frontier.extend(entry.children)
