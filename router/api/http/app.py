"""The HTTP APIs, OpenAI's and those of dialects/: routes, status codes, event streams. Holds no logic of its own."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import secrets
import time
from collections import deque
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
from ....core.errors import CursorLost, InternalError, InvalidRequest, RequestNotFound, TwostrokeError, Unavailable
from ...api import openai_requests as openai
from ...config import RouterConfig
from ...requests.pieces import OutputDelta
from ..call import GenerateCall
from ..dialects.errors import error_form
from ..dialects.routes import dialect_routes
from ..echo import Echo, echo_of
from ..fields import Body, ChatBody, CompletionBody
from ..frontend import Frontend
from ..openai_responses import Answer, Wants, error_body
from ..running.resumable import CURSOR_HEADER, HEADER, KEY_HEADER, Terms, fingerprint_of
from ..running.started import Started
from ..validate import is_request_id, new_request_id
from .bodies import read_body
from .browser import middleware_for_pages
from .callers import Caller, KeyDoor, caller_of
from .sse import EventStream, JsonAnswer, event, to_json_in_parts, until_disconnect
from .structure import SLICE_BYTES, finished

log = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
IGNORED = "x-twostroke-ignored"
EVENT_ID_PARTS = ":"  # between request id and cursor, which has none
_NO_MESSAGES = [{"role": "user", "content": ""}]  # in a journaled body, whose prompt is elsewhere as token ids
# Fields that act through the journaled request alone. The others may shape the answer and are journaled with the body.
_OF_THE_REQUEST = frozenset(
    {
        *("messages", "prompt", "suffix", "request_id", "tools", "tool_choice", "documents", "chat_template_kwargs"),
        *("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
        "structural_tag",
    }
)
USAGE_MARK = ".u"  # behind the cursor of the event with the usage

T = TypeVar("T")
Handler = Callable[[HttpRequest], Awaitable[Response]]


def make_app(config: RouterConfig, front: Frontend) -> Starlette:
    """The ASGI application of one router."""
    face = _Face(config, front)
    typed = partial(_typed, front)
    routes = [
        Route("/v1/chat/completions", typed(face.chat), methods=["POST"]),
        Route("/v1/completions", typed(face.completions), methods=["POST"]),
        Route("/v1/models", typed(face.models), methods=["GET"]),
        Route("/v1/models/{name:path}", typed(face.model), methods=["GET"]),
        Route("/v1/requests/{request_id}/explain", typed(face.explain), methods=["GET"]),
        Route("/v1/cluster", typed(face.cluster), methods=["GET"]),
        Route("/health", typed(face.health), methods=["GET"]),
        Route("/ping", typed(face.health), methods=["GET", "POST"]),  # SageMaker's health check, as in vLLM
        Route("/version", typed(face.version), methods=["GET"]),
        Route("/metrics", typed(face.metrics), methods=["GET"]),
    ]
    dialects = dialect_routes(config, front, face)
    routes += [Route(one.path, typed(one.handler), methods=[one.method]) for one in dialects]
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
        caller = caller_of(http)
        if CURSOR_HEADER in http.headers:
            return await self._resume(http, caller.grant.tenant)
        self._foresee(caller)
        body = await self._parse(http, ChatBody, caller.grant.tenant)
        return await self._run(http, [openai.chat_call(body, caller.api_key)], "chat.completion", body)

    async def completions(self, http: HttpRequest) -> Response:
        caller = caller_of(http)
        if CURSOR_HEADER in http.headers:
            return await self._resume(http, caller.grant.tenant)
        self._foresee(caller)
        body = await self._parse(http, CompletionBody, caller.grant.tenant)
        openai.refuse_endless(body, self._front.longest_context())  # before another large body is built
        most = min(self._config.max_prompts, self._config.max_running)
        calls = openai.completion_calls(body, caller.api_key, most)
        return await self._run(http, calls, "text_completion", body)

    def _foresee(self, caller: Caller) -> None:
        """Refuse a request by its headers if possible. Called before the body is read."""
        self._front.foresee(caller.grant, caller.size_bytes, caller.timeout_s)

    async def _parse(self, http: HttpRequest, kind: type[openai.B], tenant: str) -> openai.B:
        return await self._read(http, partial(openai.parse, kind=kind, strict=self._config.strict), tenant)

    async def read(self, http: HttpRequest, parse: Callable[[dict[str, Any]], tuple[T, list[str]]]) -> T:
        """Read and check a body of a dialect (dialects/door.py)."""
        caller = caller_of(http)
        self._foresee(caller)
        return await self._read(http, parse, caller.grant.tenant)

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
        terms = _terms(http, calls, kind, body)
        if terms is None:
            starting = self._front.start_list(name, calls, caller.arrived_s)
        else:
            call = replace(calls[0], request_id=name)
            starting = self._front.resumables.start(call, terms, arrived_s=caller.arrived_s)
        started = await until_disconnect(http, starting)
        self.note_ignored(http, started.request.ignored_fields)
        return await self._tell(http, started, kind, body)

    async def _resume(self, http: HttpRequest, tenant: str) -> Response:
        """Go on with a stream after the event that the Last-Event-ID names; the body, if there is one, is not read."""
        request_id, _, cursor = http.headers[CURSOR_HEADER].rpartition(EVENT_ID_PARTS)
        if is_request_id(request_id):
            http.state.request_id = request_id
        resuming = self._front.resumables.resume(tenant, request_id, cursor.removesuffix(USAGE_MARK), CURSOR_HEADER)
        started = await until_disconnect(http, resuming)
        asked = started.asked
        if asked is None or asked.face == "grpc":
            await started.rest.aclose()
            raise InvalidRequest(f"{request_id!r} was asked for over gRPC; resume it there", param=CURSOR_HEADER)
        kind: type[Body] = ChatBody if asked.face.startswith("chat") else CompletionBody
        try:
            body = kind.model_validate({**asked.body, "stream": True})
        except ValueError:  # journaled by another release
            await started.rest.aclose()
            raise CursorLost(f"{request_id!r} was asked for in a form that is unknown here; send it again") from None
        return await self._tell(http, started, asked.face, body, has_usage=cursor.endswith(USAGE_MARK))

    async def _tell(
        self, http: HttpRequest, started: Started, kind: str, body: Body, *, has_usage: bool = False
    ) -> Response:
        """Answer with a request that has begun; `has_usage`: the client of a resumed stream has that event already."""
        asked = started.asked
        name = http.state.request_id if asked is None else asked.request.request_id
        http.state.request_id = name
        created = int(time.time()) if asked is None else asked.created_s
        head = {"id": name, "object": kind, "created": created, "model": started.request.model}
        try:
            if isinstance(body, CompletionBody) and body.echo:  # slow for long prompts: computes token offsets
                sizes = sum(len(request.prompt_ids) for request in started.requests)
                work = partial(_answer_to, body, head, started)
                answer = await self._front.texts.run(work, sizes, started.request.timeout_s)
            else:
                answer = _answer_to(body, head, started)
            if not body.stream:
                return JsonAnswer(await until_disconnect(http, _whole(started, answer, self._scores)))
            chunks = _chunks(started, answer, self._scores, with_usage=_with_usage(body) and not has_usage)
            first: bytes | None = None
            if started.track is not None:
                first = await until_disconnect(http, _first(chunks))  # a wrong cursor is an error before the stream
        except BaseException:
            await started.rest.aclose()
            raise
        events = _events(chunks, first, answer)
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
        explained = await self._front.explain(request_id, caller_of(http).grant.tenant)
        if explained is None:
            raise RequestNotFound(f"no request {request_id[:128]!r} is known here (any more)", param="request_id")
        return JsonAnswer(explained)

    async def cluster(self, http: HttpRequest) -> Response:
        caller_of(http).grant.check_monitor()
        return JsonAnswer(await self._front.cluster())

    async def health(self, http: HttpRequest) -> Response:
        if self._front.flow.refusing:
            raise Unavailable(self._front.flow.refusing, retry_after_s=2.0)
        if not self._front.flow.is_ready:
            raise Unavailable("no worker is ready", retry_after_s=2.0)
        return JsonAnswer({"status": "ok"})

    async def metrics(self, http: HttpRequest) -> Response:
        caller_of(http).grant.check_monitor()
        body, content_type = await self._front.metrics(http.headers.get("accept", ""))
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


def _terms(http: HttpRequest, calls: Sequence[GenerateCall], kind: str, body: Body) -> Terms | None:
    """What the client says of a resumable call; None: it did not ask for one.

    Raises:
        InvalidRequest: the call has several prompts.
    """
    key, wish = http.headers.get(KEY_HEADER, ""), http.headers.get(HEADER, "").lower()
    if KEY_HEADER not in http.headers and wish in ("", "0", "false"):
        return None
    if len(calls) > 1:
        raise InvalidRequest(f"{len(calls)} prompts cannot be resumed; send them one by one", param="prompt")
    values = body.model_dump(mode="json", exclude_none=True)
    fingerprint = fingerprint_of(kind, values)
    kept = {name: value for name, value in values.items() if name not in _OF_THE_REQUEST}
    if isinstance(body, ChatBody):
        kept["messages"] = _NO_MESSAGES
    elif isinstance(body, CompletionBody):
        kept["prompt"] = values["prompt"] if body.echo else ""
    return Terms(kind, kept, key, fingerprint)


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


async def _chunks(
    started: Started, answer: Answer, scores: Executor, *, with_usage: bool
) -> AsyncGenerator[bytes, None]:
    """Yield the server-sent events of a stream, those that its client lacks. Of a resumable one they have ids."""
    track, name = started.track, answer.head["id"]
    held: deque[bytes] = deque()
    pieces: AsyncGenerator[OutputDelta, None] = started.pieces()
    try:
        async for piece in pieces:
            if track is not None:
                for part in track.parts(piece):
                    is_new, chunk = track.take(part), answer.chunk(part)
                    if is_new:
                        held.append(event(chunk, f"{name}{EVENT_ID_PARTS}{track.cursor}"))
                while held and track.is_confirmed:
                    yield held.popleft()
            elif piece.prompt_scores:
                chunks = asyncio.get_running_loop().run_in_executor(scores, _scored_chunks, answer, piece)
                yield await chunks
            else:
                for chunk in answer.chunks(piece):
                    yield event(chunk)
        last = answer.last_chunk()
        if with_usage and last is not None:
            yield event(last, f"{name}{EVENT_ID_PARTS}{track.cursor}{USAGE_MARK}" if track is not None else None)
        yield b"data: [DONE]\n\n"
    finally:
        await pieces.aclose()


async def _first(chunks: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(chunks)


async def _events(
    chunks: AsyncGenerator[bytes, None], first: bytes | None, answer: Answer
) -> AsyncGenerator[bytes, None]:
    """Yield the events of a stream; an error in it becomes its last event."""
    try:
        if first is not None:
            yield first
        async for chunk in chunks:
            yield chunk
    except TwostrokeError as error:
        yield event(error_body(error))
    except Exception:
        log.exception("request %s failed within its stream", answer.head["id"])
        yield event(error_body(InternalError("the request failed; the router's log has more")))
    finally:
        await chunks.aclose()


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


def _typed(front: Frontend, handler: Handler) -> Handler:
    """Wrap a handler: failures become `{"error": {...}}` with their status and, if they have one, Retry-After.

    Every answer has an x-request-id; unexpected failures are logged with it. The connections of a router that drains
    end with their next answer, because another router may be behind the next one.
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
        if front.flow.refusing:
            response.headers["connection"] = "close"
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
