"""Predicted cost of each candidate of one request, in milliseconds. Pure.

    cost = queue of P + a*u + b*u*(h + u/2)                     u uncached after h held tokens, on P
         + (1 - overlap) * bytes not held by D / bandwidth      0 for a local prefill
         + queue of D
         + fetch: 2 ms + bytes that another worker holds / bandwidth    by D, or by P from decode workers; else 0
         + load penalty: the delay to sequences that decode on D, and the work itself, which later requests wait for
         + (slowdown - 1) * time on a throttled GPU     of the prefill on P, and of all steps on D

A local prefill has P = D, and its load penalty covers the steps it takes from D's other sequences. A decode worker that
lacks less than a block computes it itself, so such a pair costs what a local prefill there does. The penalty on work
is why siblings of a burst go where their prefix is being computed, although another worker would be as quick.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from ...core.request import Role
from ...kv.spec import HASH_BLOCK_TOKENS
from .candidates import Candidate, PolicyLimits, RequestFacts, Source, Terms, WorkerView

MEAN_LIFE_TOKENS = 256  # upper bound of the tokens that a sequence is expected to generate
MOST_LEFT_TOKENS = 64 + HASH_BLOCK_TOKENS  # that a decode worker computes after a fetch without being asked to prefill


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


class Costs:
    """Terms of the candidates of one request, computed once per worker."""

    def __init__(self, request: RequestFacts, held: Mapping[str, int], limits: PolicyLimits) -> None:
        self._request = request
        self._held = held
        self._limits = limits
        self._figures: dict[str, _Figures] = {}

    def prefill_rank(self, worker: WorkerView) -> tuple[float, int, bytes]:
        """Order of prefill workers, best first."""
        own = self._of(worker)
        total_ms = own.prefill_queue_ms + own.prefill_ms + own.slow_prefill_ms
        return (total_ms, worker.in_flight, tie_break(self._request.request_id, worker.worker_id))

    def decode_rank(self, worker: WorkerView) -> tuple[float, int, bytes]:
        """Order of decode workers, best first."""
        own = self._of(worker)
        total_ms = self._transfer_ms(worker, worker) + own.decode_queue_ms + own.interference_ms + own.slow_decode_ms
        return (total_ms, worker.in_flight, tie_break(self._request.request_id, worker.worker_id))

    def pair(self, prefill: WorkerView, decode: WorkerView, returns: tuple[Source, ...] = ()) -> Candidate:
        """What a hand-over from `prefill` to `decode` costs; after a fetch from `returns` if that is cheaper."""
        p, d = self._of(prefill), self._of(decode)
        if self._request.prompt_tokens - d.held < HASH_BLOCK_TOKENS:  # decode_worker/task.py does not ask its peer
            return replace(self.local(decode), prefill=prefill, is_under_a_block=True)
        load_penalty_ms = d.interference_ms + self._limits.work_weight * p.prefill_ms
        transfer_ms = self._transfer_ms(decode, prefill)
        throttle_ms = p.slow_prefill_ms + d.slow_decode_ms
        terms = Terms(p.prefill_queue_ms, p.prefill_ms, transfer_ms, d.decode_queue_ms, load_penalty_ms, throttle_ms)
        plain = Candidate(decode, prefill, p.held, d.held, terms)
        returned = self._after_return(plain, prefill, returns)
        return returned if returned is not None and returned.terms.total_ms < terms.total_ms else plain

    def _after_return(self, plain: Candidate, prefill: WorkerView, returns: tuple[Source, ...]) -> Candidate | None:
        """A hand-over whose prefill worker first fetches what `returns` hold; None: they hold no more than it has."""
        request, own, limits, speed = self._request, self._of(prefill), self._limits, prefill.coefficients
        most = max((source.blocks for source in returns), default=0) * HASH_BLOCK_TOKENS
        held = min(most, (request.prompt_tokens - 1) // HASH_BLOCK_TOKENS * HASH_BLOCK_TOKENS)
        if held <= own.held:
            return None
        bytes_per_s = min(speed.handover_bytes_per_s, returns[0].view.coefficients.handover_bytes_per_s)
        seconds = (held - own.held) * prefill.kv_bytes_per_token / max(1.0, bytes_per_s)
        prefill_ms = speed.prefill_ms(request.prompt_tokens - held, held)
        saved_ms = own.prefill_ms - prefill_ms
        terms = replace(
            plain.terms,
            prefill_ms=prefill_ms,
            fetch_ms=limits.handover_fixed_ms + seconds * 1e3,
            load_penalty_ms=plain.terms.load_penalty_ms - limits.work_weight * saved_ms,
            throttle_ms=plain.terms.throttle_ms - (prefill.slowdown - 1.0) * saved_ms,
        )
        return replace(plain, prefill_held_tokens=held, terms=terms, returns=returns)

    def local(self, decode: WorkerView) -> Candidate:
        """What a prefill on `decode` itself costs."""
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


def tie_break(request_id: str, name: str) -> bytes:
    """Order of equal candidates or workers, another one for each request."""
    return hashlib.blake2b(f"{request_id}\0{name}".encode(), digest_size=8).digest()
