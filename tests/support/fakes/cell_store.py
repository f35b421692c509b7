"""A store and a runner for tests of the core: what stands in a cell says which prefix it was computed from."""

import hashlib

from twostroke.core.request import SamplingParams
from twostroke.engine.plan import StepPlan, StepResult
from twostroke.engine.store_ops import SwapInOp, SwapOutOp

EOS, KEY, ROOT = 0, b"cluster", b"root"
VOCAB = 61


def cell_after(previous: bytes, token_id: int) -> bytes:
    """What the "KV" of a token is: it stands for exactly the prefix that ends there."""
    return hashlib.blake2b(previous + token_id.to_bytes(4, "little"), digest_size=8).digest()


def cells_of(tokens) -> list[bytes]:
    cells, previous = [], b""
    for token in tokens:
        previous = cell_after(previous, token)
        cells.append(previous)
    return cells


def next_token(cell: bytes, num_generated: int) -> int:
    return int.from_bytes(cell_after(cell, num_generated), "little") % VOCAB


def oracle(prompt, params: SamplingParams, num_emitted: int) -> list[int]:
    """What the choice generates where nothing ever goes wrong, from its first token in this dispatch on."""
    tokens, generated = list(prompt), num_emitted
    while True:
        tokens.append(next_token(cells_of(tokens)[-1], generated))
        generated += 1
        if tokens[-1] == EOS or generated == params.max_tokens:
            return tokens[len(prompt) :]


class FakeStore:
    """Cells by (block, place); also the runner. Any cell that is not this very prefix's, in this use, is an error."""

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.cells: dict[tuple[int, int], tuple[int, bytes]] = {}
        self.host: FakeStore | None = None
        self.states = {0: b""}  # in every state the cell of the last token that it covers

    def swap(self, op: SwapOutOp | SwapInOp) -> None:
        device, host = (op.block_table, op.generations), (op.host_table, op.host_generations)
        if isinstance(op, SwapOutOp):
            self.host.write(*host, op.token_start, self.read(*device, op.token_start, op.token_count))
        else:
            self.write(*device, op.token_start, self.host.read(*host, op.token_start, op.token_count))

    def read(self, table, generations, start: int, count: int) -> list[bytes]:
        found = []
        for place in range(start, start + count):
            index = place // self.block_tokens
            generation, cell = self.cells[table[index], place % self.block_tokens]
            assert generation == generations[index], f"block {table[index]} changed hands"
            found.append(cell)
        return found

    def write(self, table, generations, start: int, cells) -> None:
        for place, cell in enumerate(cells, start):
            index = place // self.block_tokens
            self.cells[table[index], place % self.block_tokens] = (generations[index], cell)

    def move_states(self, plan: StepPlan) -> None:
        """Read and write the states of a step. Any state that is not this very prefix's is an error."""
        assert len(plan.states) == len(plan.sequences)
        places = [place for move in plan.states for place in (move.target, *(place for _, place in move.marks))]
        assert not set(places) & {0, *(move.source for move in plan.states)}, "a step writes what it reads"
        assert len(set(places)) == len(places), "a step writes one state twice"
        for step, move in zip(plan.sequences, plan.states, strict=True):
            before = self.read(step.block_table, step.generations, 0, step.start)
            cell, due = self.states[move.source], {len(step.token_ids): move.target, **dict(move.marks)}
            assert cell == (before[-1] if before else b""), "the state of another prefix"
            for rows, token in enumerate(step.token_ids, 1):
                cell = cell_after(cell, token)
                if rows in due:
                    self.states[due.pop(rows)] = cell
            assert not due, "a mark behind the step's end"

    def run(self, plan: StepPlan) -> StepResult:
        if plan.states:
            self.move_states(plan)
        rows = []
        for step in plan.sequences:
            previous = self.read(step.block_table, step.generations, 0, step.start)
            fresh, last = [], previous[-1] if previous else b""
            for token in step.token_ids:
                last = cell_after(last, token)
                fresh.append(last)
            self.write(step.block_table, step.generations, step.start, fresh)
            rows.append((next_token(fresh[-1], step.num_generated),) if step.samples else ())
        return StepResult(plan.step, tuple(rows))
