"""Stored responses: found at any router, as they are now or as they go on, and as the beginning of a conversation.

They stand in the journal of resumable requests (router/journal/), within its bounds in number, bytes and time. What is
stored of a body is JSON text: compact, counted as it is, and made in a thread where it is long.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from .....core.errors import (
    CursorLost,
    InternalError,
    InvalidRequest,
    PreviousResponseNotFound,
    RequestNotFound,
    TwostrokeError,
)
from ....journal.journal import RESPONSE, Asked
from ....journal.merged import merged
from ....journal.stored import Stored
from ....peers.peers import Followed
from ....requests.pieces import OutputDelta
from ...checks import short
from ...frontend import Frontend
from ...http.structure import SLICE_BYTES
from ...validate import is_request_id
from .fields import Wanted
from .items import Item, check_number, num_parts
from .reply import Reply, Shape

T = TypeVar("T")

PREVIOUS = "previous_response_id"
ENDING_S = 2.0  # that a cancelled response may take to end
PARTS_AT_ONCE = 256  # items and parts that are worked on at once, in a millisecond


class KeptResponses:
    """The stored responses of a cluster, as one router finds them."""

    def __init__(self, front: Frontend, max_bytes: int) -> None:
        """`max_bytes`: of the items of one stored conversation, as JSON."""
        self._front = front
        self._max_bytes = max_bytes

    async def body_of(self, wanted: Wanted, items: Sequence[Item], *, is_resumable: bool) -> dict[str, Any]:
        """What is journaled of a body; the items only if the response is stored.

        Raises:
            InvalidRequest: the conversation is too long to be stored.
        """
        kept = items if wanted.is_stored else []
        is_long = num_parts(kept) > PARTS_AT_ONCE or sum(map(_num_chars, kept)) > SLICE_BYTES
        text = await apart(lambda: json.dumps(kept, ensure_ascii=False), is_long=is_long)
        is_long = is_long or bool(wanted.offer.tools) or len(wanted.body.instructions or "") > SLICE_BYTES
        said = await apart(lambda: json.dumps(wanted.said()), is_long=is_long)
        if len(text) > self._max_bytes:
            raise InvalidRequest(
                f"the conversation has {len(text)} characters; at most {self._max_bytes} are stored (twice "
                "router.max_body_bytes): begin a new one, or set store to false",
                param="input",
            )
        return {
            "background": bool(wanted.body.background),
            "resumable": is_resumable,
            "logprobs": wanted.logprobs,
            "said": said,
            "items": text,
        }

    def keep(self, asked: Asked, pieces: list[OutputDelta]) -> None:
        """Store a response that is complete."""
        entry = self._front.streams.keep(asked, merged(pieces), None)
        self._front.streams.on_change(entry)

    async def find(self, tenant: str, response_id: str) -> Stored:
        """A tenant's response as it is now.

        Raises:
            RequestNotFound: the tenant has none of that id, or not any more.
        """
        stored = None
        if is_request_id(response_id):
            stored = await self._front.resumables.so_far(tenant, response_id)
        if stored is None or not stored.asked.is_response:
            raise RequestNotFound(
                f"no response {short(response_id)} is stored (any more): responses are kept for a time after their "
                "end, and within bounds, unless store is false",
                param="response_id",
            )
        return stored

    async def ended(self, tenant: str, response_id: str) -> Stored:
        """A tenant's response whose end is on its way, when it is over; as it is after `ENDING_S`.

        Raises:
            RequestNotFound: as `find`.
        """
        with contextlib.suppress(TimeoutError, TwostrokeError):
            async with asyncio.timeout(ENDING_S):
                followed = await self.follow(tenant, response_id)
                async with contextlib.aclosing(followed.pieces) as pieces:
                    async for _ in pieces:
                        pass
        return await self.find(tenant, response_id)

    async def follow(self, tenant: str, response_id: str) -> Followed:
        """A tenant's response from its beginning, as it goes on. Its owner closes the pieces.

        Raises:
            RequestNotFound: as `find`.
            InvalidRequest: it is kept whole, without the steps in which it came.
        """
        await self.find(tenant, response_id)  # adopts it if its router was lost
        entry = self._front.streams.journal.find(tenant, response_id)
        if entry is not None:
            found: Followed | None = Followed(entry.asked, self._front.streams.read(entry), entry.num_proven)
        else:
            found = await self._front.peers.follow(tenant, response_id)
        if found is None:
            raise RequestNotFound(f"response {short(response_id)} is not stored any more", param="response_id")
        if not (found.asked.runs_alone or found.asked.body.get("resumable")):
            await found.pieces.aclose()
            raise InvalidRequest(
                f"stream is true, and response {short(response_id)} was made without background; only those that were "
                "made with it are streamed again: leave stream out",
                param="stream",
            )
        return found

    async def conversation(self, tenant: str, response_id: str) -> list[Item]:
        """The items of a conversation up to and with the output of a response.

        Raises:
            PreviousResponseNotFound: the tenant has none of that id, or not any more.
            InvalidRequest: it is still under way.
        """
        try:
            stored = await self.find(tenant, response_id)
        except RequestNotFound:
            raise PreviousResponseNotFound(
                f"{PREVIOUS} is {short(response_id)}, which is not stored (any more): responses are kept for a time "
                "after their end, and within bounds; send the whole conversation as input",
                param=PREVIOUS,
            ) from None
        if not stored.is_over:
            raise InvalidRequest(
                f"{PREVIOUS} is {short(response_id)}, which is still under way; wait for its end", param=PREVIOUS
            )
        output = (await self.whole(stored))["output"]
        items = [*await items_of_asked(stored.asked), *map(_as_input, output)]
        check_number(len(items), PREVIOUS)
        return items

    async def whole(self, stored: Stored) -> dict[str, Any]:
        """The object of a response as it is now."""
        reply = await self.reply_of(stored.asked)
        pieces = merged(stored.pieces)

        def fold() -> dict[str, Any]:
            for _ in reply.begin():
                pass
            for piece in pieces:
                for _ in reply.take(piece):
                    pass
            if stored.is_over:
                for _ in reply.end() if stored.error is None else reply.fail(stored.error):
                    pass
            return reply.whole()

        return await apart(fold, is_long=sum(len(piece.text) for piece in pieces) > SLICE_BYTES)

    async def reply_of(self, asked: Asked) -> Reply:
        """The fold of a response's pieces, at its beginning."""
        return Reply(shape_of(asked), asked.request, await self._front.models.get(asked.request.model))


def shape_of(asked: Asked) -> Shape:
    """What a response repeats of its body, and shows.

    Raises:
        CursorLost: it was journaled by another release.
    """
    try:
        said = json.loads(asked.body["said"])
        return Shape(said, asked.created_s, bool(asked.body["logprobs"]))
    except (ValueError, KeyError, TypeError):
        raise CursorLost("the response was stored in a form that is unknown here; send it again") from None


async def items_of_asked(asked: Asked) -> list[Item]:
    """The items that a response was made from."""
    text = asked.body.get("items")
    if asked.face != RESPONSE or not isinstance(text, str):
        raise InternalError("the items of a stored response are missing")
    found: list[Item] = await apart(lambda: json.loads(text), is_long=len(text) > SLICE_BYTES)
    return found


async def apart(work: Callable[[], T], *, is_long: bool) -> T:
    """Run work: in a thread, if it is long."""
    return await asyncio.to_thread(work) if is_long else work()


def _num_chars(item: Item) -> int:
    content = item.get("content") or item.get("output") or item.get("arguments") or ""
    return len(content) if isinstance(content, str) else sum(len(part.get("text", "")) for part in content)


def _as_input(item: Item) -> Item:
    """An item of an output as it is stored in a conversation: without logprobs."""
    if item["type"] != "message":
        return item
    parts = [{"type": "output_text", "text": part["text"], "annotations": []} for part in item["content"]]
    return {**item, "content": parts}
