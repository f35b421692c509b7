"""Handlers of OpenAI's Responses API. Hold no logic."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from .....core.errors import Cancelled, InvalidRequest, NoSuchRoute, TwostrokeError
from ....journal.journal import RESPONSE, Asked
from ....peers.peers import Followed
from ....requests.pieces import OutputDelta
from ...call import GenerateCall
from ...checks import short
from ...http.callers import caller_of
from ...http.sse import EventStream, JsonAnswer, until_disconnect
from ...openai_requests import chat_call
from ...running.resumable import HEADER, KEY_HEADER, Terms, fingerprint_of
from ...validate import is_request_id
from ..door import DialectRoute, Door
from .fields import THEIR_NAMES, Wanted, check_include, in_their_words, wanted_of
from .items import Item, check_calls, check_number, num_parts
from .kept import PARTS_AT_ONCE, PREVIOUS, KeptResponses, apart, items_of_asked, shape_of
from .reply import Reply
from .streams import CONTENT_TYPE, OwnEvents, events_after

MAX_LIMIT, USUAL_LIMIT = 100, 20  # of items that one answer lists, as OpenAI has it
_NUMBER = re.compile(r"\d{1,9}", re.ASCII)
_ID = "/v1/responses/{response_id}"


def responses_routes(door: Door) -> list[DialectRoute]:
    """The routes of the Responses API."""
    face = _Face(door)
    routes = [
        DialectRoute("/v1/responses", face.create, "POST"),
        DialectRoute("/v1/responses/input_tokens", face.count_tokens, "POST"),
        DialectRoute(_ID, face.retrieve, "GET"),
        DialectRoute(_ID, face.delete, "DELETE"),
        DialectRoute(f"{_ID}/cancel", face.cancel, "POST"),
        DialectRoute(f"{_ID}/input_items", face.input_items, "GET"),
    ]
    return [*routes, DialectRoute("/v1/responses/compact", _compact, "POST")]


async def _compact(http: HttpRequest) -> Response:
    raise NoSuchRoute("/v1/responses/compact is not served; send a shorter conversation as input")


@contextmanager
def _their_words() -> Generator[None, None, None]:
    """Errors of the validator get this API's names of fields."""
    try:
        yield
    except TwostrokeError as error:
        raise in_their_words(error) from error


class _Face:
    def __init__(self, door: Door) -> None:
        self._door = door
        self._front = door.front
        self._kept = KeptResponses(door.front, 2 * door.config.max_body_bytes)

    async def create(self, http: HttpRequest) -> Response:
        wanted, items, call = await self._read(http)
        name = f"resp_{secrets.token_hex(24)}"
        http.state.request_id = name  # also for errors: `explain` knows the request by it
        is_resumable = _is_resumable(http)
        if is_resumable and not wanted.is_stored:
            raise InvalidRequest("store is false, and a resumable response is stored; leave store out", param="store")
        body = await self._kept.body_of(wanted, items, is_resumable=is_resumable)
        if wanted.body.background or is_resumable:
            return await self._run_kept(http, wanted, replace(call, request_id=name), body)
        return await self._run(http, wanted, call, body)

    async def _read(self, http: HttpRequest) -> tuple[Wanted, list[Item], GenerateCall]:
        """The body, the items of its whole conversation, and the call for its answer."""
        caller = caller_of(http)
        wanted = await self._door.reads.read(http, partial(wanted_of, strict=self._door.config.strict))
        items, ignored = await apart(wanted.items, is_long=num_parts(wanted.body.input) > PARTS_AT_ONCE)
        self._door.reads.note_ignored(http, ignored)
        previous = wanted.body.previous_response_id
        if previous is not None:
            items = [*await until_disconnect(http, self._kept.conversation(caller.grant.tenant, previous)), *items]
            check_number(len(items), PREVIOUS)
        check_calls(items)
        with _their_words():
            chat = await apart(partial(wanted.chat, items), is_long=num_parts(items) > PARTS_AT_ONCE)
            return wanted, items, chat_call(chat, caller.api_key)

    async def _run(self, http: HttpRequest, wanted: Wanted, call: GenerateCall, body: dict[str, Any]) -> Response:
        """Run a request for its client alone, and store the response at its end."""
        with _their_words():
            started = await self._door.start(http, call, http.state.request_id, THEIR_NAMES)
        asked = Asked(started.request, RESPONSE, body, int(time.time()))
        reply = Reply(shape_of(asked), started.request, started.model)
        keep = partial(self._kept.keep, asked) if wanted.is_stored else None
        if wanted.body.stream:
            return self._door.stream(started, OwnEvents(reply, keep), CONTENT_TYPE)
        writer = _Whole(reply)
        await self._door.collect(http, started, writer.take)
        answer = writer.whole()
        if keep is not None:
            keep(writer.pieces)
        return JsonAnswer(answer)

    async def _run_kept(self, http: HttpRequest, wanted: Wanted, call: GenerateCall, body: dict[str, Any]) -> Response:
        """Run a request that goes on without its client."""
        caller = caller_of(http)
        key = http.headers.get(KEY_HEADER, "")
        values = wanted.body.model_dump(mode="json", exclude_none=True) if key else None
        terms = Terms(RESPONSE, body, key, fingerprint_of(RESPONSE, values))
        beginning = self._front.resumables.begin(self._door.timed(http, call), terms, arrived_s=caller.arrived_s)
        with _their_words():
            begun = await until_disconnect(http, beginning)
        if isinstance(begun, str):
            http.state.request_id = begun
        else:
            ignored = begun.asked.request.ignored_fields
            self._door.reads.note_ignored(http, [THEIR_NAMES.get(name, name) for name in ignored])
        if wanted.body.background and not wanted.body.stream:
            return JsonAnswer(await self._now(http, http.state.request_id))
        if isinstance(begun, str):
            followed = await self._kept.follow(caller.grant.tenant, begun)
        else:
            followed = Followed(begun.asked, self._front.streams.read(begun), None)
        if wanted.body.stream:
            return await self._stream(http, followed, -1)
        writer = _Whole(await self._kept.reply_of(followed.asked))
        await until_disconnect(http, _taken(followed, writer))
        return JsonAnswer(writer.whole())

    async def retrieve(self, http: HttpRequest) -> Response:
        name = _id_of(http)
        _check_included(http)
        is_streamed = _flag(http, "stream")
        after = http.query_params.get("starting_after")
        if after is not None and not _NUMBER.fullmatch(after):
            raise InvalidRequest(
                f"starting_after is {short(after)}; must be the sequence_number of an event", param="starting_after"
            )
        if is_streamed:
            followed = await self._kept.follow(caller_of(http).grant.tenant, name)
            return await self._stream(http, followed, -1 if after is None else int(after))
        if after is not None:
            raise InvalidRequest("starting_after is given without stream; set stream to true", param="starting_after")
        return JsonAnswer(await self._now(http, name))

    async def cancel(self, http: HttpRequest) -> Response:
        tenant, name = caller_of(http).grant.tenant, _id_of(http)
        stored = await self._kept.find(tenant, name)
        if not stored.asked.runs_alone:
            raise InvalidRequest(
                f"response {short(name)} was made without background; its client cancels it by leaving",
                param="response_id",
            )
        if not stored.is_over:
            is_cancelled = await self._front.abort(name, tenant)  # False: it is ending already
            stored = await self._kept.ended(tenant, name)
            if is_cancelled and not stored.is_over:
                stored.error, stored.is_over = Cancelled("it was cancelled"), True
        return JsonAnswer(await self._kept.whole(stored))

    async def delete(self, http: HttpRequest) -> Response:
        tenant, name = caller_of(http).grant.tenant, _id_of(http)
        await self._kept.find(tenant, name)
        await self._front.resumables.forget(tenant, name)
        return JsonAnswer({"id": name, "object": "response", "deleted": True})

    async def input_items(self, http: HttpRequest) -> Response:
        _check_included(http)
        stored = await self._kept.find(caller_of(http).grant.tenant, _id_of(http))
        items = await items_of_asked(stored.asked)
        return JsonAnswer(_page(http, items))

    async def count_tokens(self, http: HttpRequest) -> Response:
        _, _, call = await self._read(http)
        with _their_words():
            request, _ = await until_disconnect(http, self._front.admit(self._door.timed(http, call)))
        return JsonAnswer({"object": "response.input_tokens", "input_tokens": len(request.prompt_ids)})

    async def _now(self, http: HttpRequest, name: str) -> dict[str, Any]:
        stored = await self._kept.find(caller_of(http).grant.tenant, name)
        return await self._kept.whole(stored)

    async def _stream(self, http: HttpRequest, followed: Followed, after: int) -> Response:
        try:
            reply = await self._kept.reply_of(followed.asked)
            events = events_after(followed, reply, after)
            first = await until_disconnect(http, _first(events))
        except BaseException:
            await followed.pieces.aclose()
            raise
        return EventStream(_with_first(first, events), {}, self._door.config.slow_client_s, source=followed.pieces)


class _Whole:
    """Takes the pieces of a response that is answered whole."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self.pieces: list[OutputDelta] = []
        for _ in reply.begin():
            pass

    def take(self, piece: OutputDelta) -> None:
        self.pieces.append(piece)
        for _ in self._reply.take(piece):
            pass

    def whole(self) -> dict[str, Any]:
        for _ in self._reply.end():
            pass
        return self._reply.whole()


async def _taken(followed: Followed, writer: _Whole) -> None:
    async with aclosing(followed.pieces) as pieces:
        async for piece in pieces:
            writer.take(piece)


async def _first(events: AsyncGenerator[bytes, None]) -> bytes:
    """The first events; an error before them is raised here. Empty: there are none."""
    return await anext(events, b"")


async def _with_first(first: bytes, events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    try:
        if first:
            yield first
        async for part in events:
            yield part
    finally:
        await events.aclose()


def _is_resumable(http: HttpRequest) -> bool:
    """Whether the client wants to come back to a response that it waits for."""
    return KEY_HEADER in http.headers or http.headers.get(HEADER, "").lower() not in ("", "0", "false")


def _id_of(http: HttpRequest) -> str:
    """The id in the path, which may be anything; a possible one is also the id of the request."""
    name = str(http.path_params["response_id"])
    if is_request_id(name):
        http.state.request_id = name
    return name


def _check_included(http: HttpRequest) -> None:
    """Check `include` of a query: given several times, with or without brackets, as clients of several languages do."""
    check_include([*http.query_params.getlist("include"), *http.query_params.getlist("include[]")])


def _flag(http: HttpRequest, name: str) -> bool:
    said = http.query_params.get(name, "false")
    if said.lower() not in ("true", "false", "1", "0"):
        raise InvalidRequest(f"{name} is {short(said)}; must be true or false", param=name)
    return said.lower() in ("true", "1")


def _page(http: HttpRequest, items: list[Item]) -> dict[str, Any]:
    """A part of a list of items, as the query asks for it: newest first, as OpenAI's, unless it says asc."""
    limit, order, after = (http.query_params.get(name) for name in ("limit", "order", "after"))
    if limit is not None and not (_NUMBER.fullmatch(limit) and 1 <= int(limit) <= MAX_LIMIT):
        raise InvalidRequest(f"limit is {short(limit)}; must be a whole number from 1 to {MAX_LIMIT}", param="limit")
    if order not in (None, "asc", "desc"):
        raise InvalidRequest(f"order is {short(order)}; must be asc or desc", param="order")
    listed = items if order == "asc" else items[::-1]
    if after is not None:
        place = next((place for place, item in enumerate(listed) if item["id"] == after), None)
        if place is None:
            raise InvalidRequest(f"after is {short(after)}, which is the id of none of the items", param="after")
        listed = listed[place + 1 :]
    num = USUAL_LIMIT if limit is None else int(limit)
    shown = listed[:num]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(listed) > num,
    }
