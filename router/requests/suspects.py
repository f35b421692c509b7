"""Requests that may have killed a worker: which of them, and which workers they may be sent to. Pure.

A request that kills its worker would kill the next one as well, and with it every stream there. So the requests of a
lost worker are suspects until they got further elsewhere:

    a worker is lost ─┬─ no suspect on it ─────────────▶ all its requests are suspects
                      ├─ one suspect, confirmed there ─▶ this one is guilty and fails; the others are no suspects
                      ├─ one suspect, not confirmed ───▶ all its requests are suspects; this one rests for APART_S
                      └─ several (a prefill worker's) ─▶ they stay suspects

    suspect ── PROOF_TOKENS more tokens of every choice, or its end ──▶ innocent
            ── all those workers are back in the same life ───────────▶ innocent: they were cut off, or slow

A suspect is sent only to a worker that computes no other suspect: after a loss there is one to blame. So a request
that kills its worker each time takes two. After one was found guilty the others rest for APART_S, because its workers
may compute it until they hear of its end.

**Confirmed.** Workers that were killed in one instant are noticed one after the other, so a suspect may be sent to one
that is dead already. Orders of suspects therefore ask to be confirmed (`Submit.confirm`). A decode worker says
`OrderTaken` before it begins with the order, and before a prefill worker begins with its prompt: it confirms that one
for it, when the peer's turn is next and no blocks are bound yet. What is said is on its way before the work can kill
anybody. A loss without it says nothing about the request: the worker never had it, or did not live to tell.

**Bounds.** A request whose worker is lost each time before it could confirm is guilty of the MAX_UNCONFIRMED-th such
loss: it takes three workers. Losses within APART_S of each other count once, and it is sent nowhere for so long, so
that of workers lost in one instant, however many, only one counts. A worker without the capability CONFIRMS counts as
if it had confirmed.

Both numbers are of losses that this router sees. A decode worker whose peer is lost asks the next one, or computes the
prompt itself, without asking its router: a prompt that kills prefill workers may take all peers of an order and its
decode worker before the first of these losses is noticed.

A worker that was lost for another reason after it confirmed a suspect makes that one fail wrongly; this needs two
losses within the few steps of the proof.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..routing.facts import WorkerKey

if TYPE_CHECKING:
    from .attempts import Dispatch
    from .state import RequestState

PROOF_TOKENS = 4
"""More than the steps whose tokens a dying worker may have computed and not sent."""

MAX_UNCONFIRMED = 2
"""Losses of a suspect's worker that did not confirm it, apart from each other: the last of them is its own fault."""

APART_S = 1.0
"""Losses further apart are no single event: a dead process's connections end within milliseconds."""


@dataclass(frozen=True, slots=True)
class Suspicion:
    """The workers that were lost with a request, and the token counts per choice at which it is innocent."""

    workers: tuple[WorkerKey, ...]
    proof: tuple[int, ...]
    num_unconfirmed: int = 0  # losses that count of workers that had not confirmed it
    unconfirmed_s: float = -math.inf  # time of the last one that counts
    rests_until_s: float = -math.inf  # it is sent nowhere until then


def blame(key: WorkerKey, runs: Iterable[RequestState], now_s: float) -> RequestState | None:
    """A worker was lost without leaving: suspect its requests. Returns the guilty one, if it is known."""
    involved = [run for run in runs if _computes(run, key)]
    suspects = [run for run in involved if run.suspicion is not None]
    confirmed = [run for run in suspects if _is_confirmed(run, key)]
    if len(suspects) == 1 and (confirmed or _uses_up_its_bound(suspects[0], now_s)):
        return suspects[0]
    for run in suspects if confirmed else involved:
        _suspect(run, key, now_s, is_alone=len(suspects) == 1, is_confirmed=run in confirmed)
    return None


def forgive(runs: Iterable[RequestState], lives: Callable[[WorkerKey], bool]) -> bool:
    """Drop suspicions for workers that are back in the same life: they were cut off, or slow. True: one is dropped.

    One that a request makes hang does not come back: its supervisor kills it, or it stays away.
    """
    is_one_dropped = False
    for run in runs:
        old = run.suspicion
        if old is None:
            continue
        left = tuple(key for key in old.workers if not lives(key))
        if not left:
            run.suspicion, is_one_dropped = None, True
        elif left != old.workers:
            # As if only those had been lost: the first loss makes it a suspect, and counts for nothing more.
            run.suspicion = replace(old, workers=left, num_unconfirmed=min(old.num_unconfirmed, len(left) - 1))
    return is_one_dropped


def rest(runs: Iterable[RequestState], now_s: float) -> None:
    """Send no suspect anywhere for a while: a guilty request was ended, and its workers may not know it yet."""
    for run in runs:
        if run.suspicion is not None:
            until_s = max(run.suspicion.rests_until_s, now_s + APART_S)
            run.suspicion = replace(run.suspicion, rests_until_s=until_s)


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


def rests_until_s(run: RequestState) -> float:
    """Time until which a request is sent nowhere; the past: it may be sent now."""
    return -math.inf if run.suspicion is None else run.suspicion.rests_until_s


def _suspect(run: RequestState, key: WorkerKey, now_s: float, *, is_alone: bool, is_confirmed: bool) -> None:
    """Note the loss of a worker in a request's suspicion. Its first one is no reason to rest."""
    proof = tuple(run.delivery.tokens_of(choice) + PROOF_TOKENS for choice in range(run.request.num_choices))
    old = run.suspicion
    if old is None:
        run.suspicion = Suspicion((key,), proof)
        return
    count, last_s, rests_s = old.num_unconfirmed, old.unconfirmed_s, old.rests_until_s
    if is_alone and not is_confirmed and _counts(old, now_s):
        count, last_s = count + 1, now_s
    if not is_confirmed and run.living is not None and run.living.decode == key:
        rests_s = now_s + APART_S
    run.suspicion = Suspicion((*old.workers, key), proof, count, last_s, rests_s)


def _is_confirmed(run: RequestState, key: WorkerKey) -> bool:
    """True if a lost worker had said that it works on the request, or belongs to a decode worker that never says so."""
    living = run.living
    if living is None:
        return False
    said = living.is_taken if living.decode == key else living.prefill == key
    return said or not living.confirms


def _uses_up_its_bound(run: RequestState, now_s: float) -> bool:
    """True if one more loss that was not confirmed is too many for a suspect."""
    old = run.suspicion
    return old is not None and _counts(old, now_s) and old.num_unconfirmed + 1 >= MAX_UNCONFIRMED


def _counts(old: Suspicion, now_s: float) -> bool:
    """True if a loss now is another event than the last one that counted."""
    return now_s - old.unconfirmed_s >= APART_S


def _computes(run: RequestState, key: WorkerKey) -> bool:
    """True if a worker decodes the request, or computes its prompt now."""
    living = run.living
    if living is None:
        return False
    if living.decode == key:
        return True
    return _prefill_of(run, living) == key and any(
        run.delivery.tokens_of(choice) == living.begins_with(choice) for choice in run.delivery.unfinished
    )


def _prefill_of(run: RequestState, living: Dispatch) -> WorkerKey | None:
    """The prefill worker that computes a request's prompt: as its decode worker said last, or the best that is left."""
    lost = run.suspicion.workers if run.suspicion else ()
    if living.prefill is not None and living.prefill not in lost:
        return living.prefill
    return next((view.key for view in living.choice.prefill_peers if view.key not in lost), None)
