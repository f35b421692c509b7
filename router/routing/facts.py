"""Facts about workers and models, as plain values. Knows no messages and no state."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from ...core.request import Role
from ...core.tally import Spread
from ...kv.spec import KvSpec


class WorkerKey(NamedTuple):
    """One incarnation of one worker: a restarted process has another key."""

    worker_id: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """An adapter under one name, as a worker holds it."""

    name: str
    digest: bytes  # of its config and tensors
    path: str  # directory, as the worker names it
    rank: int = 0
    size_bytes: int = 0  # in memory
    asked: bool = False  # for while the worker ran; else its configuration names it


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """One model as a worker serves it."""

    name: str
    weights_fingerprint: bytes
    numerics_class: bytes
    numerics_description: str
    max_model_len: int
    vocab_size: int
    deterministic: bool
    path: str  # the checkpoint's directory, as the worker names it
    kv_bytes_per_token: int  # moved by a hand-over
    kv_spec: KvSpec | None = None  # of all ranks together
    adapter: AdapterFacts | None = None  # with one, `name` is the adapter's
    base: str = ""  # then: the model's own name
    cache_codec: str = ""  # of the KV cache; of a worker of an older release: empty
    fell_back_from: str = ""  # codec that the worker's guard found too coarse; empty: none


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """State of a GPU as its worker reported it. Numbers are 0 where the device gives none."""

    uuid: str
    name: str = ""
    parent_uuid: str = ""  # of a slice: its GPU
    verdict: str = "ok"  # "throttled", "drain", "restart", "cordon"
    reasons: tuple[str, ...] = ()
    slowdown: float = 0.0  # factor on predicted times while throttled; 0: none
    memory_used_bytes: int = 0
    memory_total_bytes: int = 0
    power_watts: float = 0.0
    power_limit_watts: float = 0.0
    temperature_c: int = 0
    corrected_errors: int = 0
    uncorrected_errors: int = 0
    reading_age_s: float = 0.0  # negative: there was no reading


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """Facts about a worker, as it announced them."""

    worker_id: str
    incarnation: int
    role: Role
    address: str
    model: ModelFacts
    num_kv_blocks: int
    block_tokens: int
    max_num_seqs: int
    max_batch_tokens: int
    pid: int = 0
    release: str = ""
    capabilities: tuple[str, ...] = ()
    metrics_address: str = ""  # host:port of its GET /metrics; empty: none
    num_ranks: int = 1  # tensor-parallel ranks
    gpus: tuple[GpuFacts, ...] = ()  # those that it watches, as announced
    adapters: tuple[AdapterFacts, ...] = ()
    changes_codec_to: str = ""  # it drains, and comes back soon with a cache of this codec; empty: it does not

    def holds(self, adapter: bytes) -> bool:
        """True if it computes requests with this adapter; every worker does those without one (empty)."""
        return not adapter or any(held.digest == adapter for held in self.adapters)

    @property
    def key(self) -> WorkerKey:
        """Key of this incarnation of the worker."""
        return WorkerKey(self.worker_id, self.incarnation)

    @property
    def num_kv_tokens(self) -> int:
        """Tokens that its pool holds: no sequence can be longer."""
        return self.num_kv_blocks * self.block_tokens


@dataclass(frozen=True, slots=True)
class LoadFacts:
    """Last load report of a worker. Coefficients of 0 are not measured yet."""

    waiting: int = 0
    running: int = 0
    queued_prefill_tokens: int = 0
    queued_prefill_pairs: float = 0.0  # of a worker of an older release: 0
    running_context_tokens: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0
    promised_blocks: int = 0
    total_blocks: int = 0
    phase: str = ""
    steps: int = 0
    draining: bool = False
    prefill_ms_per_token: float = 0.0
    prefill_ms_per_token_pair: float = 0.0
    decode_step_ms: float = 0.0
    handover_bytes_per_s: float = 0.0
    counters: tuple[tuple[str, int], ...] = ()
    spreads: tuple[tuple[str, Spread], ...] = ()
    gpus: tuple[GpuFacts, ...] = ()


class WorkerState(StrEnum):
    """State of a worker in this router."""

    JOINING = "joining"  # announced; its session is not open yet
    LIVE = "live"
    SUSPECT = "suspect"  # silent or unreachable for a short time: gets no new work
    DRAINING = "draining"  # finishes its running work, gets no new work
    GONE = "gone"
