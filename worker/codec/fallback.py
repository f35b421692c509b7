"""Changes the codec of a worker's cache when its guard finds it too coarse. engine/guard/fallback.py decides.

The worker says that it drains and comes back, lets running work end and hands back the rest, ends its engine, and makes
another one of the same weights over a pool in the same memory. To routers and peers that is another incarnation.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from typing import TYPE_CHECKING

from ...engine.guard.fallback import CodecChange
from ...engine.link.messages import LoadNews
from ..built import BuiltEngine, Loaded, rebuild_engine
from .guard import Fallback

if TYPE_CHECKING:
    from ..process import WorkerProcess

log = logging.getLogger(__name__)


class CodecFallback:
    """The one change of a worker."""

    def __init__(self, worker: WorkerProcess, fallback: Fallback, loaded: Loaded) -> None:
        """Watches the worker's engine from now on. `fallback`: what comes; `loaded`: what it is made of."""
        self.change = CodecChange(loaded.model.codec, fallback.codec)
        self._worker = worker
        self._pool_by_codec = {
            loaded.model.codec: Fallback(loaded.model.codec, loaded.sized.pool),
            fallback.codec: fallback,
        }
        self._loaded = loaded
        self._task: asyncio.Task[None] | None = None
        worker.dispatcher.on_load(self.hear)

    @property
    def changes_to(self) -> str:
        """The codec that the worker is about to have; empty: it keeps the one it has."""
        return self.change.changes_to

    def hear(self, load: LoadNews) -> None:
        """A beat of the engine, which may have the guard's verdict."""
        if dict(load.counters).get("kv_guard_exceeded") and self.change.exceeded(is_ending=self._worker.is_draining):
            self._task = asyncio.create_task(self._run(), name="change of the cache's codec")

    async def close(self) -> None:
        """Give the change up: the worker ends."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    # ------------------------------------------------------------------ inside

    async def _run(self) -> None:
        worker, name = self._worker, self._worker.settings.worker_id
        try:
            async with worker.adapters.turn:  # none is loaded meanwhile
                await self._empty()
                await self._build()
        except Exception:
            log.exception("%s: the cache's codec could not be changed; this worker ends", name)
            worker.ended.set()

    async def _empty(self) -> None:
        worker, change = self._worker, self.change
        log.warning(
            "%s falls back: no new work until its cache is in %s instead of %s; running work ends for at most %g s",
            worker.settings.worker_id, change.after, change.before, worker.settings.drain_timeout_s,
        )  # fmt: skip
        await worker.begin_change()
        handed_back = await worker.drain_faces(worker.settings.drain_timeout_s)
        await worker.retire()
        change.emptied()
        log.info("%s: its cache is dropped; %d requests were handed back", worker.settings.worker_id, handed_back)

    async def _build(self) -> None:
        worker, change = self._worker, self.change
        while True:
            built: BuiltEngine | None = None
            try:
                built = await asyncio.to_thread(self._built)
                await worker.install(built)
                break
            except Exception as error:
                log.exception("%s: its cache could not be made in %s", worker.settings.worker_id, change.builds)
                if not change.failed(repr(error)):
                    raise
                if built is not None:
                    await worker.abandon(built)
        change.built()
        worker.counters["kv_guard_fell_back" if change.fell_back_from else "kv_guard_exceeded"] += 1
        pool = self._pool_by_codec[change.after if change.fell_back_from else change.before]
        await worker.end_change()
        log.warning(
            "%s serves new requests with a cache in %s of %d tokens",
            worker.settings.worker_id, pool.codec, pool.pool.num_tokens,
        )  # fmt: skip

    def _built(self) -> BuiltEngine:
        worker, change = self._worker, self.change
        gc.collect()  # what refers to the pool before
        settings = worker.settings.model_copy(update={"role": worker.role})
        wanted = self._pool_by_codec[change.builds]
        return rebuild_engine(settings, worker.clock, self._loaded, wanted, change.fell_back_from)
