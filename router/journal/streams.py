"""Runs resumable requests under asyncio: they compute on without their clients, and any number of readers follow them.

Decides nothing: journal.py says what is kept, and what is cancelled because nobody came back.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable

from ...core.clock import Clock
from ...core.errors import Cancelled, InternalError, StreamMoved, TwostrokeError
from ..requests.pieces import OutputDelta
from .journal import Asked, Entry, Journal

TICK_S = 0.25

Pieces = AsyncGenerator[OutputDelta, None]


class ResumableStreams:
    """The resumable requests of one router, on one event loop."""

    def __init__(self, journal: Journal, clock: Clock) -> None:
        self.journal = journal
        self._clock = clock
        self._pumps: dict[Entry, asyncio.Task[None]] = {}
        self.is_leaving = False
        self._dropped: dict[Entry, TwostrokeError] = {}  # what their readers are told
        self._ticker: asyncio.Task[None] | None = None
        self.on_change: Callable[[Entry], None] = lambda _: None  # for a store: begun, one more piece, or over
        self.num_safe: Callable[[Entry], int | None] = lambda _: None  # `JournalStore.num_safe`

    def start(self, asked: Asked, pieces: Pieces, had: list[OutputDelta] | None = None) -> Entry:
        """Journal a request from now on, and run it: `pieces` is its stream, after those that it `had`.

        Raises:
            InvalidRequest: its tenant has a resumable request of that id that still runs.
        """
        entry = self.journal.add(asked, self._clock.now_s())
        entry.num_had = None if had is None else len(had)
        for piece in had or ():
            self.journal.put(entry, piece)
        self.on_change(entry)
        self._pumps[entry] = asyncio.create_task(
            self._pump(entry, pieces), name=f"resumable {asked.request.request_id}"
        )
        if self._ticker is None:
            self._ticker = asyncio.create_task(self._tick_for_ever(), name="journal tick")
        return entry

    def give_up(self, entry: Entry) -> None:
        """Another router has this request now: end it here."""
        self.drop(entry, StreamMoved("another router has taken the stream over; resume it"))

    def drop(self, entry: Entry, error: TwostrokeError) -> None:
        """Forget a request here, and end it if it still runs: its readers get the error. A store is told nothing."""
        if entry in self._pumps:
            self._dropped[entry] = error
            self._pumps[entry].cancel()
        self.journal.forget(entry)

    def keep(self, asked: Asked, pieces: list[OutputDelta], error: TwostrokeError | None) -> Entry:
        """Journal a request that is over already."""
        entry = self.journal.add(asked, self._clock.now_s())
        for piece in pieces:
            self.journal.put(entry, piece)
        self.journal.end(entry, error, self._clock.now_s())
        return entry

    async def read(self, entry: Entry) -> Pieces:
        """Yield all pieces of a request from its beginning, as they come. Closing it leaves the request alone.

        Pieces of a response are given out when a working store has them: so no client has an event that
        another router could number otherwise.

        Raises:
            TwostrokeError: the request failed.
        """
        news = asyncio.Event()
        self.journal.attach(entry)
        entry.listeners.add(news.set)
        place = 0
        try:
            while True:
                while place < self._num_given(entry):
                    place += 1
                    entry.num_read = max(entry.num_read, place)
                    yield entry.pieces[place - 1]
                is_last = place == len(entry.pieces)
                if entry.error is not None and (is_last or isinstance(entry.error, StreamMoved)):
                    raise entry.error  # the rest of a stream that moved comes from elsewhere
                if is_last and entry.is_over:
                    return
                news.clear()
                await news.wait()
        finally:
            entry.listeners.discard(news.set)
            self.journal.detach(entry, self._clock.now_s())

    def _num_given(self, entry: Entry) -> int:
        """Number of pieces that readers may have now."""
        safe = self.num_safe(entry) if entry.asked.is_response else None
        return len(entry.pieces) if safe is None else min(safe, len(entry.pieces))

    def leave(self) -> None:
        """This router stops: from now on no other one finds the requests here, and none of their ends is final."""
        self.is_leaving = True
        self.on_change = lambda _: None

    async def close(self) -> None:
        """Cancel all requests that still run."""
        tasks = [*self._pumps.values(), *([self._ticker] if self._ticker else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self, entry: Entry, pieces: Pieces) -> None:
        error: TwostrokeError | None = Cancelled("its client did not come back for it")
        try:
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    self.journal.put(entry, piece)
                    self.on_change(entry)
            error = None
        except asyncio.CancelledError:
            error = self._dropped.get(entry, error)
            raise
        except TwostrokeError as failure:
            error = failure
            if self.is_leaving and entry.asked.is_response:
                error = StreamMoved("the router is stopping; resume the stream")
        except Exception as failure:
            error = InternalError(f"the request failed: {failure}")
            raise
        finally:
            self.journal.end(entry, error, self._clock.now_s())
            if self._dropped.pop(entry, None) is not None:
                self.journal.forget(entry)
            else:
                self.on_change(entry)
            del self._pumps[entry]

    async def _tick_for_ever(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            for entry in self.journal.tick(self._clock.now_s()):
                if entry in self._pumps:
                    self._pumps[entry].cancel()
