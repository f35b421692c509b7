"""An oracle: a router that knows every answer's length, every true time, and every cache and queue without a delay.

Not the optimum, which nobody computes: it is greedy. For each request it takes the workers with the lowest sum of the
true time to the first token there and a price for the work, and it sees all requests under way exactly. Its requests
wait in the router as ours do while all workers are full.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...core.request import Role
from ...router.routing.known_worker import Worker
from .job import Job
from .policies import Query, Route
from .trace import Ask
from .worker import SimWorker

WORK_PRICE = 0.5  # in ms per ms of prefill that later requests wait for
STREAM_PRICE = 0.05  # in ms per ms and sequence that decodes there and is delayed


class Oracle:
    """Reads the simulated workers themselves."""

    name = "oracle"

    def __init__(self, workers: Mapping[str, SimWorker], ask_by_id: Mapping[str, Ask]) -> None:
        self._workers = workers
        self._ask_by_id = ask_by_id

    def route(self, query: Query) -> Route:
        """The lowest true cost of all pairs and all local prefills."""
        ask = self._ask_by_id[query.request.request_id.partition("@")[0]]
        prefill = [w for w in query.workers if w.role is Role.PREFILL]
        decode = [w for w in query.workers if w.role is not Role.PREFILL]
        costs = {w.facts.worker_id: self._decode_cost_ms(ask, self._of(w)) for w in decode}
        routes = []
        for place, d in enumerate(decode):
            local_ms = self._prefill_cost_ms(query, ask, d) + costs[d.facts.worker_id]
            routes.append((local_ms, place, Route(d, None)))
        if prefill:
            best = min(decode, key=lambda w: costs[w.facts.worker_id])
            for place, p in enumerate(prefill):
                pair_ms = self._prefill_cost_ms(query, ask, p) + costs[best.facts.worker_id]
                routes.append((pair_ms, len(decode) + place, Route(best, p)))
        return min(routes)[2]

    def _of(self, worker: Worker) -> SimWorker:
        return self._workers[worker.facts.worker_id]

    def _prefill_cost_ms(self, query: Query, ask: Ask, worker: Worker) -> float:
        """True time to the first token, and the price of the work for others."""
        sim = self._of(worker)
        findable = ask.identities[: (ask.prompt_tokens - 1) // sim.cache.block_tokens]
        expected = query.held_tokens.get(worker.facts.worker_id, 0)
        held = min(max(sim.cache.prefix.match(findable) * sim.cache.block_tokens, expected), ask.prompt_tokens - 1)
        own_ms = sim.machine.prefill_s(ask.prompt_tokens - held, held) * 1e3
        before_ms = sum(_left_ms(sim, job) for job in (*sim.prefilling, *sim.waiting, *sim.coming))
        count = len(sim.decoding)
        slower = 1.0
        if count:
            step_ms = sim.machine.step_s(count, sim.decoding.context_tokens) * 1e3
            slower = 1.0 + step_ms / max(sim.policy.limits.target_ms - step_ms, step_ms)
        return (before_ms + own_ms) * slower + (WORK_PRICE + STREAM_PRICE * count) * own_ms

    def _decode_cost_ms(self, ask: Ask, sim: SimWorker) -> float:
        """Time of a step there, and the time until its blocks are free: of the sequences that end first."""
        coming = [j for w in self._workers.values() for j in (*w.prefilling, *w.waiting, *w.coming) if j.decode is sim]
        context = sim.decoding.context_tokens + sum(job.prompt_tokens for job in coming)
        step_ms = sim.machine.step_s(len(sim.decoding) + len(coming) + 1, context + ask.prompt_tokens) * 1e3
        pool = sim.cache.pool
        needed = -(-(ask.prompt_tokens + ask.answer_tokens) // sim.cache.block_tokens)
        lacks, steps = pool.num_live + needed - pool.num_blocks, 0
        for end, blocks in (
            sorted((sim.decoding.end_of(job), len(job.blocks)) for job in sim.decoding) if lacks > 0 else ()
        ):
            steps, lacks = end - sim.decoding.num_steps, lacks - blocks
            if lacks <= 0:
                break
        return step_ms * (1 + steps)


def _left_ms(sim: SimWorker, job: Job) -> float:
    held = job.num_computed or job.likely_cached
    return sim.machine.prefill_s(job.prompt_tokens - held, held) * 1e3
