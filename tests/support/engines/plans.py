"""Steps of a sequence with everything that a scheduler may do to one, drawn at random."""

import random

from twostroke.core.request import SamplingParams, SequenceKey
from twostroke.engine.plan import History, SampledPlace, SequenceStep

PARAMS = SamplingParams(100, 0.7, seed=3, stop=("é",))
WITH_PAST = SamplingParams(100, 0.7, repetition_penalty=1.2)


class Life:
    """A sequence that may do at any step whatever a scheduler does with one."""

    def __init__(self, name: str, draw: random.Random) -> None:
        self._draw, self.key = draw, SequenceKey(name, draw.randrange(3))
        self.params = draw.choice([PARAMS, WITH_PAST])
        self.start, self.generated, self.table, self.uses = 0, 0, (), ()

    def step(self) -> SequenceStep:
        draw = self._draw
        size = 1 if self.generated else draw.choice([1, 16, 33])
        if draw.random() < 0.1:  # preempted, then computed again in other blocks
            self.start, self.table, self.uses = draw.choice([0, 16]), (), ()
        count = (self.start + size) // 16 + 1
        more = max(count - len(self.table), 0)
        self.table += tuple(draw.randrange(1 << 20) for _ in range(more))
        self.uses += tuple(draw.randrange(1 << 33) for _ in range(more))
        if self.table and draw.random() < 0.05:  # the last block was shared and is another one now
            self.table = (*self.table[:-1], draw.randrange(1 << 20))
        samples = draw.random() < 0.7
        past = History(tuple(range(5)), tuple(range(self.generated))) if self.params.needs_history and samples else None
        made = SequenceStep(
            *(self.key, self.start, tuple(draw.randrange(1 << 17) for _ in range(size)), self.table[:count]),
            *(self.uses[:count], samples, self.params, self.generated),
            seals_tail=draw.random() < 0.1,
            from_place=SampledPlace(draw.randrange(9), 0) if draw.random() < 0.05 else None,
            adapter_slot=draw.choice([0, 0, 0, 2]),
            draft_ids=(4, 5) if draw.random() < 0.05 else (),
            history=past,
            targets=(1, 2) if draw.random() < 0.05 else (),
        )
        self.start, self.generated = self.start + size, self.generated + samples
        if draw.random() < 0.05:
            self.params = draw.choice([PARAMS, WITH_PAST])
        return made
