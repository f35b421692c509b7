"""Values of a routing decision: what is asked, the candidates with their terms, the one that was chosen. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...core.request import Role
from ...kv.spec import KvSpec
from .coefficients import Coefficients
from .facts import WorkerKey
from .pairs import RefusedPair


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
    is_resumed: bool = True  # it goes on after another dispatch: decode workers may fetch its blocks


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
    returns: tuple[Source, ...] = ()  # workers whose blocks `prefill` fetches first, best first

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
        """Name for logs: "prefill-0 > decode-1", "decode-1" for a local prefill, "decode-0 >> decode-1" for a fetch.

        "decode-0 >> prefill-0 > decode-1" where the prefill worker fetches.
        """
        if self.sources:
            return f"{self.sources[0].view.worker_id} >> {self.decode.worker_id}"
        first = f"{self.returns[0].view.worker_id} >> " if self.returns else ""
        return f"{first}{self.prefill.worker_id} > {self.decode.worker_id}" if self.prefill else self.decode.worker_id


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
    returns: Mapping[str, tuple[Source, ...]] = field(default_factory=dict)  # by prefill peer: whom it fetches from
    buddy: WorkerView | None = None  # keeps a copy of the stream's KV; not part of the comparison
