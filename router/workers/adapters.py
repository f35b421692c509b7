"""Loads and unloads adapters at all workers of a router, also at those that come later. Knows no request."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from ...core.clock import Clock
from ...core.errors import DeadlineExceeded, InvalidRequest, ModelNotFound, TwostrokeError, Unavailable
from ...core.request import Role
from ..routing.facts import WorkerFacts, WorkerKey
from .links import WorkerLink
from .loaded_adapters import MAX_ADAPTERS, LoadedAdapters
from .registry import WorkerRegistry

log = logging.getLogger(__name__)

RETRY_AFTER_S = 2.0
FOR_NOW = "being-loaded-"  # begin of the name of an adapter that is to replace another one
ANNOUNCED_S = 10.0  # workers announce a change at once
LEARN_S = 10.0  # from the start of a router, in which the workers that are there announce themselves


class ClusterAdapters:
    """Adapters that were loaded while the cluster ran, through whichever router. One change at a time.

    A worker that starts again has what its configuration names, and no more: it gets from here what the others have.
    """

    def __init__(self, members: WorkerRegistry, clock: Clock) -> None:
        self._members = members
        self._clock, self._began_s = clock, clock.now_s()
        self._loaded = LoadedAdapters()
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        members.on_up = self._arrived
        members.on_adapters = self._heard

    async def load(self, name: str, path: str, *, replace: bool = False) -> None:
        """Load an adapter at every worker; on return requests may name it. All workers hold it then, or none.

        With `replace` the name may be another adapter's. That one is served under it until all workers hold the new
        one, and goes on to be served if one of them cannot load it.

        Raises:
            InvalidRequest: the name is taken, or a worker cannot serve what the directory holds.
            Unavailable, Overloaded, DeadlineExceeded: not now; nothing has changed.
        """
        async with self._turn:
            workers = self._workers()
            if any(name == worker.model.name for worker in workers):
                raise InvalidRequest(f"{name!r} is the name of a model; give the adapter another", param="lora_name")
            if name not in self._loaded.wanted and len(self._loaded.wanted) >= MAX_ADAPTERS:
                raise InvalidRequest(f"{MAX_ADAPTERS} adapters were loaded; unload some", param="lora_name")
            if replace and any(held.name == name for worker in workers for held in worker.adapters):
                await self._replace(workers, name, path)
            else:
                await self._load_all(workers, name, path)
        for late in self._members.fleet:  # came while the others were loading
            self._arrived(late.facts.key)

    async def unload(self, name: str) -> None:
        """Unload an adapter at every worker; requests that have begun with it go on.

        Raises:
            ModelNotFound: no worker has an adapter of this name.
            Unavailable: a worker cannot be reached; it may still serve the name.
        """
        async with self._turn:
            self._loaded.gone(name)
            holders = [w for w in self._workers() if any(held.name == name for held in w.adapters)]
            if not holders:
                raise ModelNotFound(f"no adapter {name[:200]!r} is loaded", param="lora_name")
            for outcome in await _outcomes([self._unload_at(worker.key, name) for worker in holders]):
                if outcome is not None and not isinstance(outcome, ModelNotFound):
                    raise outcome
            await self._until(holders, lambda facts: all(held.name != name for held in facts.adapters))

    async def close(self) -> None:
        """Give up what is being loaded at newcomers."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ------------------------------------------------------------------ inside

    def _workers(self) -> list[WorkerFacts]:
        """Workers with a session, those that decode first: what they refuse is refused before others are asked."""
        found = [worker for worker in self._members.fleet if worker.session_up and not worker.draining]
        if not found:
            raise Unavailable("no worker is ready", retry_after_s=RETRY_AFTER_S)
        found.sort(key=lambda worker: (worker.role is Role.PREFILL, worker.facts.worker_id))
        return [worker.facts for worker in found]

    async def _load_all(self, workers: Sequence[WorkerFacts], name: str, path: str) -> bytes:
        """Load an adapter at all of these workers or at none, under a name that is new; returns its digest."""
        first = await self._load_at(workers[0].key, name, path, b"", replace=False)
        digest = next(adapter.digest for adapter in first.adapters if adapter.name == name)
        rest = [self._load_at(worker.key, name, path, digest, replace=False) for worker in workers[1:]]
        outcomes = [None, *await _outcomes(rest)]
        failure = next((outcome for outcome in outcomes if outcome is not None), None)
        if failure is not None:
            loaded = [worker for worker, failed in zip(workers, outcomes, strict=True) if failed is None]
            await _outcomes([self._give_back(worker, name, digest) for worker in loaded])
            raise failure
        await self._until(workers, lambda facts: _has(facts, name, digest))
        return digest

    async def _replace(self, workers: Sequence[WorkerFacts], name: str, path: str) -> None:
        """Give a name to another adapter: all workers load that under a name of its own first, where it may fail.

        Then they hold what the name gets, and giving it reads no file. If this router is lost in between, the name for
        the time being stays, and can be unloaded.
        """
        for_now = f"{FOR_NOW}{secrets.token_hex(8)}"
        digest = await self._load_all(workers, for_now, path)
        given = await _outcomes([self._load_at(w.key, name, path, digest, replace=True) for w in workers])
        # In this order: an adapter without a name would be dropped.
        await _outcomes([self._unload_at(worker.key, for_now) for worker in workers])
        failure = next((outcome for outcome in given if outcome is not None), None)
        if failure is not None:
            raise failure
        await self._until(workers, lambda facts: _has(facts, name, digest) and not _has(facts, for_now, digest))

    async def _load_at(self, key: WorkerKey, name: str, path: str, digest: bytes, *, replace: bool) -> WorkerFacts:
        return await self._link(key).load_adapter(name, path, digest, replace=replace)

    async def _unload_at(self, key: WorkerKey, name: str) -> None:
        await self._link(key).unload_adapter(name)

    async def _give_back(self, before: WorkerFacts, name: str, digest: bytes) -> None:
        """Undo a load at one worker, unless it had an adapter of that name before: that is not there any more.

        It has announced the adapter before, so that what it announces after is the end of it.
        """
        if all(held.name != name for held in before.adapters):
            await self._until([before], lambda facts: _has(facts, name, digest))
            await self._unload_at(before.key, name)
            await self._until([before], lambda facts: not _has(facts, name, digest))

    def _link(self, key: WorkerKey) -> WorkerLink:
        link = self._members.links.get(key)
        if link is None:
            raise Unavailable(f"{key.worker_id} is gone", retry_after_s=RETRY_AFTER_S)
        return link

    async def _until(self, workers: Sequence[WorkerFacts], knows: Callable[[WorkerFacts], bool]) -> None:
        """Wait until every one of these workers has announced what it answered, or is gone.

        Raises:
            DeadlineExceeded: one announces nothing.
        """
        loop = asyncio.get_running_loop()
        end_s = loop.time() + ANNOUNCED_S
        keys = {worker.key for worker in workers}
        while not all(knows(worker.facts) for worker in self._members.fleet if worker.facts.key in keys):
            if loop.time() >= end_s:
                raise DeadlineExceeded(f"a worker did not announce its adapters within {ANNOUNCED_S:g} s")
            await self._members.wait_for_change(end_s - loop.time())

    def _heard(self, before: WorkerFacts | None, after: WorkerFacts) -> None:
        is_learning = self._clock.now_s() - self._began_s < LEARN_S
        if self._loaded.heard(before, after, is_learning=is_learning):
            for worker in self._members.fleet:
                self._arrived(worker.facts.key)

    def _arrived(self, key: WorkerKey) -> None:
        worker = self._members.fleet.get(key.worker_id)
        if worker is None or not worker.session_up:
            return
        if any(not worker.facts.holds(wanted.digest) for wanted in self._loaded.wanted.values()):
            task = asyncio.create_task(self._equip(key), name=f"adapters of {key.worker_id}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _equip(self, key: WorkerKey) -> None:
        """Load at a newcomer what the others got while the cluster ran."""
        async with self._turn:
            for name, wanted in list(self._loaded.wanted.items()):
                worker = self._members.fleet.get(key.worker_id)
                if worker is None or worker.facts.key != key:
                    return
                if not worker.facts.holds(wanted.digest):
                    try:
                        await self._load_at(key, name, wanted.path, wanted.digest, replace=True)
                    except TwostrokeError as error:
                        log.warning("%s gets no requests for the adapter %s: %s", key.worker_id, name, error.message)


def _has(facts: WorkerFacts, name: str, digest: bytes) -> bool:
    return any(held.name == name and held.digest == digest for held in facts.adapters)


async def _outcomes(calls: Sequence[Coroutine[Any, Any, object]]) -> list[TwostrokeError | None]:
    """Make all calls at once; the typed error of each that failed."""
    found: list[TwostrokeError | None] = []
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(outcome, BaseException) and not isinstance(outcome, TwostrokeError):
            raise outcome
        found.append(outcome if isinstance(outcome, TwostrokeError) else None)
    return found
