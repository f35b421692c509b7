"""Handlers of Ollama's API: chats, generations, and descriptions of the served models. Hold no logic."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from .... import __version__
from ....core.errors import InvalidRequest, TwostrokeError
from ...requests.pieces import OutputDelta
from ...routing.facts import ModelFacts
from ..call import GenerateCall
from ..http.callers import caller_of
from ..http.sse import JsonAnswer, to_json
from ..openai_requests import chat_call, checked, completion_calls
from ..validate import new_request_id
from .door import DialectRoute, Door, Values
from .errors import ollama_error
from .ollama_models import running, shown, tag_of
from .ollama_requests import Asked, ShowBody, asked_of_chat, asked_of_generate
from .ollama_responses import Reply, loaded
from .one_choice import OneChoice

API_VERSION = "0.20.0"
"""Release of Ollama whose API these routes follow. Clients compare it: VS Code's chat needs 0.6.4, Codex 0.13.4."""

_LATEST = ":latest"  # the tag that Ollama adds to a name without one
_NAMES = {"chat_template_kwargs.enable_thinking": "think", "reasoning_effort": "think"}
_LINES = "application/x-ndjson"


def ollama_routes(door: Door) -> list[DialectRoute]:
    """The routes of Ollama's API."""
    face = _Face(door)
    return [
        DialectRoute("/api/chat", face.chat, "POST"),
        DialectRoute("/api/generate", face.generate, "POST"),
        DialectRoute("/api/tags", face.tags, "GET"),
        DialectRoute("/api/ps", face.ps, "GET"),
        DialectRoute("/api/show", face.show, "POST"),
        DialectRoute("/api/version", face.version, "GET"),
    ]


class _Face:
    def __init__(self, door: Door) -> None:
        self._door = door
        self._front = door.front

    async def chat(self, http: HttpRequest) -> Response:
        return await self._answer(http, asked_of_chat, is_chat=True)

    async def generate(self, http: HttpRequest) -> Response:
        return await self._answer(http, asked_of_generate, is_chat=False)

    async def _answer(
        self, http: HttpRequest, parse: Callable[..., tuple[Asked, list[str]]], *, is_chat: bool
    ) -> Response:
        asked = await self._door.reads.read(http, partial(parse, strict=self._door.config.strict))
        caller = caller_of(http)
        call = await self._call(asked, caller.api_key)
        if call is None:
            caller.grant.check_model(self._front.models.facts(self._name(asked.model)).name)
            return JsonAnswer(loaded(asked.model, is_chat=is_chat))
        started = await self._door.start(http, call, new_request_id(call.messages is not None), _NAMES)
        choice = OneChoice(started.request, started.model)
        reply = Reply(
            asked.model,
            choice,
            len(started.request.prompt_ids),
            caller.arrived_s,
            self._front.flow.clock.now_s,
            is_chat=is_chat,
            shows_thinking=asked.shows_thinking,
        )
        if asked.is_streamed:
            return self._door.stream(started, _Lines(reply, choice), _LINES)
        await self._door.collect(http, started, lambda piece: reply.add(choice.take(piece)))
        return JsonAnswer(reply.whole())

    async def _call(self, asked: Asked, api_key: str | None) -> GenerateCall | None:
        """The call that a body asks for; None: it only asks for the model. A base model takes its prompt as it is."""
        name = self._name(asked.model)
        chat, completion = asked.chat, asked.completion
        if chat is not None and completion is not None and (await self._front.models.get(name)).template is None:
            chat = None
        if chat is not None:
            return chat_call(chat.model_copy(update={"model": name}), api_key)
        if completion is not None:
            return completion_calls(completion.model_copy(update={"model": name}), api_key, 1)[0]
        return None

    def _name(self, given: str) -> str:
        """The served model that a name means."""
        bare = given.removesuffix(_LATEST)
        return bare if given not in self._front.models.names() and bare in self._front.models.names() else given

    async def tags(self, http: HttpRequest) -> Response:
        return JsonAnswer({"models": await self._listed(http, tag_of)})

    async def ps(self, http: HttpRequest) -> Response:
        return JsonAnswer({"models": await self._listed(http, running)})

    async def _listed(self, http: HttpRequest, form: Callable[[ModelFacts], dict[str, Any]]) -> list[dict[str, Any]]:
        """The models that the caller may use; their files are looked at in a thread."""
        allowed = caller_of(http).grant.models
        names = [name for name in self._front.models.names() if not allowed or name in allowed]
        facts = [self._front.models.facts(name) for name in names]
        return await asyncio.to_thread(lambda: list(map(form, facts)))

    async def show(self, http: HttpRequest) -> Response:
        body = await self._door.reads.read(http, partial(_show_body, strict=self._door.config.strict))
        name = body.model or body.name
        if not name:
            raise InvalidRequest("model is missing; give the name of a served model", param="model")
        name = self._name(name)
        caller_of(http).grant.check_model(name)
        served = await self._front.models.get(name)
        return JsonAnswer(await asyncio.to_thread(shown, self._front.models.facts(name), served))

    async def version(self, http: HttpRequest) -> Response:
        return JsonAnswer({"version": API_VERSION, "server": f"twostroke {__version__}"})


def _show_body(values: Values, *, strict: bool) -> tuple[ShowBody, list[str]]:
    return checked(values, ShowBody, frozenset(), {}, strict=strict)


class _Lines:
    """The stream of an answer, one JSON object per line."""

    def __init__(self, reply: Reply, choice: OneChoice) -> None:
        self._reply, self._choice = reply, choice

    def begin(self) -> bytes:
        return b""

    def piece(self, piece: OutputDelta) -> bytes:
        return _line(self._reply.part(self._choice.take(piece)))

    def end(self) -> bytes:
        return _line(self._reply.last())

    def error(self, error: TwostrokeError) -> bytes:
        return _line(ollama_error(error))


def _line(value: dict[str, Any] | None) -> bytes:
    return b"" if value is None else to_json(value) + b"\n"
