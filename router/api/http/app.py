"""The HTTP APIs, OpenAI's and those of dialects/: routes, status codes, event streams. Holds no logic of its own."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from .... import __version__
from ....core.errors import InternalError, RequestNotFound, TwostrokeError, Unavailable
from ...api import openai_requests as openai
from ...config import RouterConfig
from ...requests.pieces import OutputDelta
from ..call import GenerateCall
from ..dialects.errors import error_form
from ..dialects.routes import dialect_routes
from ..echo import Echo, echo_of
from ..fields import Body, ChatBody, CompletionBody
from ..frontend import Frontend, Started
from ..openai_responses import Answer, Wants, error_body
from ..validate import is_request_id, new_request_id
from .bodies import read_body
from .browser import middleware_for_pages
from .callers import Caller, KeyDoor, caller_of
from .sse import EventStream, JsonAnswer, event, to_json_in_parts, until_disconnect
from .structure import SLICE_BYTES, finished

log = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
IGNORED = "x-twostroke-ignored"

T = TypeVar("T")
Handler = Callable[[HttpRequest], Awaitable[Response]]


def make_app(config: RouterConfig, front: Frontend) -> Starlette:
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
        Route("/ping", _typed(face.health), methods=["GET", "POST"]),  # SageMaker's health check, as in vLLM
        Route("/version", _typed(face.version), methods=["GET"]),
        Route("/metrics", _typed(face.metrics), methods=["GET"]),
    ]
    dialects = dialect_routes(config, front, face)
    routes += [Route(one.path, _typed(one.handler), methods=[one.method]) for one in dialects]
    door = Middleware(KeyDoor, front=front, answer=_refusal)
    return Starlette(
        routes=routes,
        middleware=[*middleware_for_pages(config, _refusal), Middleware(_TidyPaths), door],
        exception_handlers={404: _no_such_route, 405: _wrong_method},
    )


class _Face:
    def __init__(self, config: RouterConfig, front: Frontend) -> None:
        self._config = config
        self._front = front
        self._started_s = int(time.time())
        self._building = asyncio.Lock()  # one large body at a time, so that several load the loop no more than one
        self._scores = ThreadPoolExecutor(1, "scores")  # likewise one long answer: each thread delays the loop's turn

    async def chat(self, http: HttpRequest) -> Response:
        caller = self._admit(http)
        body = await self._parse(http, ChatBody, caller.grant.tenant)
        return await self._run(http, [openai.chat_call(body, caller.api_key)], "chat.completion", body)

    async def completions(self, http: HttpRequest) -> Response:
        caller = self._admit(http)
        body = await self._parse(http, CompletionBody, caller.grant.tenant)
        openai.refuse_endless(body, self._front.longest_context())  # before another large body is built
        most = min(self._config.max_prompts, self._config.max_running)
        calls = openai.completion_calls(body, caller.api_key, most)
        return await self._run(http, calls, "text_completion", body)

    def _admit(self, http: HttpRequest) -> Caller:
        """Refuse the request by its headers if possible. Called before the body is read."""
        caller = caller_of(http)
        self._front.foresee(caller.grant, caller.size_bytes, caller.timeout_s)
        return caller

    async def _parse(self, http: HttpRequest, kind: type[openai.B], tenant: str) -> openai.B:
        return await self._read(http, partial(openai.parse, kind=kind, strict=self._config.strict), tenant)

    async def read(self, http: HttpRequest, parse: Callable[[dict[str, Any]], tuple[T, list[str]]]) -> T:
        """Read and check a body of a dialect (dialects/door.py)."""
        return await self._read(http, parse, self._admit(http).grant.tenant)

    async def _read(self, http: HttpRequest, parse: Callable[[dict[str, Any]], tuple[T, list[str]]], tenant: str) -> T:
        async with read_body(http, self._config.max_body_bytes, self._front.room, tenant) as data:
            if len(data) <= SLICE_BYTES:  # built in one step, so it need not wait for others
                body, ignored = parse(finished(openai.json_object(data)))
            else:
                async with self._building:
                    body, ignored = parse(await _in_steps(openai.json_object(data)))
        self.note_ignored(http, ignored)  # now, so that later errors have the header, too
        return body

    def note_ignored(self, http: HttpRequest, names: Sequence[str]) -> None:
        """Name fields without effect in the response."""
        http.state.ignored += names
        self._front.flow.metrics.ignored_fields.inc(len(names))

    async def _run(self, http: HttpRequest, calls: list[GenerateCall], kind: str, body: Body) -> Response:
        name = body.request_id or new_request_id(kind.startswith("chat"))
        if is_request_id(name):
            http.state.request_id = name  # also for errors: `explain` knows the request by it
        caller = caller_of(http)
        if caller.timeout_s is not None:
            calls = [replace(call, timeout_s=caller.timeout_s) for call in calls]
        started = await until_disconnect(http, self._front.start_list(name, calls, caller.arrived_s))
        self.note_ignored(http, started.request.ignored_fields)
        head = {"id": name, "object": kind, "created": int(time.time()), "model": started.request.model}
        try:
            if isinstance(body, CompletionBody) and body.echo:  # slow for long prompts: computes token offsets
                sizes = sum(len(request.prompt_ids) for request in started.requests)
                work = partial(_answer_to, body, head, started)
                answer = await self._front.texts.run(work, sizes, started.request.timeout_s)
            else:
                answer = _answer_to(body, head, started)
            if not body.stream:
                return JsonAnswer(await until_disconnect(http, _whole(started, answer, self._scores)))
        except BaseException:
            await started.rest.aclose()
            raise
        events = _events(started, answer, self._scores, with_usage=_with_usage(body))
        return EventStream(events, {}, self._config.slow_client_s, source=started.rest)

    async def models(self, http: HttpRequest) -> Response:
        allowed = caller_of(http).grant.models
        names = [name for name in self._front.models.names() if not allowed or name in allowed]
        return JsonAnswer({"object": "list", "data": [await self._card(name) for name in names]})

    async def model(self, http: HttpRequest) -> Response:
        caller_of(http).grant.check_model(http.path_params["name"])
        return JsonAnswer(await self._card(http.path_params["name"]))

    async def _card(self, name: str) -> dict[str, Any]:
        facts, served = self._front.models.facts(name), await self._front.models.get(name)
        return {
            "id": facts.name,
            "object": "model",
            "created": self._started_s,  # checkpoints have no date
            "owned_by": "twostroke",
            "max_model_len": facts.max_model_len,
            "default_sampling_params": served.defaults.told,
        }

    async def explain(self, http: HttpRequest) -> Response:
        request_id = http.path_params["request_id"]
        explained = self._front.explain(request_id, caller_of(http).grant.tenant)
        if explained is None:
            raise RequestNotFound(f"no request {request_id[:128]!r} is known here (any more)", param="request_id")
        return JsonAnswer(explained)

    async def cluster(self, http: HttpRequest) -> Response:
        caller_of(http).grant.check_monitor()
        return JsonAnswer(self._front.flow.cluster())

    async def health(self, http: HttpRequest) -> Response:
        if self._front.flow.refusing:
            raise Unavailable(self._front.flow.refusing, retry_after_s=2.0)
        if not self._front.flow.is_ready:
            raise Unavailable("no worker is ready", retry_after_s=2.0)
        return JsonAnswer({"status": "ok"})

    async def metrics(self, http: HttpRequest) -> Response:
        caller_of(http).grant.check_monitor()
        body, content_type = self._front.flow.metrics.render(http.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    async def version(self, http: HttpRequest) -> Response:
        return JsonAnswer({"version": __version__})


async def _in_steps(steps: Generator[None, None, T]) -> T:
    """Run a generator to its result; between its steps other tasks of the loop run."""
    while True:
        await asyncio.sleep(0)
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


def _with_usage(body: Body) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)


def _answer_to(body: Body, head: dict[str, Any], started: Started) -> Answer:
    if body.stream:
        head["object"] = "chat.completion.chunk" if started.request.is_chat else head["object"]
        head |= {"usage": None} if _with_usage(body) else {}
    return Answer(head, started.requests, started.model, _wants(body, started))


def _wants(body: Body, started: Started) -> Wants:
    echo: tuple[Echo, ...] | None = None
    options = body.stream_options
    if isinstance(body, CompletionBody) and body.echo:
        prompts, tokenizer = openai.prompts_of(body, len(started.requests)), started.model.tokenizer
        pairs = zip(prompts, started.requests, strict=True)
        echo = tuple(echo_of(prompt, request, tokenizer) for prompt, request in pairs)
    return Wants(
        logprobs=started.request.sampling.logprobs,
        prompt_logprobs=body.sampling_options().get("prompt_logprobs"),
        echo=echo,
        token_ids=bool(body.return_token_ids),
        tokens_as_ids=bool(body.return_tokens_as_token_ids),
        usage_so_far=bool(options and options.include_usage and options.continuous_usage_stats),
        prompt_only=openai.is_scored_only(body),
        reasoning=not isinstance(body, ChatBody) or body.include_reasoning is not False,
    )


async def _whole(started: Started, answer: Answer, scores: Executor) -> dict[str, Any] | bytes:
    """Collect all pieces in one response object; with prompt scores, which may be many, its JSON bytes."""
    pieces = started.pieces()
    try:
        async for piece in pieces:
            answer.add(piece)
    finally:
        await pieces.aclose()
    if not answer.has_scores:
        return answer.whole()
    return await asyncio.get_running_loop().run_in_executor(scores, lambda: to_json_in_parts(answer.whole()))


async def _events(
    started: Started, answer: Answer, scores: Executor, *, with_usage: bool
) -> AsyncGenerator[bytes, None]:
    """Yield the server-sent events of a stream; an error in it becomes its last event."""
    pieces: AsyncGenerator[OutputDelta, None] = started.pieces()
    try:
        async for piece in pieces:
            if piece.prompt_scores:
                chunks = asyncio.get_running_loop().run_in_executor(scores, _scored_chunks, answer, piece)
                yield await chunks
            else:
                for chunk in answer.chunks(piece):
                    yield event(chunk)
        last = answer.last_chunk()
        if with_usage and last is not None:
            yield event(last)
        yield b"data: [DONE]\n\n"
    except TwostrokeError as error:
        yield event(error_body(error))
    except Exception:
        log.exception("request %s failed within its stream", answer.head["id"])
        yield event(error_body(InternalError("the request failed; the router's log has more")))
    finally:
        await pieces.aclose()


def _scored_chunks(answer: Answer, piece: OutputDelta) -> bytes:
    return b"".join(b"data: %s\n\n" % to_json_in_parts(chunk) for chunk in answer.chunks(piece))


class _TidyPaths:
    """Middleware that removes superfluous slashes from paths, because base URLs often end with one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = re.sub("/{2,}", "/", scope["path"])
            scope = {**scope, "path": path.rstrip("/") or "/"}
        await self._app(scope, receive, send)


def _typed(handler: Handler) -> Handler:
    """Wrap a handler: failures become `{"error": {...}}` with their status and, if they have one, Retry-After.

    Every answer has an x-request-id; unexpected failures are logged with it.
    """

    async def wrapped(http: HttpRequest) -> Response:
        http.state.request_id, http.state.ignored = _new_id(), []
        try:
            response = await handler(http)
        except TwostrokeError as error:
            response = _error(error, http.url.path)
        except Exception:
            log.exception("%s %s failed (%s)", http.method, http.url.path, http.state.request_id)
            response = _error(InternalError("the request failed; the router's log has more"), http.url.path)
        response.headers[REQUEST_ID] = http.state.request_id
        if http.state.ignored:
            response.headers[IGNORED] = openai.names_of_ignored(http.state.ignored)
        return response

    return wrapped


def _error(error: TwostrokeError, path: str) -> Response:
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))  # earlier would be in vain
    if error.http_status == 401:
        headers["www-authenticate"] = "Bearer"
    return JsonAnswer(error_form(path)(error), status_code=error.http_status, headers=headers)


def _refusal(error: TwostrokeError) -> ASGIApp:
    """Error response of a request that reaches no handler."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        response = _error(error, scope["path"])
        response.headers[REQUEST_ID] = _new_id()
        await response(scope, receive, send)

    return answer


def _new_id() -> str:
    return f"req-{secrets.token_hex(12)}"


async def _no_such_route(http: HttpRequest, error: Exception) -> Response:
    path = http.url.path[:200]
    is_below = any(isinstance(route, Route) and route.path == f"/v1{path}" for route in http.app.routes)
    hint = f"; it is /v1{path}: base URLs end in /v1" if is_below else ""
    return _no_route(404, f"no route {http.method} {path}{hint}", "not_found", {})


async def _wrong_method(http: HttpRequest, error: Exception) -> Response:
    allowed = error.headers if isinstance(error, HTTPException) else None
    return _no_route(405, f"{http.url.path[:200]} does not take {http.method}", "method_not_allowed", allowed)


def _no_route(status: int, message: str, code: str, headers: Mapping[str, str] | None) -> Response:
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JsonAnswer({"error": body}, status, {REQUEST_ID: _new_id(), **(headers or {})})
