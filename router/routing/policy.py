"""Choice of the workers for a request, by predicted milliseconds, with all reasons. Pure: no clock, network or state.

    cost = queue of P + a*u + b*u*(h + u/2)                     u uncached after h held tokens, on P
         + (1 - overlap) * bytes not held by D / bandwidth      0 for a local prefill
         + queue of D
         + fetch: 2 ms + bytes that another worker holds / bandwidth    0 where nothing is fetched
         + load penalty: the delay to sequences that decode on D, and the work itself, which later requests wait for
         + (slowdown - 1) * time on a throttled GPU     of the prefill on P, and of all steps on D

A local prefill has P = D, and its load penalty covers the steps it takes from D's other sequences. A decode worker that
lacks less than a block computes it itself, so such a pair costs what a local prefill there does. The penalty on work
is why siblings of a burst go where their prefix is being computed, although another worker would be as quick. The best
4 P x the best 4 D, every local prefill and every fetch are compared exactly. A fetch is a local prefill on D after the
blocks that another worker holds of the prompt; only requests that go on after another dispatch have sources for it.
Candidates within the measuring noise of each other count as equal; then fewer sequences under way win, and then a hash
of the request's id, and no worker is always first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ...core.request import Role
from ...kv.handover.pairing import why_refused
from ...kv.spec import HASH_BLOCK_TOKENS, KvSpec
from .coefficients import Coefficients
from .facts import WorkerKey
from .pairs import RefusedPair, pairs_of

CANDIDATES = 4
MEAN_LIFE_TOKENS = 256  # upper bound of the tokens that a sequence is expected to generate
SOURCES = 2  # workers that one order names for a fetch
MOST_LEFT_TOKENS = 64 + HASH_BLOCK_TOKENS  # that a decode worker computes after a fetch without being asked to prefill


@dataclass(frozen=True, slots=True)
class PolicyLimits:
    """The weights of the load penalty, and what counts as equal."""

    overlap: float = 0.8  # share of a hand-over that overlaps with its prefill
    handover_fixed_ms: float = 2.0  # for the stream, promise and bind
    delay_weight: float = 0.5  # penalty in ms per ms of delay of another request
    max_disturbed: int = 64  # sequences whose delay counts: `step.target_ms` bounds it for any number of them
    work_weight: float = 0.2  # penalty in ms per ms of computation, for requests that come next
    equal_ms: float = 0.1  # candidates within this or equal_share of the best count as equal
    equal_share: float = 0.02
    local_prefill: bool = True  # True: decode workers may prefill


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """Facts about a request for the choice."""

    request_id: str
    prompt_tokens: int
    expected_tokens: int  # to be generated, per choice
    num_choices: int = 1


@dataclass(frozen=True, slots=True)
class WorkerView:
    """State of one eligible worker at the time of the choice."""

    key: WorkerKey
    address: str
    role: Role
    numerics: bytes  # must be equal in a pair
    capabilities: tuple[str, ...]  # names; empty: not announced
    kv_spec: KvSpec | None  # of all ranks together; None: not announced
    num_ranks: int
    coefficients: Coefficients
    kv_bytes_per_token: int
    queued_prefill_tokens: int
    queued_prefill_pairs: float
    num_decoding: int
    max_num_seqs: int
    free_kv_tokens: int
    in_flight: int  # sequences that this router has dispatched to it
    slowdown: float = 1.0  # of a throttled GPU: factor on all times; 1: none

    @property
    def worker_id(self) -> str:
        """Name of the worker."""
        return self.key.worker_id


@dataclass(frozen=True, slots=True)
class Terms:
    """Predicted milliseconds, term by term."""

    prefill_queue_ms: float
    prefill_ms: float
    transfer_ms: float
    decode_queue_ms: float
    load_penalty_ms: float  # no part of this request's latency: what it costs other requests, weighted
    throttle_ms: float = 0.0  # what throttled GPUs add, until the measured speeds know of them
    fetch_ms: float = 0.0  # to fetch blocks that another worker holds, before the rest is computed

    @property
    def first_token_ms(self) -> float:
        """Predicted time to the first token; a hand-over delays only the second one."""
        return self.fetch_ms + self.prefill_queue_ms + self.prefill_ms + self.decode_queue_ms

    @property
    def total_ms(self) -> float:
        """Predicted cost of the candidate; the lowest wins."""
        return self.first_token_ms + self.transfer_ms + self.load_penalty_ms + self.throttle_ms


@dataclass(frozen=True, slots=True)
class Source:
    """A worker whose blocks may be fetched: it need not take new work."""

    view: WorkerView
    blocks: int  # leading hash blocks of the prompt that it holds


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to serve the request."""

    decode: WorkerView
    prefill: WorkerView | None  # None: locally, on the decode worker
    prefill_held_tokens: int
    decode_held_tokens: int
    terms: Terms
    is_under_a_block: bool = False  # the decode worker lacks so little that it computes it itself, although paired
    sources: tuple[Source, ...] = ()  # workers whose blocks it fetches first, best first; `prefill` is None then

    @property
    def computes(self) -> WorkerView:
        """The worker that computes the prompt."""
        return self.decode if self.prefill is None or self.is_under_a_block else self.prefill

    @property
    def in_flight(self) -> int:
        """Number of sequences under way on its workers."""
        return self.decode.in_flight + (self.prefill.in_flight if self.prefill else 0)

    @property
    def name(self) -> str:
        """Name for logs: "prefill-0 > decode-1", "decode-1" for a local prefill, "decode-0 >> decode-1" for a fetch."""
        if self.sources:
            return f"{self.sources[0].view.worker_id} >> {self.decode.worker_id}"
        return f"{self.prefill.worker_id} > {self.decode.worker_id}" if self.prefill else self.decode.worker_id


@dataclass(frozen=True, slots=True)
class Asked:
    """All that a decision was made from: equal ones give equal decisions."""

    request: RequestFacts
    workers: tuple[WorkerView, ...]
    held: Mapping[str, int]
    limits: PolicyLimits
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True, slots=True)
class RoutingDecision:
    """The chosen candidate, the reason, and all candidates (cheapest first)."""

    winner: Candidate
    prefill_peers: tuple[WorkerView, ...]  # for the winner's decode worker, best first; empty: prefill locally
    candidates: tuple[Candidate, ...]
    reason: str
    refused: tuple[RefusedPair, ...] = ()  # pairs that would have been candidates
    asked: Asked | None = None  # None: another policy's
    buddy: WorkerView | None = None  # keeps a copy of the stream's KV; not part of the comparison


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
    cost = _Costs(request, held, limits)
    peers = sorted((w for w in workers if w.role is Role.PREFILL), key=cost.prefill_rank)
    decoders = [w for w in workers if w.role is not Role.PREFILL]
    paired = pairs_of(peers, sorted((w for w in decoders if w.role is Role.DECODE), key=cost.decode_rank), CANDIDATES)
    pairs = [cost.pair(p, d) for p, d in paired.possible]
    local = [cost.local(d) for d in decoders if d.role is Role.COMBINED or limits.local_prefill]
    fetches = [found for d in decoders if (found := cost.fetch(d, sources_for(d, sources))) is not None]
    candidates = pairs + local + fetches or [
        cost.local(d) for d in decoders
    ]  # no prefill worker is there: better than nothing
    if not candidates:
        return None
    ranked = sorted(candidates, key=lambda c: (c.terms.total_ms, c.name))
    winner = _pick(ranked, request.request_id, limits)
    reason = _reason(winner, ranked, request)
    asked = Asked(request, tuple(workers), held, limits, tuple(sources))
    return RoutingDecision(winner, _peers(winner, ranked), tuple(ranked), reason, tuple(paired.refused), asked)


class _Figures(NamedTuple):
    """Terms of a worker, equal in every candidate that it is part of."""

    held: int  # leading tokens that it holds, never the last prompt token, which is always computed
    prefill_queue_ms: float
    prefill_ms: float
    missing_bytes: int
    decode_queue_ms: float
    interference_ms: float
    slow_prefill_ms: float  # added by a throttled GPU, as P and as D
    slow_decode_ms: float


class _Costs:
    """Terms of the candidates of one request, computed once per worker."""

    def __init__(self, request: RequestFacts, held: Mapping[str, int], limits: PolicyLimits) -> None:
        self._request = request
        self._held = held
        self._limits = limits
        self._figures: dict[str, _Figures] = {}

    def prefill_rank(self, worker: WorkerView) -> tuple[float, int, bytes]:
        own = self._of(worker)
        total_ms = own.prefill_queue_ms + own.prefill_ms + own.slow_prefill_ms
        return (total_ms, worker.in_flight, _hash(self._request.request_id, worker.worker_id))

    def decode_rank(self, worker: WorkerView) -> tuple[float, int, bytes]:
        own = self._of(worker)
        total_ms = self._transfer_ms(worker, worker) + own.decode_queue_ms + own.interference_ms + own.slow_decode_ms
        return (total_ms, worker.in_flight, _hash(self._request.request_id, worker.worker_id))

    def pair(self, prefill: WorkerView, decode: WorkerView) -> Candidate:
        p, d = self._of(prefill), self._of(decode)
        if self._request.prompt_tokens - d.held < HASH_BLOCK_TOKENS:  # decode_worker/task.py does not ask its peer
            return replace(self.local(decode), prefill=prefill, is_under_a_block=True)
        load_penalty_ms = d.interference_ms + self._limits.work_weight * p.prefill_ms
        transfer_ms = self._transfer_ms(decode, prefill)
        throttle_ms = p.slow_prefill_ms + d.slow_decode_ms
        terms = Terms(p.prefill_queue_ms, p.prefill_ms, transfer_ms, d.decode_queue_ms, load_penalty_ms, throttle_ms)
        return Candidate(decode, prefill, p.held, d.held, terms)

    def local(self, decode: WorkerView) -> Candidate:
        own = self._of(decode)
        # Those who decode there wait while it prefills; on a decode worker so do those who are to come.
        disturbed = min(decode.num_decoding, self._limits.max_disturbed) + (1 if decode.role is Role.DECODE else 0)
        weight = self._limits.work_weight + self._limits.delay_weight * disturbed
        load_penalty_ms = own.interference_ms + weight * own.prefill_ms
        throttle_ms = own.slow_prefill_ms + own.slow_decode_ms
        terms = Terms(own.prefill_queue_ms, own.prefill_ms, 0.0, own.decode_queue_ms, load_penalty_ms, throttle_ms)
        return Candidate(decode, None, own.held, own.held, terms)

    def fetch(self, decode: WorkerView, sources: tuple[Source, ...]) -> Candidate | None:
        """What a fetch on `decode` costs; None: it gains nothing, or leaves so much that a peer should compute it."""
        request, own, limits = self._request, self._of(decode), self._limits
        most = max((source.blocks for source in sources), default=0) * HASH_BLOCK_TOKENS
        held = min(most, (request.prompt_tokens - 1) // HASH_BLOCK_TOKENS * HASH_BLOCK_TOKENS)
        left = request.prompt_tokens - held
        may_prefill = decode.role is Role.COMBINED or limits.local_prefill
        if held <= own.held or not (may_prefill or left <= MOST_LEFT_TOKENS):
            return None
        speed = decode.coefficients
        seconds = (held - own.held) * decode.kv_bytes_per_token / max(1.0, speed.handover_bytes_per_s)
        prefill_ms = speed.prefill_ms(left, held)
        local = self.local(decode).terms
        weight = (local.load_penalty_ms - own.interference_ms) / own.prefill_ms if own.prefill_ms else 0.0
        terms = replace(
            local,
            prefill_ms=prefill_ms,
            fetch_ms=limits.handover_fixed_ms + seconds * 1e3,
            load_penalty_ms=own.interference_ms + weight * prefill_ms,
        )
        return Candidate(decode, None, held, own.held, terms, sources=sources)

    def _of(self, worker: WorkerView) -> _Figures:
        figures = self._figures.get(worker.worker_id)
        if figures is None:
            figures = self._figures[worker.worker_id] = self._look_at(worker)
        return figures

    def _look_at(self, worker: WorkerView) -> _Figures:
        request, speed = self._request, worker.coefficients
        held = min(self._held.get(worker.worker_id, 0) * HASH_BLOCK_TOKENS, request.prompt_tokens - 1)
        uncached = request.prompt_tokens - held
        # One more row in every step: a share of a step for each sequence that is there.
        disturbed = min(worker.num_decoding, self._limits.max_disturbed)
        interference_ms = self._limits.delay_weight * speed.decode_step_ms * disturbed * request.num_choices
        queue_ms = speed.work_ms(worker.queued_prefill_tokens, worker.queued_prefill_pairs)
        prefill_ms, decode_queue_ms = speed.prefill_ms(uncached, held), self._decode_queue_ms(worker)
        steps_ms = speed.decode_step_ms * min(request.expected_tokens, MEAN_LIFE_TOKENS)
        slower = worker.slowdown - 1.0
        return _Figures(
            held,
            queue_ms,
            prefill_ms,
            uncached * worker.kv_bytes_per_token,
            decode_queue_ms,
            interference_ms,
            slower * (queue_ms + prefill_ms),
            slower * (decode_queue_ms + steps_ms),
        )

    def _transfer_ms(self, decode: WorkerView, prefill: WorkerView) -> float:
        bytes_per_s = min(decode.coefficients.handover_bytes_per_s, prefill.coefficients.handover_bytes_per_s)
        seconds = self._of(decode).missing_bytes / max(1.0, bytes_per_s)
        return self._limits.handover_fixed_ms + (1.0 - self._limits.overlap) * seconds * 1e3

    def _decode_queue_ms(self, worker: WorkerView) -> float:
        """Predicted wait for a seat and room, in ms: the sequences that must end first, at the mean rate."""
        request = self._request
        each = request.prompt_tokens + request.expected_tokens
        excess_seqs = float(worker.num_decoding + request.num_choices - worker.max_num_seqs)
        excess_room = request.num_choices - worker.free_kv_tokens / each
        mean_life_ms = worker.coefficients.decode_step_ms * min(request.expected_tokens, MEAN_LIFE_TOKENS)
        excess = max(0.0, excess_seqs, excess_room)
        return excess * mean_life_ms / max(1, min(worker.num_decoding, worker.max_num_seqs))


def _pick(ranked: Sequence[Candidate], request_id: str, limits: PolicyLimits) -> Candidate:
    best_ms = ranked[0].terms.total_ms
    bound_ms = best_ms + max(limits.equal_ms, limits.equal_share * best_ms)
    equal = [c for c in ranked if c.terms.total_ms <= bound_ms]
    return min(equal, key=lambda c: (c.in_flight, _hash(request_id, c.name)))


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


def _hash(request_id: str, name: str) -> bytes:
    return hashlib.blake2b(f"{request_id}\0{name}".encode(), digest_size=8).digest()


def _reason(winner: Candidate, ranked: Sequence[Candidate], request: RequestFacts) -> str:
    terms = winner.terms
    where = f"prefill on {winner.prefill.worker_id}" if winner.prefill else "prefill locally"
    if winner.prefill and winner.is_under_a_block:
        where = f"prefill locally, because less than a block is missing ({winner.prefill.worker_id} stands by)"
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
