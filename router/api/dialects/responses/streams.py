"""Streams of responses as server-sent events: of one that runs for its client alone, and of one that is kept."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterable

from .....core.errors import CursorLost, InternalError, InvalidRequest, StreamMoved, TwostrokeError
from ....peers.peers import Followed
from ....requests.pieces import OutputDelta
from ...http.sse import to_json
from .reply import Event, Reply

log = logging.getLogger(__name__)

PIECES_AT_ONCE = 64  # that are folded before other tasks of the loop run

CONTENT_TYPE = "text/event-stream; charset=utf-8"


class OwnEvents:
    """The stream of a request that its client's leaving ends (`Writer` of dialects/door.py)."""

    def __init__(self, reply: Reply, ended: Callable[[list[OutputDelta]], None] | None) -> None:
        """`ended` gets all pieces before the last event is written; None: nobody wants them."""
        self._reply, self._ended = reply, ended
        self._pieces: list[OutputDelta] = []

    def begin(self) -> bytes:
        """Events before the first piece."""
        return written(self._reply.begin())

    def piece(self, piece: OutputDelta) -> bytes:
        """Events of a piece."""
        if self._ended is not None:
            self._pieces.append(piece)
        return written(self._reply.take(piece))

    def end(self) -> bytes:
        """Events after the last piece."""
        last = written(self._reply.end())
        if self._ended is not None:
            self._ended(self._pieces)
        return last

    def error(self, error: TwostrokeError) -> bytes:
        """The event of a failure."""
        return written(self._reply.fail(error))


async def events_after(followed: Followed, reply: Reply, after: int) -> AsyncGenerator[bytes, None]:
    """Yield the events of a kept response behind the one of that number; -1: all.

    Raises (before the first event):
        CursorLost: another router may have given other events under these numbers.
        InvalidRequest: the response is over, and has no event of that number.
        TwostrokeError: the request was refused before it began, or its stream cannot be followed here.
    """
    has_told = False
    refusal: TwostrokeError | None = None
    pieces, proven = followed.pieces, followed.num_proven

    def new(events: Iterable[Event]) -> bytes:
        nonlocal has_told
        fresh = [event for event in events if event["sequence_number"] > after]
        has_told = has_told or bool(fresh)
        return written(fresh)

    try:
        place = 0
        first = None if followed.asked.runs_alone else await anext(pieces, None)  # a refusal comes before any event
        if begun := new(reply.begin()):
            yield begun
        if first is not None:
            place = 1
            if part := new(reply.take(first)):
                yield part
        async for piece in pieces:
            if proven is not None and place >= proven and reply.num_events <= after:
                refusal = _lost(after, reply.num_events - 1)
                raise refusal
            place += 1
            if part := new(reply.take(piece)):
                yield part
            elif place % PIECES_AT_ONCE == 0:
                await asyncio.sleep(0)
        if last := new(reply.end()):
            yield last
        elif after >= reply.num_events:
            refusal = _beyond(after, reply.num_events - 1)
            raise refusal
    except TwostrokeError as error:
        is_end = error is not refusal and not isinstance(error, StreamMoved) and reply.num_events > 0
        if is_end and (last := new(reply.fail(error))):
            yield last
        elif not has_told:
            raise
        elif not is_end:
            yield written([_error_event(error, reply)])
    except Exception:
        log.exception("response %s failed within its stream", followed.asked.request.request_id)
        failure = InternalError("the request failed; the router's log has more")
        if not has_told:
            raise failure from None
        yield written(reply.fail(failure))
    finally:
        await pieces.aclose()


def _lost(after: int, last: int) -> TwostrokeError:
    return CursorLost(
        f"the router that gave event {after} was lost before it was stored; the last certain one is {last}: go on "
        "behind it",
        param="starting_after",
    )


def _beyond(after: int, last: int) -> TwostrokeError:
    return InvalidRequest(f"starting_after is {after}; the response has events up to {last}", param="starting_after")


def written(events: Iterable[Event]) -> bytes:
    """Events as they leave."""
    return b"".join(b"event: %s\ndata: %s\n\n" % (event["type"].encode(), to_json(event)) for event in events)


def _error_event(error: TwostrokeError, reply: Reply) -> Event:
    """The end of a stream whose response is not over."""
    said = {"code": error.code, "message": error.message, "param": error.param}
    return {"type": "error", "sequence_number": reply.num_events, **said}
