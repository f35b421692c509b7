"""The OpenAI HTTP face: routes, status codes, event streams. Holds no logic of its own."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..core.errors import (
    BodyTooLarge,
    Cancelled,
    DeadlineExceeded,
    InternalError,
    RequestNotFound,
    TwostrokeError,
    Unavailable,
)
from . import openai
from .answers import Answer, Wants, error_body, usage_body
from .call import Call
from .config import RouterConfig
from .front import Front, Started
from .pieces import Piece, Usage
from .stream import EventStream, until_disconnect
from .validate import is_request_id, new_request_id

log = logging.getLogger(__name__)

BODY_S = 60.0  # within which a body must be here
REQUEST_ID = "x-request-id"

Handler = Callable[[HttpRequest], Awaitable[Response]]


def make_app(config: RouterConfig, front: Front) -> Starlette:
    """The ASGI application of one router."""
    face = _Face(config, front)
    routes = [
        Route("/v1/chat/completions", _typed(face.chat), methods=["POST"]),
        Route("/v1/completions", _typed(face.completions), methods=["POST"]),
        Route("/v1/models", _typed(face.models), methods=["GET"]),
        Route("/v1/models/{name:path}", _typed(face.model), methods=["GET"]),
        Route("/v1/requests/{request_id}/explain", _typed(face.explain), methods=["GET"]),
        Route("/v1/cluster", _typed(face.cluster), methods=["GET"]),
        Route("/health", _typed(face.health), methods=["GET"]),
        Route("/metrics", _typed(face.metrics), methods=["GET"]),
    ]
    return Starlette(routes=routes, exception_handlers={404: _no_such_route, 405: _wrong_method})


class _Face:
    def __init__(self, config: RouterConfig, front: Front) -> None:
        self._config = config
        self._front = front

    async def chat(self, http: HttpRequest) -> Response:
        body = openai.parse(await self._body(http), openai.ChatBody)
        assert isinstance(body, openai.ChatBody)
        call = openai.chat_call(body, _api_key(http))
        return await self._run(http, call, "chat.completion", body)

    async def completions(self, http: HttpRequest) -> Response:
        body = openai.parse(await self._body(http), openai.CompletionBody)
        assert isinstance(body, openai.CompletionBody)
        call = openai.completion_call(body, _api_key(http))
        return await self._run(http, call, "text_completion", body)

    async def _run(self, http: HttpRequest, call: Call, kind: str, body: openai.Body) -> Response:
        call = replace(call, request_id=call.request_id or new_request_id(call.messages is not None))
        if is_request_id(call.request_id or ""):
            http.state.request_id = call.request_id  # on errors too: `explain` knows it
        started = await until_disconnect(http, self._front.start(call))
        request = started.request
        head = {"id": request.request_id, "object": kind, "created": int(time.time()), "model": request.model}
        if body.stream:
            head["object"] = "chat.completion.chunk" if kind.startswith("chat") else kind
            head |= {"usage": None} if body.include_usage else {}
        answer = Answer(head, request, started.model, _wants(body, started))
        if body.stream:
            return EventStream(_events(started, answer, body.include_usage), {}, self._config.slow_client_s)
        return JSONResponse(await until_disconnect(http, _whole(started, answer)))

    async def models(self, http: HttpRequest) -> Response:
        self._front.authenticate(_api_key(http))
        return JSONResponse({"object": "list", "data": [self._card(name) for name in self._front.models.names()]})

    async def model(self, http: HttpRequest) -> Response:
        self._front.authenticate(_api_key(http))
        return JSONResponse(self._card(http.path_params["name"]))

    def _card(self, name: str) -> dict[str, Any]:
        facts = self._front.models.facts(name)
        return {
            "id": facts.name,
            "object": "model",
            "created": 0,  # unknown: a checkpoint does not say
            "owned_by": "twostroke",
            "max_model_len": facts.max_model_len,
        }

    async def explain(self, http: HttpRequest) -> Response:
        domain = self._front.authenticate(_api_key(http))
        request_id = http.path_params["request_id"]
        explained = self._front.explain(request_id, domain)
        if explained is None:
            raise RequestNotFound(f"no request {request_id[:128]!r} is known here (any more)", param="request_id")
        return JSONResponse(explained)

    async def cluster(self, http: HttpRequest) -> Response:
        self._front.authenticate(_api_key(http))
        return JSONResponse(self._front.flow.cluster())

    async def health(self, http: HttpRequest) -> Response:
        if self._front.flow.refusing:
            raise Unavailable(self._front.flow.refusing, retry_after_s=2.0)
        if not self._front.flow.models():
            raise Unavailable("no worker is ready", retry_after_s=2.0)
        return JSONResponse({"status": "ok"})

    async def metrics(self, http: HttpRequest) -> Response:
        self._front.authenticate(_api_key(http))
        body, content_type = self._front.flow.metrics.render(http.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    async def _body(self, http: HttpRequest) -> bytes:
        """The body, refused as soon as it is too long: by its header, else by its bytes."""
        limit = self._config.max_body_bytes
        announced = http.headers.get("content-length", "0")
        if announced.isdigit() and int(announced) > limit:
            raise BodyTooLarge(f"the body has {announced} bytes; at most {limit} (router.max_body_bytes)")
        data = bytearray()
        try:
            async with asyncio.timeout(BODY_S):
                async for part in http.stream():
                    data += part
                    if len(data) > limit:
                        raise BodyTooLarge(f"the body has more than {limit} bytes (router.max_body_bytes)")
        except TimeoutError:
            raise DeadlineExceeded(f"the body was not here within {BODY_S:g} s") from None
        except ClientDisconnect:
            raise Cancelled("the client left before its body was here") from None
        return bytes(data)


def _wants(body: openai.Body, started: Started) -> Wants:
    echo: str | None = None
    if isinstance(body, openai.CompletionBody) and body.echo:
        echo = body.prompt if isinstance(body.prompt, str) else started.model.tokenizer.decode(body.prompt)
    return Wants(started.request.sampling.logprobs, body.prompt_logprobs, echo)


async def _whole(started: Started, answer: Answer) -> dict[str, Any]:
    """All pieces as one response object."""
    pieces = started.pieces()
    try:
        async for piece in pieces:
            answer.add(piece)
    finally:
        await pieces.aclose()
    return answer.whole()


async def _events(started: Started, answer: Answer, include_usage: bool) -> AsyncGenerator[bytes, None]:
    """Server-sent events of a stream; an error within it becomes its last event."""
    usage: Usage | None = None
    pieces: AsyncGenerator[Piece, None] = started.pieces()
    try:
        async for piece in pieces:
            usage = piece.usage or usage
            yield _event(answer.chunk(piece))
        if include_usage and usage is not None:
            yield _event(answer.head | {"choices": [], "usage": usage_body(usage)})
        yield b"data: [DONE]\n\n"
    except TwostrokeError as error:
        yield _event(error_body(error))
    except Exception:
        log.exception("request %s failed within its stream", started.request.request_id)
        yield _event(error_body(InternalError("the request failed; the router's log has more")))
    finally:
        await pieces.aclose()


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _api_key(http: HttpRequest) -> str | None:
    scheme, _, key = http.headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else None


def _typed(handler: Handler) -> Handler:
    """Every failure leaves as `{"error": {...}}` with its status and, where it has one, Retry-After.

    Every answer has an x-request-id; it stands beside an unexpected failure in the log.
    """

    async def wrapped(http: HttpRequest) -> Response:
        http.state.request_id = _new_id()
        try:
            response = await handler(http)
        except TwostrokeError as error:
            response = _error(error)
        except Exception:
            log.exception("%s %s failed (%s)", http.method, http.url.path, http.state.request_id)
            response = _error(InternalError("the request failed; the router's log has more"))
        response.headers[REQUEST_ID] = http.state.request_id
        return response

    return wrapped


def _error(error: TwostrokeError) -> Response:
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, round(error.retry_after_s)))
    if error.http_status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(error), status_code=error.http_status, headers=headers)


def _new_id() -> str:
    return f"req-{secrets.token_hex(12)}"


async def _no_such_route(http: HttpRequest, error: Exception) -> Response:
    body = {"message": f"no route {http.method} {http.url.path}", "type": "invalid_request_error"}
    return JSONResponse({"error": body | {"param": None, "code": "not_found"}}, 404, {REQUEST_ID: _new_id()})


async def _wrong_method(http: HttpRequest, error: Exception) -> Response:
    body = {"message": f"{http.url.path} does not take {http.method}", "type": "invalid_request_error"}
    return JSONResponse({"error": body | {"param": None, "code": "method_not_allowed"}}, 405, {REQUEST_ID: _new_id()})
