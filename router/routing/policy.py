"""Choice of the workers for a request, by predicted milliseconds, with all reasons. Pure: no clock, network or state.

The best 4 P x the best 4 D, every local prefill and every fetch are compared exactly; costs.py has the terms. A fetch
is a local prefill on D after the blocks that another worker holds of the prompt; only requests that go on after another
dispatch have it. The prefill worker of a pair may fetch what decode workers hold, for any request (`returns.py`).
Candidates within the measuring noise of each other count as equal; then fewer sequences
under way win, and then a hash of the request's id, and no worker is always first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...core.request import Role
from ...kv.handover.pairing import why_refused
from .candidates import Asked, Candidate, PolicyLimits, RequestFacts, RoutingDecision, Source, WorkerView
from .costs import Costs, tie_break
from .pairs import pairs_of
from .returns import returns_to

CANDIDATES = 4
SOURCES = 2  # workers that one order names for a fetch


def choose(
    request: RequestFacts,
    workers: Sequence[WorkerView],
    held: Mapping[str, int],
    limits: PolicyLimits,
    sources: Sequence[Source] = (),
) -> RoutingDecision | None:
    """Compare all ways to serve a request. None: no worker can decode it.

    `held`: number of leading hash blocks of this prompt that each worker holds or soon will. `sources`: those whose
    blocks may be fetched.
    """
    cost = Costs(request, held, limits)
    prefillers = sorted((w for w in workers if w.role is Role.PREFILL), key=cost.prefill_rank)
    decoders = [w for w in workers if w.role is not Role.PREFILL]
    paired = pairs_of(
        prefillers, sorted((w for w in decoders if w.role is Role.DECODE), key=cost.decode_rank), CANDIDATES
    )
    pairs = [cost.pair(p, d, returns_to(p, d, sources)) for p, d in paired.possible]
    local = [cost.local(d) for d in decoders if d.role is Role.COMBINED or limits.local_prefill]
    fetchers = decoders if request.is_resumed else []
    fetches = [found for d in fetchers if (found := cost.fetch(d, sources_for(d, sources))) is not None]
    candidates = pairs + local + fetches or [
        cost.local(d) for d in decoders
    ]  # no prefill worker is there: better than nothing
    if not candidates:
        return None
    ranked = sorted(candidates, key=lambda c: (c.terms.total_ms, c.name))
    winner = _pick(ranked, request.request_id, limits)
    reason = _reason(winner, ranked, request)
    asked = Asked(request, tuple(workers), held, limits, tuple(sources))
    peers, refused = _peers(winner, ranked), tuple(paired.refused)
    returns = _returns(winner, ranked)
    return RoutingDecision(winner, peers, tuple(ranked), reason, refused, asked, returns)


def _pick(ranked: Sequence[Candidate], request_id: str, limits: PolicyLimits) -> Candidate:
    best_ms = ranked[0].terms.total_ms
    bound_ms = best_ms + max(limits.equal_ms, limits.equal_share * best_ms)
    equal = [c for c in ranked if c.terms.total_ms <= bound_ms]
    return min(equal, key=lambda c: (c.in_flight, tie_break(request_id, c.name)))


def sources_for(decode: WorkerView, sources: Sequence[Source]) -> tuple[Source, ...]:
    """The workers that `decode` can fetch from, those with most blocks first."""
    fitting = [s for s in sources if s.view.key != decode.key and why_refused(s.view, decode) is None]
    return tuple(sorted(fitting, key=lambda s: (-s.blocks, s.view.in_flight, s.view.worker_id))[:SOURCES])


def _peers(winner: Candidate, ranked: Sequence[Candidate]) -> tuple[WorkerView, ...]:
    """Prefill workers for the winner's decode worker; after a fetch they compute what it did not bring."""
    if winner.prefill is None and not winner.sources:
        return ()
    others = [c.prefill for c in ranked if c.decode.key == winner.decode.key and c.prefill and c is not winner]
    return (winner.prefill, *others) if winner.prefill is not None else tuple(others)


def _returns(winner: Candidate, ranked: Sequence[Candidate]) -> dict[str, tuple[Source, ...]]:
    """Whom each prefill worker fetches from, by its name, for the winner's decode worker."""
    mine = [c for c in ranked if c.decode.key == winner.decode.key]
    return {c.prefill.worker_id: c.returns for c in mine if c.prefill is not None and c.returns}


def _reason(winner: Candidate, ranked: Sequence[Candidate], request: RequestFacts) -> str:
    terms = winner.terms
    where = f"prefill on {winner.prefill.worker_id}" if winner.prefill else "prefill locally"
    if winner.prefill and winner.is_under_a_block:
        where = f"prefill locally, because less than a block is missing ({winner.prefill.worker_id} stands by)"
    if winner.returns:
        where += f" after blocks fetched from {winner.returns[0].view.worker_id}"
    if winner.sources:
        where = f"blocks fetched from {winner.sources[0].view.worker_id}"
    parts = [
        f"{winner.decode.worker_id}, {where}: {terms.total_ms:.1f} ms",
        f"{winner.prefill_held_tokens} of {request.prompt_tokens} tokens held",
    ]
    others = [c for c in ranked if c is not winner]
    if winner.is_under_a_block:  # with or without a peer beside it, the same worker does the same
        others = [c for c in others if c.decode.key != winner.decode.key]
    if others:
        more_ms = others[0].terms.total_ms - terms.total_ms
        than = "as cheap as" if more_ms < 0.05 else f"{more_ms:.1f} ms less than"
        throttled = f", of which {others[0].terms.throttle_ms:.1f} ms for a throttled GPU"
        parts.append(f"{than} {others[0].name}{throttled if others[0].terms.throttle_ms else ''}")
    return "; ".join(parts)
