"""The decoding sequences of one simulated worker: all advance by one token per step. Knows no clock.

What happens to a sequence is known beforehand in steps: its end, and the steps before which it needs another block. So
a step costs the same whatever the number of sequences.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from .job import Job


class Decoding:
    """Sequences by the step at which something happens to them."""

    def __init__(self, block_tokens: int) -> None:
        self.num_steps = 0
        self._block_tokens = block_tokens
        self._jobs: dict[Job, None] = {}
        self._base_tokens = 0  # KV tokens, less `num_steps` for each sequence
        self._due: list[tuple[int, int, int, Job]] = []  # heap: step, rank, life

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs)

    def __contains__(self, job: Job) -> bool:
        return job in self._jobs

    @property
    def context_tokens(self) -> int:
        """KV tokens of all sequences."""
        return self._base_tokens + len(self._jobs) * self.num_steps

    @property
    def steps_to_next(self) -> int:
        """Steps until something happens to a sequence. There must be one."""
        while self._due[0][2] != self._due[0][3].life:
            heapq.heappop(self._due)
        return self._due[0][0] - self.num_steps

    def add(self, job: Job) -> None:
        """A sequence decodes from the next step on."""
        self._jobs[job] = None
        job.begun_step = self.num_steps
        self._base_tokens += job.prompt_tokens - self.num_steps
        self.plan(job)

    def plan(self, job: Job) -> None:
        """Plan the next event of a sequence, by the blocks that it has now."""
        full = job.begun_step + len(job.blocks) * self._block_tokens - job.prompt_tokens
        heapq.heappush(self._due, (min(self.end_of(job), full), job.rank, job.life, job))

    def take_due(self) -> Job | None:
        """A sequence that has ended or needs a block now; None: there is none."""
        while self._due and self._due[0][0] <= self.num_steps:
            _, _, life, job = heapq.heappop(self._due)
            if life == job.life:
                return job
        return None

    def end_of(self, job: Job) -> int:
        """The step after which a sequence has its whole answer."""
        return job.begun_step + job.answer_tokens - job.emitted

    def remove(self, job: Job) -> None:
        """A sequence ends or is preempted; its tokens up to now count."""
        del self._jobs[job]
        self._base_tokens -= job.prompt_tokens - job.begun_step
        made = self.num_steps - job.begun_step
        job.emitted += made
        job.prompt_tokens += made
        job.life += 1
