"""Values of a finished request that are counted in the metrics. Knows no exposition format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .request import FinishReason
from .timeline import Phases


@dataclass(frozen=True, slots=True)
class Transfer:
    """One hand-over that a decode worker received completely."""

    num_bytes: int
    duration_s: float | None  # from the first frame to the last; includes prefill computation


@dataclass(frozen=True, slots=True)
class Life:
    """Counted values of a finished request (router), or of a finished sequence (worker: each choice is one)."""

    prompt_tokens: int
    max_tokens: int
    generated: tuple[int, ...]  # tokens of each choice; `phases` belongs to the first one
    reasons: tuple[FinishReason, ...]  # finish reason of each choice
    phases: Phases
    ttft_s: float | None
    e2e_s: float
    gaps_s: Sequence[float] = ()  # times between tokens
    cached_tokens: int = 0  # prompt tokens found in a prefix cache
    computed_tokens: int = 0  # prompt tokens whose KV was computed (worker: here)
    asked_tokens: int = 0  # prompt tokens requested from a prefill worker
    moved_tokens: int = 0  # requested prompt tokens that arrived
    transfers: tuple[Transfer, ...] = ()

    @property
    def is_finished(self) -> bool:
        """True if no choice ended by an error or a cancel."""
        return not {FinishReason.ERROR, FinishReason.CANCELLED} & set(self.reasons)


def forget(life: Life) -> None:
    """Ignore a finished request, where no metrics are kept."""
