"""KV that can be checked: what a token leaves in the cache stands for exactly the prefix that ends with it.

A *cell* is the 64-bit number of one token position, a function of isolation domain and all ids up to there. Sampling is
a function of the last cell, the seed and, in noisy schedules, of who sampled. Knows no scheduler, no stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from ..core.request import SequenceKey
from ..kv.block import BlockId
from ..kv.digest import frame_digests, places
from ..kv.pool import BlockPool
from ..kv.section import SectionData
from ..kv.spec import HASH_BLOCK_TOKENS, Component, KvSpec, LayerGroup
from ..kv.wire import covers, verify_sections
from ..model.plan import SequenceStep, StepPlan, StepResult
from ..model.store_op import FetchOp, ReadOp, SwapInOp, SwapOutOp, WriteOp
from .host import Host, SealedCells
from .invariants import Violation
from .world import World

DIGEST_KEY = 0x5EED
SPEC = KvSpec((LayerGroup("main", 1, (Component("k", 1, 2, 3),)),))  # one plane of 8 bytes per token
CELL_BYTES = 8
VOCABULARY = 61
EOS = 0

_MASK = (1 << 64) - 1
_POISON = 0xDEAD


def mix(previous: int, value: int) -> int:
    """A 64-bit number that stands for both. Source: the finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    x = (previous + (value + 1) * 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    return x ^ (x >> 31)


def domain_cell(domain: str) -> int:
    """What stands before the first token of every prompt of a tenant."""
    return mix(int.from_bytes(domain.encode()[:8], "little"), 0x70)


def cells_after(cell: int, token_ids: Iterable[int]) -> list[int]:
    """The cells of tokens that follow the one whose cell is given."""
    cells = []
    for token_id in token_ids:
        cell = mix(cell, token_id)
        cells.append(cell)
    return cells


@dataclass(slots=True)
class Ledger:
    """Which tokens were ever sampled after which prefix: what may follow what in a client's stream."""

    sampled: dict[tuple[int, int, int], list[int]] = field(default_factory=dict)

    def sample(self, cell: int, seed: int, choice: int, noise: int) -> int:
        """The token that follows a prefix."""
        token_id = mix(mix(mix(cell, seed), choice), noise) % VOCABULARY
        self.sampled.setdefault((cell, seed, choice), []).append(token_id)
        return token_id

    def may_follow(self, token_id: int, cell: int, seed: int, choice: int) -> bool:
        """Whether somebody computed this token from exactly this prefix."""
        return token_id in self.sampled.get((cell, seed, choice), ())


@dataclass(slots=True)
class Known:
    """What a sequence must contain, learned from its order and its steps."""

    domain: str
    tokens: list[int]
    cells: list[int]

    @classmethod
    def of(cls, domain: str, prompt_ids: Sequence[int]) -> Known:
        """From an order."""
        return cls(domain, list(prompt_ids), cells_after(domain_cell(domain), prompt_ids))

    def take(self, start: int, token_ids: Sequence[int]) -> None:
        """Tokens that a step computes: those that were computed before must be the same again."""
        known = self.tokens[start : start + len(token_ids)]
        if list(token_ids[: len(known)]) != known or start > len(self.tokens):
            raise Violation("R3", f"tokens {start}+{len(token_ids)} are {list(token_ids)}, were {known}")
        fresh = token_ids[len(known) :]
        self.tokens += fresh
        self.cells += cells_after(self.cells[-1], fresh)


@lru_cache(maxsize=1 << 14)
def _digest(planes: bytes, unit: int) -> int:
    payload = np.frombuffer(planes, np.uint8).reshape(1, 1, -1, CELL_BYTES)
    return int(frame_digests(payload, None, places([[[0]]], 0, [[0]], [unit]), DIGEST_KEY, HASH_BLOCK_TOKENS)[0, 0, 0])


def seal(cells: Sequence[int], unit: int) -> int:
    """The digest of one hash block's (or tail's) cells."""
    return _digest(np.array(cells, np.uint64).tobytes(), unit)


@lru_cache(maxsize=1 << 12)
def _verified(planes: bytes, digests: bytes, token_start: int) -> bool:
    section = _section(np.frombuffer(planes, np.uint8), np.frombuffer(digests, np.uint64))
    return verify_sections((section,), token_start, len(planes) // CELL_BYTES, DIGEST_KEY)


def digests_hold(sections: Sequence[SectionData], token_start: int, token_count: int) -> bool:
    """Whether planes are whole and match their digests: kv/wire.py's judgement, remembered."""
    if not covers(sections, SPEC) or len(sections) != 1 or sections[0].payload.shape[2] != token_count:
        return False
    return _verified(sections[0].payload.tobytes(), sections[0].digests.tobytes(), token_start)


def swap_holds(units: Sequence[SealedCells]) -> bool:
    """Whether what came back from host memory is what was sealed."""
    return all(seal(sealed.cells, sealed.unit) == sealed.digest for sealed in units)


def _section(planes: np.ndarray, digests: np.ndarray) -> SectionData:
    payload = planes.reshape(1, 1, -1, CELL_BYTES)
    return SectionData("main", "k", 0, 1, 0, 1, 3, CELL_BYTES, payload, None, digests.reshape(1, 1, -1))


class Store:
    """One worker's KV memory and its runner. Every access checks whose blocks those are, and what is in them."""

    def __init__(
        self, world: World, pool: BlockPool, ledger: Ledger, *, noise: int, read_damage: float, swap_damage: float
    ) -> None:
        self._world = world
        self._pool = pool
        self._ledger = ledger
        self._noise = noise  # 0: a token depends on its prefix alone
        self._read_damage = read_damage
        self._swap_damage = swap_damage
        self._host = Host(pool.block_tokens)
        size = pool.block_tokens
        self._cells = [[_POISON] * size for _ in range(pool.num_blocks)]
        self._seals: list[dict[int, int]] = [{} for _ in range(pool.num_blocks)]  # by hash block of the sequence
        self._uses = [0] * pool.num_blocks
        self.known: dict[SequenceKey, Known] = {}

    # ------------------------------------------------------------------ the runner

    def run(self, plan: StepPlan) -> StepResult:
        """Compute a step: read all that came before, write the new cells, sample."""
        rows = []
        for step in plan.sequences:
            known = self.known[step.key]
            self._check_prefix(step, known)
            known.take(step.start, step.token_ids)
            self._write(step.block_table, step.generations, step.start, known.cells[step.start : step.end])
            self._seal(step, known)
            noise = mix(self._noise, plan.step) if self._noise else 0
            cell, params = known.cells[step.end - 1], step.params
            rows.append((self._ledger.sample(cell, params.seed, step.key.choice, noise),) if step.samples else ())
        return StepResult(plan.step, tuple(rows))

    def _check_prefix(self, step: SequenceStep, known: Known) -> None:
        size = self._pool.block_tokens
        for index in range(-(-step.start // size)):
            block = step.block_table[index]
            expected = known.cells[index * size : min(step.start, (index + 1) * size)]
            if self._pool.generation(block) != step.generations[index]:
                raise Violation("K3", f"{step.key} reads block {block}, which changed hands")
            if self._uses[block] != step.generations[index] or self._cells[block][: len(expected)] != expected:
                raise Violation("K4", f"{step.key} reads block {block}: not what stands for its tokens there")

    def _seal(self, step: SequenceStep, known: Known) -> None:
        size, stop = self._pool.block_tokens, step.end
        for unit in range(step.start // HASH_BLOCK_TOKENS, -(-stop // HASH_BLOCK_TOKENS)):
            end = min((unit + 1) * HASH_BLOCK_TOKENS, stop)
            if end % HASH_BLOCK_TOKENS == 0 or step.seals_tail:
                block = step.block_table[unit * HASH_BLOCK_TOKENS // size]
                self._seals[block][unit] = seal(known.cells[unit * HASH_BLOCK_TOKENS : end], unit)

    # ------------------------------------------------------------------ the core's operations

    def write_tokens(self, op: WriteOp) -> None:
        """Planes of a hand-over, with the digests they came with."""
        payload = op.sections[0].payload
        cells = np.frombuffer(payload.tobytes(), np.uint64).tolist()
        self._write(op.block_table, op.generations, op.token_start, cells)
        for place, digest in enumerate(op.sections[0].digests.reshape(-1).tolist()):
            unit = op.token_start // HASH_BLOCK_TOKENS + place
            self._seals[op.block_table[unit * HASH_BLOCK_TOKENS // self._pool.block_tokens]][unit] = digest

    def read_tokens(self, op: ReadOp | FetchOp) -> tuple[SectionData, ...]:
        """Planes and seals as they lie there; now and then the reading itself goes wrong."""
        size, cells, digests = self._pool.block_tokens, [], []
        stop = op.token_start + op.token_count
        for start in range(op.token_start, stop, HASH_BLOCK_TOKENS):
            index, unit = start // size, start // HASH_BLOCK_TOKENS
            block = op.block_table[index]
            if self._uses[block] != op.generations[index] or self._pool.generation(block) != op.generations[index]:
                raise Violation("K3", f"block {block} is read for another, it changed hands")
            if unit not in self._seals[block]:
                raise Violation("K4", f"hash block {unit} in block {block} is read for another before it was sealed")
            cells += self._cells[block][start % size : start % size + min(HASH_BLOCK_TOKENS, stop - start)]
            digests.append(self._seals[block][unit])
        planes = np.array(cells, np.uint64).view(np.uint8)
        if self._world.chance(self._read_damage):
            planes[self._world.random.randrange(len(planes))] ^= 4
        return (_section(planes, np.array(digests, np.uint64)),)

    def swap_out(self, op: SwapOutOp) -> None:
        """To host memory, before the blocks' next owner writes; now and then memory goes bad there."""
        size, units = self._pool.block_tokens, []
        stop = op.token_start + op.token_count
        for start in range(op.token_start, stop, HASH_BLOCK_TOKENS):
            index, unit = start // size, start // HASH_BLOCK_TOKENS
            block = op.block_table[index]
            if self._uses[block] != op.generations[index]:
                raise Violation("K3", f"{op.key} is copied out of block {block}, which was written by another since")
            cells = self._cells[block][start % size : start % size + min(HASH_BLOCK_TOKENS, stop - start)]
            digest = self._seals[block].get(unit) if len(cells) == HASH_BLOCK_TOKENS else seal(cells, unit)
            if digest is None:
                raise Violation("K4", f"hash block {unit} in block {block} is copied out before it was sealed")
            if self._world.chance(self._swap_damage):
                cells[self._world.random.randrange(len(cells))] ^= 4
            units.append(SealedCells(unit, tuple(cells), digest))
        self._host.put(op, units)

    def swap_in(self, op: SwapInOp) -> bool:
        """Back into fresh blocks; whether the digests hold."""
        units = self._host.get(op)
        cells = [cell for sealed in units for cell in sealed.cells]
        if len(cells) != op.token_count:
            raise Violation("K4", f"{op.key} gets {len(cells)} tokens back of {op.token_count}")
        self._write(op.block_table, op.generations, op.token_start, cells)
        for sealed in units:
            block = op.block_table[sealed.unit * HASH_BLOCK_TOKENS // self._pool.block_tokens]
            self._seals[block][sealed.unit] = sealed.digest
        return swap_holds(units)

    def _write(self, table: Sequence[BlockId], generations: Sequence[int], start: int, cells: Sequence[int]) -> None:
        size = self._pool.block_tokens
        for place, cell in enumerate(cells, start):
            index = place // size
            block, use = table[index], generations[index]
            if place == start or place % size == 0:
                self._check_writer(block, use)
                if self._uses[block] != use:
                    self._uses[block], self._cells[block], self._seals[block] = use, [_POISON] * size, {}
            self._cells[block][place % size] = cell

    def _check_writer(self, block: BlockId, use: int) -> None:
        pool = self._pool
        if pool.generation(block) != use or pool.owners(block) == 0:
            raise Violation("K3", f"block {block} is written by somebody who has it no more")
        if pool.owners(block) > 1 or pool.is_cached(block):
            raise Violation("K3", f"block {block} is written though others read it")
