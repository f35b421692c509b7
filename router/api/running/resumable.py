"""Resumable calls of both APIs: started, started again under their Idempotency-Key, and resumed. Knows no protocol.

A client asks for it: a call without it takes the usual path and is not journaled.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ....core.errors import Cancelled, DeadlineExceeded, InvalidRequest, RequestNotFound, Unavailable
from ....core.request import Request
from ....core.timeline import Instant, Timeline
from ...journal.cursor import Track, parse_cursor
from ...journal.journal import Asked, Entry, check_same
from ...journal.store import JournalStore, NoStore
from ...journal.stored import Stored
from ...journal.streams import ResumableStreams
from ...peers.peers import Peers
from ...requests.admission.entrance import MOST_BYTES_PER_TOKEN, Announced
from ...requests.pieces import OutputDelta
from ..call import GenerateCall
from .started import Started

if TYPE_CHECKING:
    from ..frontend import Frontend

_KEY = re.compile(r"[!-~]{1,255}")
HEADER = "x-twostroke-resumable"
KEY_HEADER = "idempotency-key"
CURSOR_HEADER = "last-event-id"


@dataclass(frozen=True, slots=True)
class Terms:
    """What a client says of a resumable call, beside the call."""

    face: str  # object of its answers
    body: dict[str, Any] = field(default_factory=dict)  # fields of the HTTP body that shape the answer
    key: str = ""  # Idempotency-Key; empty: none
    fingerprint: bytes = b""  # of all that the client sent


class Resumables:
    """Resumable calls of one router."""

    def __init__(self, front: Frontend, streams: ResumableStreams, peers: Peers) -> None:
        self._front = front
        self._streams = streams
        self._peers = peers
        self.store: JournalStore = NoStore()
        self.num_adopted = 0  # requests of routers that died

    async def start(
        self,
        call: GenerateCall,
        terms: Terms,
        admitted: Callable[[], None] | None = None,
        arrived_s: float | None = None,
    ) -> Started:
        """Run a call up to its first piece, or join the one that was started with the same Idempotency-Key.

        Parameters and errors are those of `begin`.
        """
        begun = await self.begin(call, terms, admitted, arrived_s)
        if isinstance(begun, str):
            return await self.resume(self._front.authenticate(call.api_key), begun, "")
        return await self._started(begun.asked, self._streams.read(begun), "", "")

    async def begin(
        self,
        call: GenerateCall,
        terms: Terms,
        admitted: Callable[[], None] | None = None,
        arrived_s: float | None = None,
    ) -> Entry | str:
        """Begin a call, or return the id of the one that was started with the same Idempotency-Key.

        `admitted` is called when `call` is no longer needed. The deadline counts from `arrived_s` on the flow's clock;
        None: from now.

        Raises:
            IdempotencyKeyReused: the key came with another call before.
            TwostrokeError: the call was refused. (Of one that does not run alone, the reader of its pieces learns of
                refusals by the flow.)
        """
        front = self._front
        timeline = Timeline()
        timeline.mark(Instant.ARRIVED, front.flow.clock.now_s() if arrived_s is None else arrived_s)
        tenant, found, request = front.authenticate(call.api_key), None, None
        if terms.key:
            _check_key(terms.key)
            found = self._known(tenant, terms) or await self._known_elsewhere(tenant, terms)
        if found is None:
            request, _ = await front.admit(call, arrived_s)
            if request.sampling.prompt_logprobs is not None:
                raise InvalidRequest("a resumable request has no logprobs of its prompt; leave one out", param=HEADER)
            found = self._known(tenant, terms) if terms.key else None  # it may have come while this one was read
        if admitted is not None:
            admitted()
        if found is not None or request is None:
            return found or ""
        asked = Asked(request, terms.face, terms.body, int(time.time()), terms.key, terms.fingerprint)
        front.flow.check_id(request)
        entry = self._streams.start(asked, front.flow.generate(request, timeline))
        if asked.runs_alone:
            await asyncio.sleep(0)  # its first step admits or refuses it, before anything is awaited
            if entry.error is not None:
                self._streams.journal.forget(entry)
                raise entry.error
        return entry

    async def resume(self, tenant: str, request_id: str, cursor: str, param: str = "cursor") -> Started:
        """Go on with a tenant's resumable request after a cursor; an empty one is the beginning.

        Raises:
            RequestNotFound: the tenant has none of that id, or it has been forgotten.
            InvalidRequest: the cursor is none of it. `param` names where it was given.
            TwostrokeError: the request failed.
        """
        entry = self._streams.journal.find(tenant, request_id)
        if entry is not None:
            return await self._started(entry.asked, self._streams.read(entry), cursor, param)
        followed = await self._peers.follow(tenant, request_id)
        if followed is not None:
            return await self._started(followed.asked, followed.pieces, cursor, param)
        entry = await self.adopted(tenant, request_id)
        if entry is not None:
            return await self._started(entry.asked, self._streams.read(entry), cursor, param)
        raise RequestNotFound(
            f"no resumable request {request_id[:128]!r} is known (any more); send the request again", param="request_id"
        )

    async def so_far(self, tenant: str, request_id: str) -> Stored | None:
        """What there is of a tenant's resumable request now, at any router; None: none of that id is known (any more).

        Raises:
            TwostrokeError: its router was lost, and it cannot go on here now.
        """
        entry = self._streams.journal.find(tenant, request_id)
        if entry is None and (stored := await self._peers.so_far(tenant, request_id)) is not None:
            return stored
        entry = entry or await self.adopted(tenant, request_id)
        return None if entry is None else Stored(entry.asked, list(entry.pieces), entry.error, entry.is_over)

    async def forget(self, tenant: str, request_id: str) -> None:
        """Delete a resumable request at every router and in the store; one that runs is cancelled.

        Raises:
            Unavailable: the store does not answer, and may still have it.
        """
        await self._peers.forget(tenant, request_id)
        if not await self._forget(tenant, request_id):
            raise Unavailable("the journal's store does not answer; delete it again", retry_after_s=1.0)

    async def forget_here(self, tenant: str, request_id: str) -> bool:
        """Delete a resumable request of this router. False: there is none of that id."""
        if self._streams.journal.find(tenant, request_id) is None:
            return False
        await self._forget(tenant, request_id)
        return True

    async def _forget(self, tenant: str, request_id: str) -> bool:
        """The same, and what a store has of it. False: the store does not answer."""
        entry = self._streams.journal.find(tenant, request_id)
        if entry is not None:
            self._streams.drop(entry, Cancelled("it was deleted"))
        return await self.store.forget(tenant, request_id)

    async def adopted(self, tenant: str, request_id: str) -> Entry | None:
        """Take over a stored request whose router does not answer; None: there is none.

        Raises:
            TwostrokeError: it cannot go on here, now or at all. Unless it is over, another router may take it over.
        """
        claim = await self.store.find(tenant, request_id)
        if claim is None:
            return None
        stored = claim.stored
        entry = self._streams.journal.find(tenant, request_id)  # another connection of its client may have been quicker
        if entry is not None:
            return entry
        if stored.is_over or any(piece.usage is not None for piece in stored.pieces):
            return self._streams.keep(stored.asked, stored.pieces, stored.error)
        left_s = stored.asked.created_s + stored.asked.request.timeout_s - time.time()
        if left_s <= 0:
            late = DeadlineExceeded("the request's timeout passed while no router had it")
            if stored.asked.runs_alone:
                return self._streams.keep(stored.asked, stored.pieces, late)
            raise late
        request = _charged(replace(stored.asked.request, timeout_s=min(left_s, stored.asked.request.timeout_s)))
        await self._front.models.get(request.model)  # this and the next refuse it before it is ours: it stays resumable
        num_bytes = request.num_tokens * MOST_BYTES_PER_TOKEN
        self._front.flow.foresee(Announced(tenant, request.priority, request.allowance, num_bytes, left_s))
        if not await claim.take():
            raise Unavailable("another router is taking the stream over; resume it again", retry_after_s=1.0)
        if (entry := self._streams.journal.find(tenant, request_id)) is not None:
            return entry
        timeline = Timeline()
        timeline.mark(Instant.ARRIVED, self._front.flow.clock.now_s())
        rest = self._front.flow.generate(request, timeline, stored.pieces)
        entry = self._streams.start(stored.asked, rest, stored.pieces)
        self.store.own(entry, claim)
        self.num_adopted += 1
        return entry

    async def _started(
        self, asked: Asked, pieces: AsyncGenerator[OutputDelta, None], cursor: str, param: str
    ) -> Started:
        request = asked.request
        try:
            track = Track(request.num_choices, parse_cursor(cursor, request.num_choices, param))
            model = await self._front.models.get(request.model)
            first = await anext(pieces)
        except BaseException:
            await pieces.aclose()
            raise
        return Started((request,), model, first, pieces, track, asked)

    def _known(self, tenant: str, terms: Terms) -> str | None:
        entry = self._streams.journal.find_key(tenant, terms.key)
        if entry is None:
            return None
        check_same(entry.asked.fingerprint, terms.fingerprint)
        return entry.asked.request.request_id

    async def _known_elsewhere(self, tenant: str, terms: Terms) -> str | None:
        found = await self._peers.find_key(tenant, terms.key)
        if found is None:
            return None
        check_same(found.fingerprint, terms.fingerprint)
        return found.request_id


def _charged(request: Request) -> Request:
    """An adopted request: the router that it came to has charged its key for it."""
    if request.allowance is None:
        return request
    return replace(request, allowance=replace(request.allowance, requests_per_minute=None, tokens_per_minute=None))


def fingerprint_of(face: str, values: Any) -> bytes:
    """Fingerprint of a body: equal for equal values, whatever their order and spaces."""
    text = json.dumps([face, values], sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _check_key(key: str) -> None:
    if not _KEY.fullmatch(key):
        raise InvalidRequest(
            f"the Idempotency-Key has {len(key)} characters, or one that is not visible ASCII; use 1 to 255 of them",
            param="Idempotency-Key",
        )
