"""What routing expected in workers' prefix caches, and what they found there. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .state import RequestState


class Foretold(NamedTuple):
    """Prompt tokens of one request on one worker."""

    side: str  # "decode" or "prefill"
    expected: int
    found: int

    @property
    def outcomes(self) -> dict[str, int]:
        """Tokens by outcome: expected and found, expected and missing, found beside them."""
        right = min(self.expected, self.found)
        return {"right": right, "missing": self.expected - right, "more": self.found - right}


def foretold(run: RequestState) -> Iterator[Foretold]:
    """Of a request that one dispatch finished: its first choice, whose prompt the others share."""
    reports = [report for choice, report in run.handovers if choice == 0]
    if run.error is not None or len(run.dispatches) != 1 or len(reports) != 1:
        return
    report, winner = reports[0], run.dispatches[0].choice.winner
    yield Foretold("decode", winner.decode_held_tokens, report["tokens_held"])
    if winner.prefill is not None and winner.prefill.worker_id == report["prefill_worker"]:
        yield Foretold("prefill", winner.prefill_held_tokens, report["prefill_cached_tokens"])
