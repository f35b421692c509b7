"""State of one worker in a router: what it announced and reported, and the work sent to it. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ...core.request import Role, SequenceKey
from .facts import GpuFacts, LoadFacts, WorkerFacts, WorkerState

REPORT_LAG_S = 0.25
"""A load report may lack work that was dispatched less than this time before its arrival."""

AHEAD_SHARE = 0.25
"""Sequences that a worker may have waiting, as a share of its seats, so that none of them is empty between two."""

AHEAD_BATCHES = 2
"""Prefill steps' worth of prompts that a worker may have waiting."""

LEAST_BATCH_TOKENS = 512
"""Smallest step that counts for these, of a worker that announced a smaller one or none."""

STALL_STEPS = 5.0
"""A step that takes so many times the longest one that is to be expected stands still."""

LEAST_STALL_S = 1.0
"""And at least so long, however short the steps are."""

MAX_SLOWDOWN = 100.0
"""Largest factor of a throttled GPU that counts, whatever a worker reports."""


@dataclass(frozen=True, slots=True)
class Dispatched:
    """Cost of one sequence for one worker, as estimated at dispatch."""

    at_s: float
    prefill_tokens: int  # to compute here; 0 after the first token, or for a pair's decode side
    context_tokens: int  # to hold here while decoding; 0 for a pair's prefill side
    prefill_pairs: float = (
        0.0  # (query, key) pairs of `prefill_tokens`: the part of their cost that grows with the square
    )


@dataclass(slots=True)
class Worker:
    """State of one worker in this router."""

    facts: WorkerFacts
    heard_s: float  # time of its last message on any stream
    beat_s: float  # time of its last message on its session
    announcing: bool = True
    welcomed: bool = False  # its session was up at least once in this incarnation
    session_up: bool = False
    leaving: bool = False  # it said that it goes; it does not take that back
    draining: bool = False  # by its last load report, or because it leaves
    silent: bool = False  # no message on its session for suspect_after_s
    phase: str = ""
    steps: int = 0
    step_changed_s: float = 0.0
    stalled: bool = False
    load: LoadFacts = field(default_factory=LoadFacts)
    load_s: float | None = None
    role: Role = Role.DECODE
    in_flight: dict[SequenceKey, Dispatched] = field(default_factory=dict)

    @property
    def state(self) -> WorkerState:
        """Present state."""
        if not self.session_up:
            return WorkerState.SUSPECT if self.welcomed else WorkerState.JOINING
        if self.draining:
            return WorkerState.DRAINING
        return WorkerState.SUSPECT if self.silent or self.stalled else WorkerState.LIVE

    @property
    def comes_back(self) -> bool:
        """True if it drains only to change its cache's codec."""
        return bool(self.facts.changes_codec_to) and not self.leaving

    @property
    def can_give(self) -> bool:
        """True if it can be asked for cached blocks: also while it drains."""
        return self.session_up and not (self.silent or self.stalled)

    @property
    def gpus(self) -> tuple[GpuFacts, ...]:
        """Its GPUs by its last report."""
        return self.load.gpus or self.facts.gpus

    @property
    def slowdown(self) -> float:
        """Factor on predicted times while a GPU of it is throttled; 1: none is."""
        slowdowns = [gpu.slowdown for gpu in self.gpus if gpu.verdict == "throttled"]
        return max((min(MAX_SLOWDOWN, max(1.0, slowdown)) for slowdown in slowdowns), default=1.0)  # NaN counts as 1

    def stall_s(self, otherwise_s: float) -> float:
        """Time without a step after which the step loop stands still, by the worker's own times; at most `otherwise_s`.

        The longest step computes as many prompt tokens as it may, behind a whole context.
        """
        load, most = self.load, max(LEAST_BATCH_TOKENS, self.facts.max_batch_tokens)
        if not load.prefill_ms_per_token:
            return otherwise_s
        pairs = most * max(most, self.facts.model.max_model_len)
        longest_ms = load.decode_step_ms + most * load.prefill_ms_per_token + pairs * load.prefill_ms_per_token_pair
        return min(otherwise_s, max(LEAST_STALL_S, STALL_STEPS * self.slowdown * longest_ms / 1000))

    @property
    def queued_prefill_tokens(self) -> int:
        """Tokens to compute before a new prompt: reported plus later dispatches, or recent dispatches if more."""
        return int(self._queued(self.load.queued_prefill_tokens, lambda work: work.prefill_tokens))

    @property
    def queued_prefill_pairs(self) -> float:
        """The same in (query, key) pairs."""
        return self._queued(self.load.queued_prefill_pairs, lambda work: work.prefill_pairs)

    def _queued(self, reported: float, amount: Callable[[Dispatched], float]) -> float:
        since = self.load_s
        if since is None:
            return sum(amount(d) for d in self.in_flight.values())
        later = recent = 0.0
        for work in self.in_flight.values():
            if work.at_s > since - REPORT_LAG_S:
                recent += amount(work)
                later += amount(work) if work.at_s > since else 0.0
        return max(reported + later, recent)

    @property
    def num_decoding(self) -> int:
        """Number of sequences that decode or wait to, own dispatches included."""
        own = [d for d in self.in_flight.values() if d.context_tokens]
        if self.load_s is None:
            return len(own)
        later = sum(1 for d in own if d.at_s > self.load_s)
        return max(self.load.waiting + self.load.running + later, len(own))

    @property
    def free_kv_tokens(self) -> int:
        """Free and unpromised room in tokens, minus the work dispatched since the report."""
        if self.load_s is None:
            return self.facts.num_kv_tokens - sum(d.context_tokens for d in self.in_flight.values())
        later = sum(d.context_tokens for d in self.in_flight.values() if d.at_s > self.load_s - REPORT_LAG_S)
        return (self.load.free_blocks - self.load.promised_blocks) * self.facts.block_tokens - later

    def has_seat(self, num_sequences: int, prompt_tokens: int) -> bool:
        """True if it can take this many more sequences of one prompt, or nearly so. An idle worker takes any."""
        decoding = self.num_decoding
        if not decoding:
            return True
        seats = self.facts.max_num_seqs
        most = seats + max(1, int(seats * AHEAD_SHARE))
        return decoding + num_sequences <= most and self.free_kv_tokens >= prompt_tokens

    @property
    def can_prefill(self) -> bool:
        """True if it will begin another prompt within a few steps."""
        return self.queued_prefill_tokens < AHEAD_BATCHES * max(LEAST_BATCH_TOKENS, self.facts.max_batch_tokens)
