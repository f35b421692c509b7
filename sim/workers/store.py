"""A worker's runner and KV memory in the simulator: every step reads the KV of all earlier tokens and checks it.

Sampling is a function of the last cell (cells.py), the seed, the choice and, in noisy schedules, of worker and step.
Swapping is kv/store/host_store.py over two stores of cells. Knows no scheduler, no stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, product
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models

from ...core.request import SamplingParams, SequenceKey
from ...decode_worker.choice import ChoiceText
from ...engine.plan import SequenceStep, StepPlan, StepResult
from ...engine.speculation.draft_model.catch_up import CatchUp
from ...engine.speculation.draft_model.holdings import DraftHoldings
from ...engine.speculation.draft_model.plan import DraftPlan, DraftResult, all_failed
from ...engine.speculation.draft_model.planner import DraftBounds, DraftPlanner
from ...engine.store_ops import FetchOp, ReadOp, StoreOp, SwapInOp, SwapOp, SwapOutOp, WriteOp
from ...kv.block import BlockId
from ...kv.cache.pool import BlockPool
from ...kv.section import HeldTokens, SectionData
from ...kv.spec import HASH_BLOCK_TOKENS
from ...kv.store.host_store import HostStore
from ...text.tokenizer import Tokenizer
from ..invariants import Violation
from ..world import World
from .cells import CellStore, cells_after, domain_cell, mix, spec_of
from .ranks import HeadCells, SimRanks, make_ranks, planes_of_heads
from .windows import WindowedCells, windowed_planes

VOCABULARY = 61
EOS = 0
DRAFT_CONTEXT = 1 << 20  # tokens of the draft model
LETTERS = "ab"  # of the texts, which so often hold a stop string or half of one
_HALF_CHARACTERS = ("\u00c3", "\u00a4")  # in a byte-level vocabulary the two bytes of U+00E4


def _sampled(cell: int, seed: int, choice: int, noise: int) -> int:
    return mix(mix(mix(cell, seed), choice), noise) % VOCABULARY


def answer_of(domain: str, prompt_ids: Sequence[int], params: SamplingParams) -> tuple[int, ...]:
    """The tokens that any worker generates after a prompt where sampling is not noisy, as the first choice."""
    cells, found = cells_after(domain_cell(domain), prompt_ids), list[int]()
    for _ in range(params.max_tokens):
        found.append(_sampled(cells[-1], params.seed, 0, 0))
        cells = cells_after(cells[-1], found[-1:])
    return tuple(found)


@dataclass(slots=True)
class Ledger:
    """All tokens ever sampled, by prefix, seed and choice: only these may follow that prefix in a client's stream."""

    sampled: dict[tuple[int, int, int], list[int]] = field(default_factory=dict)
    cells: dict[bytes, list[int]] = field(default_factory=dict)  # of hash blocks, by identity

    def sample(self, cell: int, seed: int, choice: int, noise: int) -> int:
        """Sample the token that follows a prefix, and record it."""
        token_id = _sampled(cell, seed, choice, noise)
        self.sampled.setdefault((cell, seed, choice), []).append(token_id)
        return token_id

    def named(self, identities: Sequence[bytes], cells: Sequence[int]) -> None:
        """Record what the leading hash blocks of a chain must contain."""
        for place, identity in enumerate(identities):
            self.cells[identity] = list(cells[place * HASH_BLOCK_TOKENS : (place + 1) * HASH_BLOCK_TOKENS])

    def may_follow(self, token_id: int, cell: int, seed: int, choice: int) -> bool:
        """Return whether any worker sampled this token after exactly this prefix."""
        return token_id in self.sampled.get((cell, seed, choice), ())


@dataclass(slots=True)
class Known:
    """Tokens and cells that a sequence must contain, known from its order and its steps."""

    domain: str
    tokens: list[int]
    cells: list[int]

    @classmethod
    def of(cls, domain: str, prompt_ids: Sequence[int]) -> Known:
        """Make the record of a prompt."""
        return cls(domain, list(prompt_ids), cells_after(domain_cell(domain), prompt_ids))

    def take(self, start: int, token_ids: Sequence[int]) -> None:
        """Record the tokens that a step computes; a token computed before must be the same again."""
        known = self.tokens[start : start + len(token_ids)]
        if list(token_ids[: len(known)]) != known or start > len(self.tokens):
            raise Violation("R3", f"tokens {start}+{len(token_ids)} are {list(token_ids)}, were {known}")
        fresh = token_ids[len(known) :]
        self.tokens += fresh
        self.cells += cells_after(self.cells[-1], fresh)


class Store:
    """One worker's KV memory and its runner. Implements Store of engine/turn.py; cells.py checks the contents."""

    def __init__(
        self,
        world: World,
        pool: BlockPool,
        ledger: Ledger,
        *,
        noise: int,
        read_damage: float,
        swap_damage: float,
        window: int = 0,
        heads: int = 1,
        num_ranks: int = 1,
    ) -> None:
        """`window`: tokens that the windowed layer sees; 0: there is none. `heads`: split over the ranks."""
        self._world = world
        self._pool = pool
        self._ledger = ledger
        self._noise = noise  # 0: sampling does not depend on worker and step
        self._read_damage = read_damage
        self._heads = heads

        def damaged() -> bool:
            return world.chance(swap_damage)

        self.ranks: SimRanks | None = None  # of a worker with several heads
        if heads > 1:
            makers = partial(HeadCells, pool.block_tokens, pool), partial(HeadCells, pool.block_tokens, damaged=damaged)
            self.ranks = SimRanks(make_ranks(*makers, spec_of(0, heads), num_ranks), spec_of(0, heads))
            self._devices: tuple[CellStore, ...] = tuple(rank.device for rank in self.ranks.stores)
            self._device = self._devices[0]
        else:
            make = partial(WindowedCells, window) if window else CellStore
            self._device = make(pool.block_tokens, pool)
            self._devices = (self._device,)
            self._host = HostStore(self._device, make(pool.block_tokens, damaged=damaged))
        self._last_step = 0
        self.known: dict[SequenceKey, Known] = {}

    # ------------------------------------------------------------------ the runner

    def run(self, plan: StepPlan) -> StepResult:
        """Compute a step: check all earlier cells, write the new ones, sample. Drafts as in model/runner.py."""
        rows = []
        for step in plan.sequences:
            known = self.known[step.key]
            for device in self._devices:
                device.check_prefix(_held(step, 0, step.start), known.cells)
            known.take(step.start, step.token_ids)
            drafts = cells_after(known.cells[step.end - 1], step.draft_ids)
            cells = [*known.cells[step.start : step.end], *drafts]
            for device in self._devices:
                device.write(_held(step, step.start, step.start + step.num_tokens), cells)
            tokens: list[int] = []
            for row, cell in enumerate([known.cells[step.end - 1], *drafts] if step.samples else ()):
                if row and tokens[-1] != step.draft_ids[row - 1]:
                    break
                noise = self._noise_of(plan.step)
                tokens.append(self._ledger.sample(cell, step.params.seed, step.key.choice, noise))
            num_accepted = max(len(tokens) - 1, 0)
            known.take(step.end, step.draft_ids[:num_accepted])
            self._seal(step, step.end + num_accepted)
            rows.append(tuple(tokens))
        self._last_step = plan.step
        return StepResult(plan.step, tuple(rows))

    def guess(self, key: SequenceKey, tokens: Sequence[int], seed: int, most: int) -> list[int]:
        """The tokens that the next step will sample after `tokens`, of which all but the last are computed."""
        known = self.known[key]
        cell = known.cells[len(tokens) - 2] if len(tokens) > 1 else domain_cell(known.domain)
        guessed: list[int] = []
        last = tokens[-1]
        for _ in range(most):
            cell = cells_after(cell, (last,))[0]
            last = _sampled(cell, seed, key.choice, self._noise_of(self._last_step + 1))
            guessed.append(last)
        return guessed

    def _noise_of(self, step: int) -> int:
        return mix(self._noise, step) if self._noise else 0

    def _seal(self, step: SequenceStep, end: int) -> None:
        start = step.start - step.start % HASH_BLOCK_TOKENS
        end = end if step.seals_tail else end - end % HASH_BLOCK_TOKENS
        if end > start:
            for device in self._devices:
                device.seal(_held(step, start, end))

    # ------------------------------------------------------------------ the core's operations

    def read(self, op: ReadOp | FetchOp) -> tuple[SectionData, ...]:
        """Read planes with their seals; at rate `read_damage` the returned copy is damaged."""
        if self.ranks is not None:
            (section,) = self.ranks.store.read(replace(op, into=None) if isinstance(op, ReadOp) else op)
        else:
            held = _held(op, op.token_start, op.token_start + op.token_count)
            self._device.check_owned(held)
            (section,) = self._device.read_tokens(held, without_windows=op.without_windows)
        if isinstance(op, ReadOp) and op.into is not None:
            place = op.into.take(section.payload.shape)
            place[...] = section.payload
            section = replace(section, payload=place)
        if self._world.chance(self._read_damage):
            section.payload.reshape(-1)[self._world.random.randrange(section.payload.size)] ^= 4
        return (section,)

    def write(self, op: WriteOp) -> None:
        """Store planes of a hand-over under the digests that came with them."""
        if self.ranks is not None:
            self.ranks.store.write(op)
            return
        self._device.write_tokens(_held(op, op.token_start, op.token_start + op.token_count), op.sections)

    def swap_out(self, op: SwapOutOp) -> None:
        """Copy to host memory, before the blocks' next owner writes. At rate `swap_damage` the copy is damaged."""
        if self.ranks is not None:
            self.ranks.store.swap_out(op)
            return
        self._host.swap_out(_held(op, op.token_start, op.token_start + op.token_count), _on_host(op))

    def swap_in(self, op: SwapInOp) -> bool:
        """Copy back into fresh blocks. Returns whether the digests match."""
        if self.ranks is not None:
            return self.ranks.store.swap_in(op)
        return self._host.swap_in(_on_host(op), _held(op, op.token_start, op.token_start + op.token_count))

    def check_findable(self, identity: bytes, block: BlockId, *, lacks_windows: bool) -> None:
        """Check K7: a findable block holds what its identity names, as far as an order has said that."""
        if isinstance(self._device, WindowedCells) and self._device.lacks(block) and not lacks_windows:
            raise Violation("K7", f"block {block} is found as whole and lacks its windowed layer")
        cells = self._ledger.cells.get(identity)
        if cells is not None and not self._device.has(block, cells):
            raise Violation("K7", f"block {block} is found by an identity and does not hold its tokens")

    def leaves_as_computed(self, key: SequenceKey, token_start: int, count: int, planes: bytes) -> bool:
        """Return whether planes of one or two layers that leave this worker are those of its tokens."""
        cells = self.known[key].cells[token_start : token_start + count]
        if self.ranks is not None:
            return planes == planes_of_heads(cells, range(self._heads)).tobytes()
        full = np.array(cells, np.uint64).tobytes()
        return planes in (full, full + windowed_planes(cells))


class DraftSetting(NamedTuple):
    """A worker's draft model."""

    num_blocks: int
    chunk: int  # tokens that it catches up per step
    right: float  # probability that a guessed token is right
    failure: float  # probability that a call fails


class DraftModel:
    """A worker's draft model: right at a rate, in blocks of its own, failing like steps. Called by engine/turn.py."""

    def __init__(self, world: World, store: Store, setting: DraftSetting, block_tokens: int) -> None:
        holdings = DraftHoldings(setting.num_blocks, block_tokens)
        catch_up = CatchUp(1.0)
        catch_up.tokens = setting.chunk
        self.planner = DraftPlanner(DraftBounds(DRAFT_CONTEXT, VOCABULARY), holdings, catch_up)
        self._world = world
        self._store = store
        self._setting = setting
        self._cells = CellStore(block_tokens, holdings.pool)

    def draft(self, plan: DraftPlan) -> DraftResult:
        """Compute a plan. One that fails has written all of its rows before."""
        for step in plan.catch_up.sequences:
            self._compute(step)
        guesses = [self._guess(step, most) for step, most in zip(plan.guesses.sequences, plan.lengths, strict=True)]
        if self._world.chance(self._setting.failure):
            return all_failed(plan)
        return DraftResult(tuple(guesses))

    def _compute(self, step: SequenceStep) -> int:
        """Check the cells before a step's rows, and write theirs; returns the last one."""
        known = self._store.known[step.key]
        self._cells.check_prefix(_held(step, 0, step.start), known.cells)
        before = known.cells[step.start - 1] if step.start else domain_cell(known.domain)
        cells = cells_after(before, step.token_ids)
        self._cells.write(_held(step, step.start, step.end), cells)
        return cells[-1]

    def _guess(self, step: SequenceStep, most: int) -> tuple[int, ...]:
        last, rate = self._compute(step), self._setting.right
        tokens = [*self._store.known[step.key].tokens[: step.end - 1], step.token_ids[-1]]
        right = self._store.guess(step.key, tokens, step.params.seed, most)
        luck = [mix(step.end + place, tokens[-1]) % 1000 < 1000 * rate for place in range(most)]
        guessed = [(id_ if is_right else id_ + 1) % VOCABULARY for id_, is_right in zip(right, luck, strict=True)]
        computed = guessed[:-1]
        self._cells.write(_held(step, step.end, step.end + len(computed)), cells_after(last, computed))
        return tuple(guessed)


def _held(op: SequenceStep | StoreOp, start: int, end: int) -> HeldTokens:
    return HeldTokens(op.block_table, op.generations, start, end - start)


def _on_host(op: SwapOp) -> HeldTokens:
    return HeldTokens(op.host_table, op.host_generations, op.token_start, op.token_count)


# ------------------------------------------------------------------ text


def _words() -> Iterator[str]:
    """Two halves of a character, and all words of two letters, the shortest first."""
    yield from _HALF_CHARACTERS
    for length in range(1, 7):
        yield from map("".join, product(LETTERS, repeat=length))


def _tokenizer() -> Tokenizer:
    words = ["</s>", *islice(_words(), VOCABULARY - 1)]
    backend = tokenizers.Tokenizer(models.WordLevel({word: id_ for id_, word in enumerate(words)}, unk_token="</s>"))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend, {}, [EOS])


TOKENIZER = _tokenizer()


def undisturbed(params: SamplingParams, prompt_ids: Sequence[int]) -> ChoiceText:
    """The text of a choice on a worker that never fails."""
    return ChoiceText(TOKENIZER, params, frozenset([EOS]), prompt_ids=prompt_ids)
