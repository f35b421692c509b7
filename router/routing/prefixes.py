"""Prefix map: identity -> bitmask of the workers that hold it, searched by bisection. Knows no network, no clock.

A worker's slot is a bit number. The blocks of a worker are prefix-closed (parents come before children and go after
them), so "holds block i" means "holds blocks 0 … i". The longest held prefix of all workers together is found with
about log2(n) look-ups: each look-up ANDs the mask of the workers in question.

    blocks of a prompt   0 ────────── lo ───────── mid ───────── hi ── n
    a group of workers   holds [0, lo), may hold [lo, hi), certainly not more

A match ends where the worker's own would: in whole blocks, and where windows are held (kv/cache/reach.py). The map
never claims more than the workers reported: after a missing event a worker matches nothing until its next
snapshot, and entries that are dropped for the memory bound only make answers shorter.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ...kv.block import IDENTITY_BYTES, BlockIdentity
from ...kv.cache.reach import EVERYWHERE, Reach, places_of


@dataclass(slots=True)
class _Slot:
    """Blocks that one worker reported since its last snapshot began."""

    worker_id: str
    bit: int  # a power of two
    entries: dict[bytes, None] = field(default_factory=dict)  # oldest first
    sequence: int | None = None  # of the last accepted event; None: the next one must begin a snapshot
    in_snapshot: bool = False
    reach: Reach = EVERYWHERE
    lacking: set[bytes] = field(default_factory=set)  # entries that end blocks without their windowed layers
    died_in_generation: int = 0


class PrefixMap:
    """The union of all workers' block events, bounded, plus short-lived predictions.

    Events of a worker are numbered consecutively. `snapshot` and `delta` return False if a number is missing: ask that
    worker for a new snapshot. The entries of a dead worker are swept in slices; its slot is reused only afterwards.
    """

    def __init__(
        self, max_entries: int = 1_000_000, max_predictions: int = 200_000, prediction_ttl_s: float = 5.0
    ) -> None:
        self._max_entries = max_entries
        self._max_predictions = max_predictions
        self._ttl_s = prediction_ttl_s
        self._masks: dict[bytes, int] = {}
        self._live = 0  # bits of workers that are connected and whose events have no gap
        self._slot_by_worker: dict[str, _Slot] = {}
        self._slot_by_bit: dict[int, _Slot] = {}
        self._dying: deque[_Slot] = deque()
        self._swept: deque[_Slot] = deque()  # slots without entries, but predictions may still have their bits
        self._free_bits: list[int] = []
        self._num_bits = 0
        self._num_entries = 0
        # Predictions are kept in two generations: an entry lasts between one and two times the ttl.
        self._young: dict[bytes, int] = {}
        self._old: dict[bytes, int] = {}
        self._generation = 0
        self._generation_began_s: float | None = None
        self.num_dropped = 0  # entries dropped for the bound
        self.num_gaps = 0

    def __len__(self) -> int:
        return len(self._masks)

    # ------------------------------------------------------------------ workers' events

    def join(self, worker_id: str) -> None:
        """Start a new incarnation or watch of a worker: it matches nothing until its snapshot begins."""
        self.leave(worker_id)
        slot = _Slot(worker_id, self._take_bit())
        self._slot_by_worker[worker_id] = slot
        self._slot_by_bit[slot.bit] = slot

    def leave(self, worker_id: str) -> None:
        """Remove a worker: it matches nothing from now on; `sweep` frees the memory. Unknown ids are ignored."""
        slot = self._slot_by_worker.pop(worker_id, None)
        if slot is not None:
            del self._slot_by_bit[slot.bit]
            slot.lacking.clear()
            self._live &= ~slot.bit
            slot.died_in_generation = self._generation
            self._dying.append(slot)

    def needs_snapshot(self, worker_id: str) -> bool:
        """True if this worker matches nothing until a new snapshot."""
        slot = self._slot_by_worker.get(worker_id)
        return slot is not None and slot.sequence is None

    def snapshot(
        self,
        worker_id: str,
        sequence: int,
        identities: bytes,
        last: bool,
        *,
        lacking: bytes = b"",
        reach: Reach = EVERYWHERE,
    ) -> bool:
        """Add a piece of a snapshot: concatenated identities, parents first. The first piece replaces all before it.

        `lacking`: bits of those that end blocks without their windowed layers (kv/cache/reach.py).
        Returns False if events are missing.
        """
        slot = self._slot_by_worker.get(worker_id)
        if slot is None:
            return False
        if slot.sequence is not None and sequence != slot.sequence + 1:
            return self._gap(slot)  # also for a repeated piece, which does not begin another snapshot
        if not slot.in_snapshot and (slot.sequence is not None or slot.entries):
            self.join(worker_id)  # sweeping the old slot later is cheaper than comparing now
            slot = self._slot_by_worker[worker_id]
        if len(identities) % IDENTITY_BYTES:
            return self._gap(slot)
        slot.sequence, slot.in_snapshot, slot.reach = sequence, not last, reach
        self._live |= slot.bit
        self._store(slot, identities, lacking)
        return True

    def delta(self, worker_id: str, sequence: int, stored: bytes, removed: bytes, *, lacking: bytes = b"") -> bool:
        """Apply blocks that became findable at a worker, and blocks that are no longer. False if events are missing.

        `lacking`: as in `snapshot`, of the stored.
        """
        slot = self._slot_by_worker.get(worker_id)
        if slot is None or slot.sequence is None:
            return False
        is_cut = len(stored) % IDENTITY_BYTES or len(removed) % IDENTITY_BYTES
        if slot.in_snapshot or sequence != slot.sequence + 1 or is_cut:
            return self._gap(slot)
        slot.sequence = sequence
        for identity in _split(removed):
            if identity in slot.entries:
                del slot.entries[identity]
                slot.lacking.discard(identity)
                self._clear(identity, slot.bit)
        self._store(slot, stored, lacking)
        return True

    def sweep(self, max_entries: int) -> bool:
        """Remove at most `max_entries` entries of dead workers. True: none is left."""
        while self._dying and max_entries > 0:
            slot = self._dying[0]
            count = min(max_entries, len(slot.entries))
            for _ in range(count):
                identity, _none = slot.entries.popitem()
                self._clear(identity, slot.bit)
            max_entries -= max(1, count)
            if not slot.entries:
                self._swept.append(self._dying.popleft())
        self._reuse_bits()
        return not self._dying

    # ------------------------------------------------------------------ predictions

    def predict(self, worker_ids: Sequence[str], identities: Sequence[BlockIdentity], now_s: float) -> None:
        """Note that these workers will soon hold this whole prefix: a request that computes it was sent there."""
        self.tick(now_s)
        bits = 0
        for worker_id in worker_ids:
            slot = self._slot_by_worker.get(worker_id)
            bits |= slot.bit if slot is not None else 0
        young = self._young
        if not bits:
            return
        for identity in identities:
            young[identity] = young.get(identity, 0) | bits
        if len(young) > self._max_predictions:
            self._rotate(now_s)

    def tick(self, now_s: float) -> None:
        """Expire old predictions."""
        if self._generation_began_s is None:
            self._generation_began_s = now_s
        while now_s - self._generation_began_s >= self._ttl_s:
            if not self._young and not self._old and not self._swept and not self._dying:
                self._generation_began_s = now_s
                return
            self._rotate(self._generation_began_s + self._ttl_s)

    # ------------------------------------------------------------------ questions

    def believed(self, worker_id: str) -> frozenset[bytes] | None:
        """All blocks of a worker in the map; None: it matches nothing before its next snapshot."""
        slot = self._slot_by_worker.get(worker_id)
        if slot is None or not self._live & slot.bit or slot.in_snapshot:
            return None
        return frozenset(slot.entries)

    @property
    def num_predicted(self) -> int:
        """Number of blocks that a worker is expected to hold soon."""
        return len(self._young.keys() | self._old.keys())

    def held(self, identities: Sequence[BlockIdentity]) -> dict[str, int]:
        """Number of leading blocks of a prompt after which each worker can begin; workers that hold none are absent."""
        found = self._match(identities, self._live, (self._masks,))
        for worker_id, count in list(found.items()):
            slot = self._slot_by_worker[worker_id]
            if slot.reach != EVERYWHERE:
                found[worker_id] = slot.reach.usable(identities, count, slot.lacking.__contains__)
        return found

    def expected(self, identities: Sequence[BlockIdentity], now_s: float) -> dict[str, int]:
        """Like `held`, predicted blocks of requests under way included."""
        self.tick(now_s)
        if not self._young and not self._old:
            return self.held(identities)
        known = 0
        for slot in self._slot_by_worker.values():
            known |= slot.bit
        predicted = self._match(identities, known, (self._young, self._old))
        for worker_id, count in predicted.items():  # they will have all layers, in whole blocks
            predicted[worker_id] = self._slot_by_worker[worker_id].reach.whole(count)
        for worker_id, count in self.held(identities).items():
            predicted[worker_id] = max(count, predicted.get(worker_id, 0))
        return predicted

    def _match(
        self, identities: Sequence[BlockIdentity], candidates: int, tables: tuple[dict[bytes, int], ...]
    ) -> dict[str, int]:
        found: dict[str, int] = {}
        first, rest = tables[0].get, tables[1:]
        groups = [(candidates, 0, len(identities))]
        while groups:
            mask, low, high = groups.pop()
            while mask and low < high:
                middle = (low + high + 1) >> 1
                identity = identities[middle - 1]
                holders = first(identity, 0)
                for table in rest:
                    holders |= table.get(identity, 0)
                holders &= mask
                if holders == mask:
                    low = middle
                elif not holders:
                    high = middle - 1
                else:
                    groups.append((mask ^ holders, low, middle - 1))
                    mask, low = holders, middle
            while mask and low:
                bit = mask & -mask
                found[self._slot_by_bit[bit].worker_id] = low
                mask ^= bit
        return found

    def check_integrity(self) -> None:
        """Assert that masks and slots agree. Takes time in proportion to all entries: for tests and idle time."""
        masks: dict[bytes, int] = {}
        for slot in self._all_slots():
            for identity in slot.entries:
                masks[identity] = masks.get(identity, 0) | slot.bit
        assert masks == self._masks
        assert self._num_entries == sum(len(slot.entries) for slot in self._all_slots()) <= self._max_entries
        assert all(slot.entries.keys() >= slot.lacking for slot in self._slot_by_worker.values())
        bits = [slot.bit for slot in self._all_slots()] + self._free_bits
        assert len(bits) == len(set(bits)) == self._num_bits

    # ------------------------------------------------------------------ inside

    def _all_slots(self) -> list[_Slot]:
        return [*self._slot_by_worker.values(), *self._dying, *self._swept]

    def _gap(self, slot: _Slot) -> bool:
        self.num_gaps += 1
        slot.sequence, slot.in_snapshot = None, False
        self._live &= ~slot.bit
        return False

    def _store(self, slot: _Slot, identities: bytes, lacking: bytes) -> None:
        masks, entries, bit = self._masks, slot.entries, slot.bit
        before, listed = len(entries), list(_split(identities))
        for identity in listed:
            entries[identity] = None
            masks[identity] = masks.get(identity, 0) | bit
        slot.lacking.difference_update(listed)
        bits = lacking[: -(-len(listed) // 8)]  # a worker may send more than it has names
        slot.lacking.update(listed[place] for place in places_of(bits) if place < len(listed))
        self._num_entries += len(entries) - before
        if self._num_entries > self._max_entries:
            self._make_room()

    def _clear(self, identity: bytes, bit: int) -> None:
        mask = self._masks[identity] & ~bit
        if mask:
            self._masks[identity] = mask
        else:
            del self._masks[identity]
        self._num_entries -= 1

    def _make_room(self) -> None:
        """Drop entries of dead workers, then the oldest of the worker with most: routing is less exact, never wrong."""
        while self._num_entries > self._max_entries and self._dying:
            self.sweep(self._num_entries - self._max_entries)
        while self._num_entries > self._max_entries:
            slot = max(self._slot_by_worker.values(), key=lambda s: (len(s.entries), s.worker_id))
            count = min(len(slot.entries), self._num_entries - self._max_entries + self._max_entries // 16)
            for identity in [identity for identity, _ in zip(slot.entries, range(count), strict=False)]:
                del slot.entries[identity]
                slot.lacking.discard(identity)
                self._clear(identity, slot.bit)
            self.num_dropped += count

    def _rotate(self, now_s: float) -> None:
        self._old, self._young = self._young, {}
        self._generation += 1
        self._generation_began_s = now_s
        self._reuse_bits()

    def _reuse_bits(self) -> None:
        """Free the bits of swept slots that no prediction can have any more."""
        while self._swept and (
            self._generation >= self._swept[0].died_in_generation + 2 or not (self._young or self._old)
        ):
            self._free_bits.append(self._swept.popleft().bit)

    def _take_bit(self) -> int:
        if self._free_bits:
            return self._free_bits.pop()
        self._num_bits += 1
        return 1 << (self._num_bits - 1)


def _split(identities: bytes) -> Iterator[bytes]:
    for first in range(0, len(identities), IDENTITY_BYTES):
        yield identities[first : first + IDENTITY_BYTES]
