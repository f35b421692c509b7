"""Metrics of an ended request, from its state. Reads state, changes none."""

from __future__ import annotations

from ...core.errors import Cancelled
from ...core.life import Life
from ...core.request import FinishReason
from ...core.timeline import Instant
from .state import RequestState


def life_of(run: RequestState, now_s: float) -> Life:
    """Metrics of a request whose stream is closed."""
    usage, timeline = run.usage, run.timeline
    admitted_s = timeline.at_s(Instant.ADMITTED)
    counts = [run.delivery.tokens_of(choice) for choice in range(run.request.num_choices)]
    first = run.first_choice or 0
    other = FinishReason.CANCELLED if isinstance(run.error, Cancelled) else FinishReason.ERROR
    reports = [report for _, report in run.handovers]
    return Life(
        prompt_tokens=usage.prompt_tokens,
        max_tokens=run.request.sampling.max_tokens,
        generated=(counts[first], *counts[:first], *counts[first + 1 :]),
        reasons=tuple(reason or other for reason in run.delivery.finish_reasons),
        phases=timeline.phases(run.arrived_s if admitted_s is None else admitted_s),
        ttft_s=timeline.between_s(Instant.ARRIVED, Instant.FIRST_SENT),
        e2e_s=now_s - run.arrived_s,
        gaps_s=run.token_gaps_s,
        cached_tokens=usage.cached_tokens,
        computed_tokens=usage.prompt_tokens - usage.cached_tokens,
        asked_tokens=sum(report["tokens_asked"] for report in reports),
        moved_tokens=sum(report["tokens_moved"] for report in reports),
        transfers=tuple(run.transfers),
    )
