"""A target and a draft model without weights: every KV cell knows the tokens before it, and every read is checked."""

from twostroke.engine.plan import StepResult
from twostroke.engine.speculation.draft_model.plan import DraftResult

VOCABULARY = 50


def mix(before: int, token_id: int) -> int:
    return (before * 1000003 + token_id * 7919 + 12345) % 2_147_483_647


class Cells:
    """Cells by block and offset: (hash of the tokens before, token). A row reads all before it."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._cells: dict[tuple[int, int], tuple[int, int]] = {}

    def _at(self, step, position):
        return step.block_table[position // self._block_tokens], position % self._block_tokens

    def compute(self, step, token_ids, known):
        """Write the rows, and return the hash after each. `known`: the sequence's tokens."""
        state = 0
        for position in range(step.start):
            before, token_id = self._cells[self._at(step, position)]
            assert (before, token_id) == (state, known[position]), f"{step.key}: cell {position} is another's"
            state = mix(state, token_id)
        states = []
        for place, token_id in enumerate(token_ids):
            self._cells[self._at(step, step.start + place)] = (state, token_id)
            state = mix(state, token_id)
            states.append(state)
        return states


class CellTarget:
    """Stands for a runner: the next token is a function of the tokens before; now and then a step samples none."""

    def __init__(self, block_tokens: int, random=None, late=0.0) -> None:
        self.cells = Cells(block_tokens)
        self.live = {}  # set by the test: all sequences by key
        self._random, self._late = random, late

    def run(self, plan):
        told, deferred = [], set()
        for step in plan.sequences:
            known = self.live[step.key].tokens
            states = self.cells.compute(step, (*step.token_ids, *step.draft_ids), known)
            sampled = []
            if step.samples and self._late and self._random.random() < self._late:
                deferred.add(step.key)
            elif step.samples:
                for row, state in enumerate(states[len(step.token_ids) - 1 :]):
                    if row and sampled[-1] != step.draft_ids[row - 1]:
                        break
                    sampled.append(state % VOCABULARY)
            told.append(tuple(sampled))
        return StepResult(plan.step, tuple(told), deferred=frozenset(deferred))


class CellDrafter:
    """Stands for model/drafter.py: right at a rate, fails now and then."""

    def __init__(self, block_tokens: int, random, right=0.7, fails=0.0, short=0.0) -> None:
        self.cells = Cells(block_tokens)
        self.live = {}
        self.most_caught_up = 0
        self._random, self._right, self._fails, self._short = random, right, fails, short

    def _unusable(self, steps):
        return frozenset(step.key for step in steps if self._random.random() < self._fails)

    def catch_up(self, plan):
        self.most_caught_up = max(self.most_caught_up, plan.catch_up.num_tokens)
        for step in plan.catch_up.sequences:
            assert not step.samples
            known = self.live[step.key].tokens
            assert step.token_ids == tuple(known[step.start : step.end])
            self.cells.compute(step, step.token_ids, known)
        return self._unusable(plan.catch_up.sequences)

    def guess(self, plan):
        guesses = []
        for step, length in zip(plan.guesses.sequences, plan.lengths, strict=True):
            known = list(self.live[step.key].tokens)
            assert step.token_ids == tuple(known[step.start :])
            assert len(step.block_table) == len(step.generations)
            assert step.samples
            row, made = step, []
            while len(made) < length and not (made and self._random.random() < self._short):
                state = self.cells.compute(row, row.token_ids, known)[-1]
                token_id = state % VOCABULARY
                made.append(token_id if self._random.random() < self._right else (token_id + 1) % VOCABULARY)
                known.append(made[-1])
                row = row._replace(start=row.end, token_ids=(made[-1],))
            guesses.append(tuple(made))
        return DraftResult(tuple(guesses), self._unusable(plan.guesses.sequences))
