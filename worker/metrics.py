"""Prometheus metrics of one worker: its engine's last beat and its finished sequences, under vLLM's names.

Steps are not slowed: the engine counts into plain numbers, and a scrape reads the last beat.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from http import HTTPStatus

from prometheus_client import CollectorRegistry

from ..core import metrics
from ..core.board import Board, render
from ..core.discovery.source import AddressSource
from ..core.life import Life
from ..engine.adapters import ServedAdapter
from ..engine.facts import FaceFacts
from ..engine.link.messages import LoadNews
from ..kv.sizing import PoolSize
from .gpu.export import set_metrics
from .gpu.monitor import GpuState
from .health import Health
from .scrape import Answer, Page
from .settings import WorkerSettings


class WorkerMetrics:
    """Metrics of one worker. Every series has the labels `model_name` and `engine`, which is the worker's id."""

    def __init__(
        self,
        settings: WorkerSettings,
        facts: FaceFacts,
        pool: PoolSize,
        counters: Counter[str],
        sources: Sequence[AddressSource] = (),
    ) -> None:
        """`counters`: those of the face, which are not part of the engine's beat. `sources`: of routers."""
        self._counters = counters
        self._sources = sources
        self._labels = (facts.model.name, facts.worker_id)
        self._registry = CollectorRegistry()
        self._board = Board(self._registry, ("model_name", "engine"))
        metrics.know(self._board, *self._labels)
        self._board.know((metrics.QUEUED_PROMPT_TOKENS,), *self._labels)
        self._cache = settings.cache
        self.describe_cache(facts, pool)
        self.adapters: Callable[[], Sequence[ServedAdapter]] = tuple  # those that are served now
        self._max_loras = settings.model.max_loras if settings.model.serves_adapters else 0
        self._count_adapters()
        for state, is_so in (("awake", 1), ("weights_offloaded", 0), ("discard_all", 0)):
            self._board.set(metrics.SLEEP_STATE, *self._labels, state, value=is_so)
        self._count_sources(0, 0, 0)

    def describe_cache(self, facts: FaceFacts, pool: PoolSize) -> None:
        """Tell the size and the codec of the cache, again after a change."""
        cache = {
            "block_size": facts.block_tokens,
            "num_gpu_blocks": facts.num_blocks,
            "num_cpu_blocks": pool.num_swap_blocks,
            "cache_dtype": facts.model.cache_codec or self._cache.codec,
            "enable_prefix_caching": self._cache.prefix_caching,
            "gpu_memory_utilization": self._cache.memory_fraction,
            "swap_space": self._cache.swap_space,
        }
        words = [str(cache[name]) for name in metrics.CACHE_CONFIG.labels]
        self._board.forget(metrics.CACHE_CONFIG, *self._labels)
        self._board.set(metrics.CACHE_CONFIG, *self._labels, *words, value=1)

    def _count_adapters(self) -> None:
        """Name the adapters that sequences have now; 1 if there are some."""
        running = sorted({adapter.name for adapter in self.adapters() if adapter.uses})
        self._board.forget(metrics.LORA, *self._labels)
        words = (str(self._max_loras), "", ",".join(running))
        self._board.set(metrics.LORA, *self._labels, *words, value=float(bool(running)))

    def ended(self, life: Life) -> None:
        """Count a sequence that is over."""
        metrics.count_life(self._board, life, *self._labels)
        if life.is_finished:
            moved = life.prompt_tokens - life.cached_tokens - life.computed_tokens
            self._count_sources(life.computed_tokens, life.cached_tokens, moved)

    def render(self, load: LoadNews | None, accept: str, gpu: GpuState | None = None) -> tuple[bytes, str]:
        """All metrics as of the engine's last beat and the GPU's last reading: body and content type."""
        if load is not None:
            self._take(load)
        self._count_adapters()
        metrics.count_sources(self._board, self._sources, *self._labels)
        if gpu is not None:
            set_metrics(self._board, gpu, *self._labels)
        return render(self._registry, accept)

    def _take(self, load: LoadNews) -> None:
        board, labels = self._board, self._labels
        counters = Counter(dict(load.counters))
        counters.update(self._counters)
        metrics.count_engines(board, counters, dict(load.spreads), *labels)
        board.set(metrics.GENERATION_TOKENS, *labels, value=counters["generated_tokens"])
        board.set(metrics.QUEUED_PROMPT_TOKENS, *labels, value=load.queued_prefill_tokens)
        board.set(metrics.RUNNING, *labels, value=load.running)
        board.set(metrics.WAITING, *labels, value=load.waiting_for_room + load.waiting_for_peer)
        board.set(metrics.WAITING_BY_REASON, *labels, "capacity", value=load.waiting_for_room)
        board.set(metrics.WAITING_BY_REASON, *labels, "deferred", value=load.waiting_for_peer)
        used = load.total_blocks - load.free_blocks
        board.set(metrics.KV_USAGE, *labels, value=used / load.total_blocks if load.total_blocks else 0.0)

    def _count_sources(self, computed: int, cached: int, moved: int) -> None:
        sources = (("local_compute", computed), ("local_cache_hit", cached), ("external_kv_transfer", moved))
        for source, count in sources:
            self._board.add(metrics.TOKENS_BY_SOURCE, *self._labels, source, amount=count)


def pages(
    exported: WorkerMetrics,
    last_load: Callable[[], LoadNews | None],
    health: Health,
    is_known: Callable[[], bool],
    gpu: Callable[[], GpuState | None],
) -> dict[str, Page]:
    """Pages of a worker's HTTP port: /metrics, and for probes /health, /livez and /readyz.

    /livez: the step loop beats. /health: and orders are taken. /readyz: and a router knows this worker (`is_known`).
    """

    def all_metrics(accept: str) -> Answer:
        body, content_type = exported.render(last_load(), accept, gpu())
        return HTTPStatus.OK, content_type, body

    def probe(holds: Callable[[], bool], otherwise: str) -> Page:
        def page(_: str) -> Answer:
            if holds():
                return HTTPStatus.OK, "application/json", b'{"status": "ok"}'
            body = f'{{"status": "{otherwise}"}}'.encode()
            return HTTPStatus.SERVICE_UNAVAILABLE, "application/json", body

        return page

    def is_ready() -> bool:
        return health.is_serving() and is_known()

    return {
        "/metrics": all_metrics,
        "/health": probe(health.is_serving, "not serving"),
        "/livez": probe(health.is_live, "the engine does not step"),
        "/readyz": probe(is_ready, "not serving, or no router knows this worker"),
    }
