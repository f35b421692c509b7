"""Handlers of Anthropic's API: messages, whole and streamed, and the count of their tokens. Hold no logic."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from functools import partial
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ....core.errors import TwostrokeError
from ...requests.pieces import OutputDelta
from ..http.callers import caller_of
from ..http.sse import JsonAnswer, to_json, until_disconnect
from ..openai_requests import chat_call
from .anthropic_requests import CountBody, asked_of
from .anthropic_responses import Message
from .door import DialectRoute, Door
from .errors import anthropic_error
from .one_choice import OneChoice

_NAMES = {"chat_template_kwargs.enable_thinking": "thinking", "reasoning_effort": "output_config.effort"}


def anthropic_routes(door: Door) -> list[DialectRoute]:
    """The routes of Anthropic's API."""
    face = _Face(door)
    return [
        DialectRoute("/v1/messages", face.messages, "POST"),
        DialectRoute("/v1/messages/count_tokens", face.count_tokens, "POST"),
    ]


class _Face:
    def __init__(self, door: Door) -> None:
        self._door = door

    async def messages(self, http: HttpRequest) -> Response:
        asked = await self._door.reads.read(http, partial(asked_of, strict=self._door.config.strict))
        name = f"msg_{secrets.token_hex(12)}"
        started = await self._door.start(http, chat_call(asked.chat, caller_of(http).api_key), name, _NAMES)
        choice = OneChoice(started.request, started.model, asked.stops)
        num_prompt = len(started.request.prompt_ids)
        message = Message(name, started.request.model, choice, num_prompt, shows_thinking=asked.shows_thinking)
        if asked.chat.stream:
            response = self._door.stream(started, _Events(message, choice), "text/event-stream; charset=utf-8")
        else:
            await self._door.collect(http, started, lambda piece: message.add(choice.take(piece)))
            response = JsonAnswer(message.whole())
        response.headers["request-id"] = name  # Anthropic's name of x-request-id
        return response

    async def count_tokens(self, http: HttpRequest) -> Response:
        parse = partial(asked_of, kind=CountBody, strict=self._door.config.strict)
        asked = await self._door.reads.read(http, parse)
        call = self._door.timed(http, chat_call(asked.chat, caller_of(http).api_key))
        request, _ = await until_disconnect(http, self._door.front.admit(call))
        return JsonAnswer({"input_tokens": len(request.prompt_ids)})


class _Events:
    """The stream of a message, as server-sent events with names."""

    def __init__(self, message: Message, choice: OneChoice) -> None:
        self._message, self._choice = message, choice

    def begin(self) -> bytes:
        return _written(self._message.begin())

    def piece(self, piece: OutputDelta) -> bytes:
        return _written(self._message.events(self._choice.take(piece)))

    def end(self) -> bytes:
        return _written(self._message.end())

    def error(self, error: TwostrokeError) -> bytes:
        return _written([anthropic_error(error)])


def _written(events: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(b"event: %s\ndata: %s\n\n" % (event["type"].encode(), to_json(event)) for event in events)
