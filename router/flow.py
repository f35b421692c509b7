"""The life of a request in the router: admitted, routed, dispatched, streamed, ended, explained. Knows no client protocol."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import grpc.aio

from ..core.clock import Clock
from ..core.request import Request
from ..core.timeline import Timeline
from .config import RouterConfig
from .facts import ModelFacts
from .metrics import RouterMetrics
from .pieces import Piece


class Flow:
    """Takes admitted requests through the workers. One per router process, on one event loop.

    Faces call `generate`, `abort`, `explain`, `cluster`, `models`; the process calls `add_announce` for its internal
    server, then `start`, and at the end `close`.
    """

    def __init__(
        self,
        config: RouterConfig,
        cluster_key: bytes,
        metrics: RouterMetrics | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`metrics` is what the face serves on /metrics; none: a registry of its own, see `self.metrics.registry`."""
        raise NotImplementedError

    def add_announce(self, server: grpc.aio.Server) -> None:
        """Register the Announce service, by which workers come, on the router's internal server."""
        raise NotImplementedError

    async def start(self) -> None:
        """Begin to watch over workers and deadlines. Returns at once; workers announce themselves later."""
        raise NotImplementedError

    async def close(self) -> None:
        """Cancel what still runs (their clients get `Unavailable`) and leave all workers. Idempotent."""
        raise NotImplementedError

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests (`Unavailable`, Retry-After) and wait for the running ones. False: some still run."""
        raise NotImplementedError

    def generate(self, request: Request, timeline: Timeline) -> AsyncGenerator[Piece, None]:
        """Run a request; the stream of its pieces, gapless per choice, `usage` with the very last one.

        `timeline` must hold ARRIVED on this flow's clock (`self.clock`); the deadline counts from there. Admission, routing
        and every refusal happen before the first piece: await it before a 200 goes out. `aclose()` (or cancelling the
        task that waits in it) cancels the request on its worker.

        Raises:
            ModelNotFound, ContextLengthExceeded, InvalidRequest: the request cannot be served.
            Overloaded, Unavailable: not now; both with `retry_after_s`.
            WorkerLost: its worker died after the client had tokens.
            DeadlineExceeded: `request.timeout_s` passed.
            Cancelled: `abort`, or the client read too slowly.
        """
        raise NotImplementedError

    async def abort(self, request_id: str) -> bool:
        """Cancel a running request: its stream ends in `Cancelled`. False: no such request runs here."""
        raise NotImplementedError

    def explain(self, request_id: str) -> dict[str, Any] | None:
        """Everything known about a running or recent request, JSON-able; None: not known (any more).

        Keys: request_id, model, state ("running", "finished", "failed"), num_choices, tokens {prompt, cached, completion},
        prefill_worker (None: prefilled locally), decode_worker, kv_bytes_moved, kv_bytes_as_bf16, handover, ttft_ms,
        itl_ms {mean, p50, max} or None, finish_reasons, error {code, message} or None, timeline {instant: ms since arrived},
        choice {reason, winner, prefill_peers, candidates}, dispatches.
        """
        raise NotImplementedError

    def cluster(self) -> dict[str, Any]:
        """Workers {worker_id, role, state, address, pid, model, load, ...}, router facts and counters, JSON-able."""
        raise NotImplementedError

    def models(self) -> list[ModelFacts]:
        """What the workers that are there serve, by name. `path` is where tokenizer and template lie."""
        raise NotImplementedError
