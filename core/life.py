"""What one request leaves in the metrics when it is over. Knows no exposition format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .request import FinishReason
from .timeline import Phases


@dataclass(frozen=True, slots=True)
class Transfer:
    """One hand-over that a decode worker received whole."""

    num_bytes: int
    duration_s: float | None  # from the first frame to the last, what prefill computed meanwhile included


@dataclass(frozen=True, slots=True)
class Life:
    """A finished request (at the router), or a finished sequence (at a worker, which knows single choices only)."""

    prompt_tokens: int
    max_tokens: int
    generated: tuple[int, ...]  # tokens of each choice; the first one is whose phases these are
    reasons: tuple[FinishReason, ...]  # of each choice
    phases: Phases
    ttft_s: float | None
    e2e_s: float
    gaps_s: Sequence[float] = ()  # between tokens
    cached_tokens: int = 0  # of the prompt, that a prefix cache had
    computed_tokens: int = 0  # of the prompt, whose KV was computed for it (at a worker: by this one)
    asked_tokens: int = 0  # of the prompt, that a prefill worker was asked for
    moved_tokens: int = 0  # of those, how many came
    transfers: tuple[Transfer, ...] = ()

    @property
    def is_finished(self) -> bool:
        """Whether it came to the end that was asked for: no error, no cancel."""
        return not {FinishReason.ERROR, FinishReason.CANCELLED} & set(self.reasons)


def forget(life: Life) -> None:
    """For who keeps no metrics."""
