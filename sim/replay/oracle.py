"""An oracle: the production policy with true facts in place of reports, estimates and hints.

It knows each answer's length, what every worker computes and decodes at this moment (with orders still under way), its
true speed, and which blocks each cache holds now. So the regret to it is the price of what a router cannot know. It is
not the best that is possible: it chooses for one request after the other, and by the production costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ...kv.spec import HASH_BLOCK_TOKENS
from ...router.routing.candidates import PolicyLimits, RequestFacts, WorkerView
from ...router.routing.coefficients import Coefficients, pairs_of
from ...router.routing.policy import choose
from ...router.routing.views import views_of
from .policies import Query, Route
from .spec import HANDOVER_BYTES_PER_S
from .trace import Ask
from .worker import SimWorker


class Oracle:
    """Reads the simulated workers themselves."""

    name = "oracle"

    def __init__(self, workers: Mapping[str, SimWorker], ask_by_id: Mapping[str, Ask]) -> None:
        self._workers = workers
        self._ask_by_id = ask_by_id

    def route(self, query: Query) -> Route:
        """The production choice among true views."""
        ask = self._ask_by_id[query.request.request_id.partition("@")[0]]
        request = RequestFacts(query.request.request_id, ask.prompt_tokens, ask.answer_tokens)
        views = [self._true(view) for view in views_of(query.workers)]
        held = {view.worker_id: self._held(ask, view.worker_id, query) // HASH_BLOCK_TOKENS for view in views}
        choice = choose(request, views, held, PolicyLimits())
        assert choice is not None
        by_name = {worker.facts.worker_id: worker for worker in query.workers}
        winner = choice.winner
        return Route(
            by_name[winner.decode.worker_id],
            None if winner.computes is winner.decode else by_name[winner.computes.worker_id],
        )

    def _true(self, view: WorkerView) -> WorkerView:
        sim = self._workers[view.worker_id]
        machine, decoding, pool = sim.machine, sim.decoding, sim.cache.pool
        queue = [*sim.prefilling, *sim.waiting, *sim.coming]
        # Bound and under way: sequences that will decode here, whoever computes their prompts.
        to_come = sum(
            1 for w in self._workers.values() for job in (*w.prefilling, *w.waiting, *w.coming) if job.decode is sim
        )
        step_ms = machine.step_s(max(1, len(decoding)), decoding.context_tokens) * 1e3
        return replace(
            view,
            coefficients=Coefficients(
                machine.prefill_ms_per_token, machine.prefill_ms_per_token_pair, step_ms, HANDOVER_BYTES_PER_S
            ),
            queued_prefill_tokens=sum(job.num_expected for job in queue),
            queued_prefill_pairs=sum(pairs_of(job.num_expected, job.prompt_tokens - job.num_expected) for job in queue),
            num_decoding=len(decoding) + to_come,
            free_kv_tokens=pool.num_free * sim.cache.block_tokens
            - sum(j.prompt_tokens for j in sim.coming if j.decode is sim),
        )

    def _held(self, ask: Ask, name: str, query: Query) -> int:
        """Leading tokens that a worker has, or that it is about to compute."""
        sim = self._workers[name]
        now = sim.cache.prefix.match(ask.identities) * sim.cache.block_tokens
        return max(now, query.held_tokens.get(name, 0))
