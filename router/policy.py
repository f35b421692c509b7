"""Which workers a request goes to, by predicted milliseconds, with all reasons. Pure: no clock, no network, no state.

    cost = queue of P + a*u + b*u*(h + u/2)                     u uncached after h held tokens, on P
         + (1 - overlap) * bytes not held by D / bandwidth      0 for a local prefill
         + queue of D
         + price: the delay to those who decode on D already, and the work itself, which others will wait for

A local prefill has P = D, and the price of the steps it takes from D's other sequences. The price of work is why
siblings of a burst go where their prefix is being computed, although computing it elsewhere would be as quick. The best
4 P x the best 4 D and every local prefill are compared exactly. Candidates within the measuring noise of each other
count as equal; then fewer sequences under way win, and then a hash of the request's id, and no worker is always first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..core.request import Role
from ..kv.spec import HASH_BLOCK_TOKENS
from .coefficients import Coefficients
from .facts import WorkerKey

BEST = 4


@dataclass(frozen=True, slots=True)
class PolicyLimits:
    """The weights of the price, and what counts as equal."""

    overlap: float = 0.8  # share of a hand-over that hides behind the prefill that produces it
    handover_fixed_ms: float = 2.0  # opening the stream, promise, bind
    delay_weight: float = 0.5  # one ms of delay to another request costs so many of ours
    work_weight: float = 0.2  # one ms of computing costs so many of those that come next
    equal_ms: float = 0.1
    equal_share: float = 0.02
    local_prefill: bool = True  # whether decode workers may prefill


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """What of a request matters for the choice."""

    request_id: str
    prompt_tokens: int
    max_tokens: int
    num_choices: int = 1


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One eligible worker at the moment of the choice."""

    key: WorkerKey
    address: str
    role: Role
    numerics: bytes  # pairs must be equal in it
    coefficients: Coefficients
    kv_bytes_per_token: int
    queued_prefill_tokens: int
    num_decoding: int
    max_num_seqs: int
    free_kv_tokens: int
    in_flight: int  # sequences that this router has there

    @property
    def worker_id(self) -> str:
        """Its name."""
        return self.key.worker_id


@dataclass(frozen=True, slots=True)
class Terms:
    """Predicted milliseconds, term by term."""

    prefill_queue_ms: float
    prefill_ms: float
    transfer_ms: float
    decode_queue_ms: float
    delay_ms: float  # a price, not time: others pay it

    @property
    def first_token_ms(self) -> float:
        """When the first token should be there; a hand-over gates only the second one."""
        return self.prefill_queue_ms + self.prefill_ms + self.decode_queue_ms

    @property
    def total_ms(self) -> float:
        """What is compared."""
        return self.first_token_ms + self.transfer_ms + self.delay_ms


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to serve the request."""

    decode: WorkerView
    prefill: WorkerView | None  # None: locally, on the decode worker
    prefill_held_tokens: int
    decode_held_tokens: int
    terms: Terms

    @property
    def in_flight(self) -> int:
        """Sequences under way on its workers."""
        return self.decode.in_flight + (self.prefill.in_flight if self.prefill else 0)

    @property
    def name(self) -> str:
        """For logs: "prefill-0 > decode-1", or "decode-1" alone."""
        return f"{self.prefill.worker_id} > {self.decode.worker_id}" if self.prefill else self.decode.worker_id


@dataclass(frozen=True, slots=True)
class Choice:
    """The winner, why, and everything it was compared with (cheapest first)."""

    winner: Candidate
    prefill_peers: tuple[WorkerView, ...]  # for the winner's decode worker, best first; empty: prefill locally
    candidates: tuple[Candidate, ...]
    reason: str


def choose(
    request: RequestFacts, workers: Sequence[WorkerView], held: Mapping[str, int], limits: PolicyLimits
) -> Choice | None:
    """Compare all ways to serve a request. None: nobody can decode it.

    `held`: hash blocks of this prompt that each worker holds or soon will.
    """
    cost = _Costs(request, held, limits)
    peers = sorted((w for w in workers if w.role is Role.PREFILL), key=cost.prefill_rank)[:BEST]
    homes = [w for w in workers if w.role is not Role.PREFILL]
    pairs = [
        cost.pair(p, d)
        for d in sorted((w for w in homes if w.role is Role.DECODE), key=cost.decode_rank)[:BEST]
        for p in peers
        if p.numerics == d.numerics
    ]
    own = [cost.local(home) for home in homes if home.role is Role.COMBINED or limits.local_prefill]
    candidates = pairs + own or [cost.local(home) for home in homes]  # no prefill worker is there: better than nothing
    if not candidates:
        return None
    ranked = sorted(candidates, key=lambda c: (c.terms.total_ms, c.name))
    winner = _pick(ranked, request.request_id, limits)
    return Choice(winner, _peers(winner, ranked), tuple(ranked), _reason(winner, ranked, request))


class _Costs:
    """The terms of one request's candidates."""

    def __init__(self, request: RequestFacts, held: Mapping[str, int], limits: PolicyLimits) -> None:
        self._request = request
        self._held = held
        self._limits = limits

    def held_tokens(self, worker: WorkerView) -> int:
        """Leading tokens that need no computing there; the last one always does."""
        return min(self._held.get(worker.worker_id, 0) * HASH_BLOCK_TOKENS, self._request.prompt_tokens - 1)

    def prefill_rank(self, worker: WorkerView) -> tuple[float, int, bytes]:
        total_ms = self._prefill_queue_ms(worker) + self._prefill_ms(worker)
        return (total_ms, worker.in_flight, _hash(self._request.request_id, worker.worker_id))

    def decode_rank(self, worker: WorkerView) -> tuple[float, int, bytes]:
        total_ms = self._transfer_ms(worker) + self._decode_queue_ms(worker) + self._crowd_ms(worker)
        return (total_ms, worker.in_flight, _hash(self._request.request_id, worker.worker_id))

    def pair(self, prefill: WorkerView, decode: WorkerView) -> Candidate:
        prefill_ms = self._prefill_ms(prefill)
        terms = Terms(
            self._prefill_queue_ms(prefill),
            prefill_ms,
            self._transfer_ms(decode, prefill),
            self._decode_queue_ms(decode),
            self._crowd_ms(decode) + self._limits.work_weight * prefill_ms,
        )
        return Candidate(decode, prefill, self.held_tokens(prefill), self.held_tokens(decode), terms)

    def local(self, home: WorkerView) -> Candidate:
        prefill_ms = self._prefill_ms(home)
        # Those who decode there wait while it prefills; on a decode worker so do those who are to come.
        disturbed = home.num_decoding + (1 if home.role is Role.DECODE else 0)
        price = self._limits.work_weight + self._limits.delay_weight * disturbed
        delay_ms = self._crowd_ms(home) + price * prefill_ms
        terms = Terms(self._prefill_queue_ms(home), prefill_ms, 0.0, self._decode_queue_ms(home), delay_ms)
        return Candidate(home, None, self.held_tokens(home), self.held_tokens(home), terms)

    def _prefill_queue_ms(self, worker: WorkerView) -> float:
        return worker.coefficients.prefill_ms_per_token * worker.queued_prefill_tokens

    def _prefill_ms(self, worker: WorkerView) -> float:
        held = self.held_tokens(worker)
        return worker.coefficients.prefill_ms(self._request.prompt_tokens - held, held)

    def _transfer_ms(self, decode: WorkerView, prefill: WorkerView | None = None) -> float:
        missing = (self._request.prompt_tokens - self.held_tokens(decode)) * decode.kv_bytes_per_token
        links = [w.coefficients.handover_bytes_per_s for w in (decode, prefill) if w is not None]
        seconds = missing / max(1.0, min(links))
        return self._limits.handover_fixed_ms + (1.0 - self._limits.overlap) * seconds * 1e3

    def _decode_queue_ms(self, worker: WorkerView) -> float:
        """Until a place and room are free: as many steps as sequences must end first, at their mean pace."""
        request = self._request
        needed = request.num_choices * (request.prompt_tokens + request.max_tokens)
        each = max(1.0, needed / request.num_choices)
        excess_seqs = worker.num_decoding + request.num_choices - worker.max_num_seqs
        excess_room = (needed - worker.free_kv_tokens) / each
        excess = max(0.0, float(excess_seqs), excess_room)
        mean_life_ms = worker.coefficients.decode_step_ms * min(request.max_tokens, 256)
        return excess * mean_life_ms / max(1, min(worker.num_decoding, worker.max_num_seqs))

    def _crowd_ms(self, worker: WorkerView) -> float:
        """One more row in every step: a share of a step for each sequence that is there."""
        step_ms = worker.coefficients.decode_step_ms
        return self._limits.delay_weight * step_ms * worker.num_decoding * self._request.num_choices


def _pick(ranked: Sequence[Candidate], request_id: str, limits: PolicyLimits) -> Candidate:
    best_ms = ranked[0].terms.total_ms
    bound_ms = best_ms + max(limits.equal_ms, limits.equal_share * best_ms)
    equal = [c for c in ranked if c.terms.total_ms <= bound_ms]
    return min(equal, key=lambda c: (c.in_flight, _hash(request_id, c.name)))


def _peers(winner: Candidate, ranked: Sequence[Candidate]) -> tuple[WorkerView, ...]:
    if winner.prefill is None:
        return ()
    others = [c.prefill for c in ranked if c.decode.key == winner.decode.key and c.prefill and c is not winner]
    return (winner.prefill, *others)


def _hash(request_id: str, name: str) -> bytes:
    return hashlib.blake2b(f"{request_id}\0{name}".encode(), digest_size=8).digest()


def _reason(winner: Candidate, ranked: Sequence[Candidate], request: RequestFacts) -> str:
    terms = winner.terms
    where = f"prefill on {winner.prefill.worker_id}" if winner.prefill else "prefill locally"
    parts = [
        f"{winner.decode.worker_id}, {where}: {terms.total_ms:.1f} ms",
        f"{winner.prefill_held_tokens} of {request.prompt_tokens} tokens held",
    ]
    others = [c for c in ranked if c is not winner]
    if others:
        more_ms = others[0].terms.total_ms - terms.total_ms
        than = "as cheap as" if more_ms < 0.05 else f"{more_ms:.1f} ms less than"
        parts.append(f"{than} {others[0].name}")
    return "; ".join(parts)
