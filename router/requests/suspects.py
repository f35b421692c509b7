"""Requests that may have killed a worker: which of them, and which workers they may be sent to. Pure.

A request that kills its worker would kill the next one as well, and with it every stream there. So the requests of a
lost worker are suspects until they got further elsewhere:

    a worker is lost ─┬─ no suspect on it ───▶ all its requests are suspects
                      ├─ one suspect on it ──▶ this one is guilty and fails; its other requests are no suspects
                      └─ several (a prefill worker's, or those of two workers) ──▶ they stay suspects

    suspect ── PROOF_TOKENS more tokens of every choice, or its end ──▶ innocent

A suspect is sent only to a worker that computes no other suspect: after a loss there is one to blame. So a request
that kills its worker each time takes two. A worker that was lost for another reason while it computed a suspect makes
that one fail wrongly; this needs two losses within the few steps of the proof.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..routing.facts import WorkerKey

if TYPE_CHECKING:
    from .state import RequestState

PROOF_TOKENS = 4
"""More than the steps whose tokens a dying worker may have computed and not sent."""


@dataclass(frozen=True, slots=True)
class Suspicion:
    """The workers that were lost with a request, and the token counts per choice at which it is innocent."""

    workers: tuple[WorkerKey, ...]
    proof: tuple[int, ...]


def blame(key: WorkerKey, runs: Iterable[RequestState]) -> RequestState | None:
    """A worker was lost without leaving: suspect its requests. Returns the guilty one, if it is known."""
    involved = [run for run in runs if _computes(run, key)]
    suspects = [run for run in involved if run.suspicion is not None]
    if len(suspects) == 1:
        return suspects[0]
    for run in suspects or involved:
        counts = map(run.delivery.tokens_of, range(run.request.num_choices))
        before = run.suspicion.workers if run.suspicion else ()
        run.suspicion = Suspicion((*before, key), tuple(count + PROOF_TOKENS for count in counts))
    return None


def acquit(run: RequestState) -> bool:
    """Drop the suspicion of a request that got far enough. True: it was a suspect until now."""
    suspicion = run.suspicion
    if suspicion is None:
        return False
    if any(run.delivery.tokens_of(choice) < suspicion.proof[choice] for choice in run.delivery.unfinished):
        return False
    run.suspicion = None
    return True


def taken_by_suspects(run: RequestState, runs: Iterable[RequestState]) -> frozenset[WorkerKey]:
    """Decode workers that a request may not be sent to now, because they compute a suspect as it is one."""
    if run.suspicion is None:
        return frozenset()
    return frozenset(other.living.decode for other in runs if other.suspicion is not None and other.living is not None)


def _computes(run: RequestState, key: WorkerKey) -> bool:
    """True if a worker decodes the request, or computes its prompt now."""
    living = run.living
    if living is None:
        return False
    if living.decode == key:
        return True
    lost = run.suspicion.workers if run.suspicion else ()
    peer = next((view.key for view in living.choice.prefill_peers if view.key not in lost), None)
    return peer == key and living.first_token_s is None
