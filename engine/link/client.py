"""The face's side of the link: sends commands, routes events to their owners by sequence. Knows no protocol."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ...core.errors import Unavailable
from ...core.request import FinishReason, SequenceKey
from ...kv.block import BlockIdentity
from .messages import (
    AdapterLoaded,
    AdapterRefused,
    AskSnapshot,
    BlocksFetched,
    CacheDelta,
    CacheSnapshot,
    CancelSequence,
    Command,
    DropAdapter,
    Ended,
    Event,
    FetchBlocks,
    LoadAdapter,
    LoadNews,
    Reading,
    StepTokens,
    Submit,
    TokenNews,
)

log = logging.getLogger(__name__)

SequenceEvent = Event | TokenNews
"""Events for an owner: those with its key; from a step's tokens only its own `TokenNews`."""

Owner = Callable[[SequenceEvent], None]
"""Called on the face's loop. Must not block; slow work goes to a task of the owner. If it raises, its sequence ends."""

CacheListener = Callable[[CacheDelta | CacheSnapshot], None]
LoadListener = Callable[[LoadNews], None]
StepListener = Callable[[int], None]


class FaceLink(Protocol):
    """The face's end of an EngineLink."""

    def send(self, command: Command) -> None:
        """Send the engine a command; never waits."""
        ...

    async def receive(self) -> Sequence[Event]:
        """Wait for events; returns all that are there, in order. Empty: the engine has ended."""
        ...


class EngineClient:
    """The face's access to the engine; one per worker.

    Owners register before they submit and are removed with their `Ended`. When the engine ends, all waiting ends too:
    owners get `Ended`, fetches raise.
    """

    def __init__(self, link: FaceLink) -> None:
        self._link = link
        self._owner_by_key: dict[SequenceKey, Owner] = {}
        self._fetches: dict[int, asyncio.Future[BlocksFetched]] = {}
        self._fetch_ids = itertools.count(1)
        self._loads: dict[int, asyncio.Future[AdapterLoaded | AdapterRefused]] = {}  # by slot
        self._cache_listeners: list[CacheListener] = []
        self._load_listeners: list[LoadListener] = []
        self._step_listeners: list[StepListener] = []
        self._ended = asyncio.Event()
        self._is_over = False  # the engine has ended and answers no more
        self.last_load: LoadNews | None = None

    # -------------------------------------------------------------- to the engine

    def own(self, key: SequenceKey, owner: Owner) -> None:
        """Send every event of `key` to `owner` until the sequence has ended."""
        assert key not in self._owner_by_key, key
        self._owner_by_key[key] = owner

    def send(self, command: Command) -> None:
        """Send the engine a command. After the engine's end a `Submit` is answered by an `Ended` from here."""
        try:
            self._link.send(command)
        except Unavailable as error:
            assert isinstance(command, Submit), command
            ended = Ended(command.key, FinishReason.ERROR, error.code, error.message)
            asyncio.get_running_loop().call_soon(self._route, ended)

    async def fetch(
        self, identities: Sequence[BlockIdentity], first_token: int, root: bytes, how: Reading = Reading.ALL
    ) -> BlocksFetched:
        """Read cached hash blocks by identity, as far as their chain begins at `root`.

        Raises:
            Unavailable: the engine has ended, or ends before the answer.
        """
        if self._is_over:
            raise _engine_ended()
        fetch_id = next(self._fetch_ids)
        future: asyncio.Future[BlocksFetched] = asyncio.get_running_loop().create_future()
        self._fetches[fetch_id] = future
        try:
            self._link.send(FetchBlocks(fetch_id, tuple(identities), first_token, root, how))
            return await future
        finally:
            del self._fetches[fetch_id]

    async def load_adapter(self, slot: int, directory: str, digest: bytes) -> AdapterLoaded | AdapterRefused:
        """Load an adapter into an unused slot. Steps go on meanwhile.

        Raises:
            Unavailable: the engine has ended, or ends before the answer.
        """
        if self._is_over:
            raise _engine_ended()
        future: asyncio.Future[AdapterLoaded | AdapterRefused] = asyncio.get_running_loop().create_future()
        self._loads[slot] = future
        try:
            self._link.send(LoadAdapter(slot, directory, digest))
            return await future
        finally:
            del self._loads[slot]

    def drop_adapter(self, slot: int) -> None:
        """Forget the adapter of a slot, after all commands that were sent before."""
        self._link.send(DropAdapter(slot))

    # -------------------------------------------------------------- listeners

    def on_cache(self, listener: CacheListener) -> None:
        """Call `listener` with every change of the prefix cache, and with every snapshot."""
        self._cache_listeners.append(listener)

    def on_load(self, listener: LoadListener) -> None:
        """Call `listener` with every beat of the engine."""
        self._load_listeners.append(listener)

    def on_step(self, listener: StepListener) -> None:
        """Call `listener` with a step's number before its tokens are routed."""
        self._step_listeners.append(listener)

    def ask_snapshot(self) -> None:
        """Ask the engine for a `CacheSnapshot`, which goes to all cache listeners."""
        self._link.send(AskSnapshot())

    @property
    def num_owned(self) -> int:
        """Number of sequences that have not ended."""
        return len(self._owner_by_key)

    async def next_end(self) -> None:
        """Wait until a sequence or the engine has ended."""
        if self._is_over:
            await asyncio.sleep(0)  # lets the loop deliver the answer to a late `Submit`
            return
        self._ended.clear()
        await self._ended.wait()

    # -------------------------------------------------------------- from the engine

    async def run(self) -> None:
        """Route events until the engine ends. The only reader of the link."""
        try:
            while events := await self._link.receive():
                for event in events:
                    self._route(event)
        finally:
            self._release_all()

    def _release_all(self) -> None:
        """End all waiting after the engine's end."""
        self._is_over = True
        error = _engine_ended()
        waiting: list[asyncio.Future[Any]] = [*self._fetches.values(), *self._loads.values()]
        for future in waiting:
            if not future.done():
                future.set_exception(error)
        for key in list(self._owner_by_key):
            self._route(Ended(key, FinishReason.ERROR, error.code, error.message))
        self._ended.set()

    def _route(self, event: Event) -> None:
        match event:
            case StepTokens(step, news):
                for listener in self._step_listeners:
                    listener(step)
                for tokens in news:
                    self._tell(tokens.key, tokens)
            case BlocksFetched(fetch_id):
                future = self._fetches.get(fetch_id)
                if future is not None and not future.done():
                    future.set_result(event)
            case CacheDelta() | CacheSnapshot():
                for cache_listener in list(self._cache_listeners):
                    cache_listener(event)
            case LoadNews():
                self.last_load = event
                for load_listener in list(self._load_listeners):
                    load_listener(event)
            case AdapterLoaded(slot) | AdapterRefused(slot):
                loading = self._loads.get(slot)
                if loading is not None and not loading.done():
                    loading.set_result(event)
            case Ended(key):
                owner = self._owner_by_key.pop(key, None)
                self._ended.set()
                if owner is not None:
                    self._call(owner, event)
            case _:
                self._tell(event.key, event)

    def _tell(self, key: SequenceKey, event: SequenceEvent) -> None:
        owner = self._owner_by_key.get(key)
        if owner is not None:
            self._call(owner, event)

    def _call(self, owner: Owner, event: SequenceEvent) -> None:
        try:
            owner(event)
        except Exception:  # a failure of one owner must not stop the others
            self._fail(owner, event)

    def _fail(self, owner: Owner, event: SequenceEvent) -> None:
        """End the sequence whose owner raised; the owner gets only its `Ended` from now on. Called in an `except`."""
        log.exception("event %s was not handled; its sequence ends", type(event).__name__)
        key = getattr(event, "key", None)
        if key is None or isinstance(event, Ended) or self._owner_by_key.get(key) is not owner:
            return

        def hear(later: SequenceEvent) -> None:
            if isinstance(later, Ended):
                owner(later)

        self._owner_by_key[key] = hear
        self._link.send(CancelSequence(key, FinishReason.ERROR))


def _engine_ended() -> Unavailable:
    return Unavailable("this worker's engine has ended; it is being restarted", retry_after_s=1.0)
