"""Which workers a request is sent to, and how long it waits if there are none. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ...core.request import Request, Role
from ...kv.block import BlockIdentity
from ...kv.spec import HASH_BLOCK_TOKENS
from ..routing.buddies import buddy_of
from ..routing.candidates import RoutingDecision, Source
from ..routing.known_worker import Worker
from ..routing.policy import choose
from ..routing.returns import RETURNS, has_more
from ..routing.views import views_of
from .roster import Roster
from .state import RequestState
from .surroundings import Driver, LifeLimits
from .suspects import rests_until_s, taken_by_suspects


class Chooser:
    """Choice of workers for the requests of one router."""

    def __init__(self, active: Mapping[str, RequestState], roster: Roster, driver: Driver, limits: LifeLimits) -> None:
        """`active`: all requests that are not settled, kept up to date by their owner."""
        self._active = active
        self._roster = roster
        self._driver = driver
        self._limits = limits

    def choose(self, run: RequestState, now_s: float) -> RoutingDecision | None:
        """The workers with the lowest cost for a request; None: nobody can take it now."""
        if rests_until_s(run) > now_s:
            return None
        request, prefixes = run.request, self._roster.prefixes
        workers = [w for w in _serving(self._roster, request) if not run.excludes(w.facts.key, now_s)]
        if not run.dispatches:  # else a client waits in the middle of its answer, or was promised one
            num, prompt = request.num_choices, len(request.prompt_ids)
            workers = [w for w in workers if w.role is Role.PREFILL or w.has_seat(num, prompt)]
        taken = taken_by_suspects(run, self._active.values())
        if taken:
            workers = [w for w in workers if w.facts.key not in taken]
            if all(w.role is Role.PREFILL for w in workers):
                return None  # common after a loss, when many requests ask: so before anything that costs time
        if run.identities is None:
            known = replace(request, prompt_ids=run.ids_of(run.leading)) if run.has_output else request
            run.identities = self._driver.identities(known, run.model)
        # A scored prompt is always computed, so cached prefixes do not help.
        usable = run.identities if request.sampling.prompt_logprobs is None or run.has_output else ()
        facts = run.facts
        usable = usable[: (facts.prompt_tokens - 1) // HASH_BLOCK_TOKENS]  # the last token is always computed
        expected = prefixes.expected(usable, now_s)
        sources = self._sources(facts.is_resumed, usable, expected)
        choice = choose(facts, views_of(workers), expected, self._limits.policy, sources)
        if choice is not None and self._limits.has_buddies:
            choice = replace(choice, buddy=buddy_of(choice, views_of(workers), expected))
        if choice is not None:
            # Later requests can use the prefix on the worker that computes it, not yet on the decode worker.
            prefixes.predict([choice.winner.computes.worker_id], run.identities, now_s)
        return choice

    def _sources(
        self, is_resumed: bool, identities: Sequence[BlockIdentity], expected: Mapping[str, int]
    ) -> list[Source]:
        """Workers whose blocks may be fetched: of a new request those that have more than a prefill worker.

        If a request goes on after another dispatch, the worker that gives it back is one of them: while it drains, it
        keeps what it has computed. `expected`: blocks that each worker holds or soon will.
        """
        fleet, held = self._roster.fleet, self._roster.prefixes.held(identities)
        holders = [w for w in fleet if w.can_give and held.get(w.facts.worker_id)]
        if not is_resumed:
            prefillers = [w for w in fleet if w.role is Role.PREFILL and RETURNS in w.facts.capabilities]
            theirs = [expected.get(w.facts.worker_id, 0) for w in prefillers]
            decoders = (w for w in holders if w.role is not Role.PREFILL)
            holders = [w for w in decoders if has_more(held[w.facts.worker_id], theirs)]
        return [Source(view, held[view.worker_id]) for view in views_of(holders)]

    def has_room(self, run: RequestState) -> bool:
        """True if a worker can begin a new request about now, or if none can at all, so that queueing does not help."""
        workers = _serving(self._roster, run.request)
        decoders = [w for w in workers if w.role is not Role.PREFILL]
        if not decoders:
            return True
        num, prompt = run.request.num_choices, len(run.request.prompt_ids)
        if not any(w.has_seat(num, prompt) for w in decoders):
            return False
        is_local = self._limits.policy.local_prefill or all(w.role is not Role.PREFILL for w in workers)
        return any(w.can_prefill for w in workers if is_local or w.role is not Role.DECODE)

    def step_ms(self, choice: RoutingDecision) -> float:
        """Measured time of a decode step on the chosen worker; 0: not measured."""
        worker = self._roster.fleet.get(choice.winner.decode.worker_id)
        return 0.0 if worker is None else worker.load.decode_step_ms

    def least_step_ms(self, model: str) -> float:
        """Least measured time of a decode step of all workers; 0: not all have measured it."""
        workers = self._roster.fleet.serving(model)
        return min((w.load.decode_step_ms for w in workers if w.role is not Role.PREFILL), default=0.0)

    def end_of_wait_s(self, run: RequestState, now_s: float) -> float:
        """When a request gives up to wait for a worker: `now_s` if none is in sight.

        A stream that has begun waits as long for any worker as a new request waits for one that is lost or suspect and
        may come back.
        A suspect that waits for its turn waits until its deadline: those before it get on, or end, by theirs. They may
        be another router's: then a worker has refused it.
        """
        model, limits, fleet = run.request.worker_model, self._limits, self._roster.fleet
        may_ask_again = run.suspicion is not None and run.next_ask_s(now_s) < math.inf
        if may_ask_again or taken_by_suspects(run, self._active.values()):
            return now_s + max(0.0, run.left_s(now_s))
        since_s = max(run.waits_since_s, rests_until_s(run))
        end_s = now_s
        if fleet.may_serve_soon(model, run.request.adapter):
            patience_s = limits.worker_patience_s
            if run.has_output or fleet.may_be_lost(model, run.request.adapter):
                patience_s = max(patience_s, limits.worker_return_s)
            end_s = since_s + patience_s
        returns_until_s = fleet.lost.until_s(model)
        if returns_until_s is not None:
            end_s = max(end_s, min(returns_until_s, since_s + limits.worker_return_s))
        return end_s

    def next_look_s(self, run: RequestState, now_s: float) -> float | None:
        """When a waiting request looks for a worker again if nothing changes before; None: it gives up now."""
        if rests_until_s(run) > now_s:
            return rests_until_s(run)
        end_s = self.end_of_wait_s(run, now_s)
        if now_s >= end_s:
            return None
        return min(end_s, run.next_ask_s(now_s))


def _serving(roster: Roster, request: Request) -> list[Worker]:
    """Live workers that can compute a request: those of its model that hold its adapter."""
    return roster.fleet.serving(request.worker_model, request.adapter)
