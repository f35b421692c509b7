"""States of recurrent layers on one worker: which are owned, and which are snapshots that a prefix may start from.

    | plain | snapshots without an owner, least recently used first | owned |      places 1 … num_states

A snapshot is the state after all tokens of a hash block, found by that block's identity. A prefix match of a model with
recurrent layers ends where the KV blocks *and* a snapshot are held. Knows integers and identities, no bytes.
Source: Marconi (Pan et al. 2024) for prefix caches of hybrid models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..block import BlockId, BlockIdentity
from ..spec import HASH_BLOCK_TOKENS
from .pool import BlockPool


@dataclass(slots=True)
class _Snapshot:
    identity: BlockIdentity
    is_passing: bool  # of one sequence on its way, given up for its next one unless another sequence has used it


class StatePool:
    """Owners and snapshots of `num_states` states. Place 0 is the state before the first token; nobody owns it."""

    def __init__(self, num_states: int, block_tokens: int) -> None:
        """`block_tokens`: snapshots are found at the ends of blocks of this size."""
        self.num_states = num_states
        self.pool = BlockPool(num_states, 1)
        self.hits_total = 0  # snapshots that a sequence started from
        self._hash_blocks = block_tokens // HASH_BLOCK_TOKENS
        self._place_by_identity: dict[BlockIdentity, int] = {}
        self._snapshots: dict[int, _Snapshot] = {}
        self.pool.watch_evictions(lambda block: self._forget(block + 1))

    @property
    def num_free(self) -> int:
        """States that `take` could hand out: plain ones, and snapshots without an owner."""
        return self.pool.num_free

    @property
    def num_snapshots(self) -> int:
        """States that a prefix can be found by."""
        return len(self._snapshots)

    def take(self) -> int:
        """Take a state, of the least recently used snapshot if no plain one is left. The caller owns it.

        Raises:
            OutOfBlocks: all states are owned.
        """
        return self.pool.take(1)[0] + 1

    def give_back(self, place: int) -> None:
        """Give up one owner's share of a state. A snapshot stays findable until its place is needed."""
        if place:
            self.pool.give_back([BlockId(place - 1)])

    def retain(self, place: int) -> None:
        """Add an owner to a snapshot, which then stays after its sequence has gone on."""
        if place:
            self.pool.retain([BlockId(place - 1)])
            self._snapshots[place].is_passing = False
            self.hits_total += 1

    def furthest(self, identities: Sequence[BlockIdentity], held: int) -> tuple[int, int]:
        """Longest start of a chain that ends in a snapshot: (hash blocks, place); (0, 0) if there is none.

        `held`: hash blocks whose KV is held, a multiple of the blocks' size.
        """
        for end in range(held, 0, -self._hash_blocks):
            place = self._place_by_identity.get(identities[end - 1])
            if place is not None:
                return end, place
        return 0, 0

    def publish(self, place: int, identity: BlockIdentity, *, is_passing: bool) -> None:
        """Make an owned state findable. If another snapshot has the identity already, that one remains the only one."""
        known = self._place_by_identity.get(identity)
        if known is not None:
            self._snapshots[known].is_passing &= is_passing
            return
        self._place_by_identity[identity] = place
        self._snapshots[place] = _Snapshot(identity, is_passing)
        self.pool.mark_cached(BlockId(place - 1))

    def pass_on(self, place: int, identity: BlockIdentity) -> None:
        """Forget a snapshot of a sequence that has a later one, unless another sequence has used it."""
        snapshot = self._snapshots.get(place)
        if snapshot is not None and snapshot.identity == identity and snapshot.is_passing:
            self._forget(place)
            self.pool.mark_plain(BlockId(place - 1))

    def owners(self, place: int) -> int:
        """Number of owners of a state."""
        return self.pool.owners(BlockId(place - 1))

    def check_integrity(self, owned: Sequence[int]) -> None:
        """Prove that index and pool agree, and that owners add up. `owned`: each owner's share of a place, once each.

        Raises:
            AssertionError: names the fault and the place.
        """
        self.pool.check_integrity({"sequences": [BlockId(place - 1) for place in owned]})
        assert len(self._place_by_identity) == len(self._snapshots), "two snapshots have one identity"
        for place, snapshot in self._snapshots.items():
            assert self._place_by_identity.get(snapshot.identity) == place, f"state {place} has another's identity"
            assert self.pool.is_cached(BlockId(place - 1)), f"state {place} is a snapshot and plain in the pool"

    def _forget(self, place: int) -> None:
        del self._place_by_identity[self._snapshots.pop(place).identity]
