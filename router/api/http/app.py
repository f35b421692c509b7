"""The HTTP APIs, OpenAI's and those of dialects/: routes, status codes, event streams. Holds no logic of its own."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from .... import __version__
from ....core.errors import CursorLost, InvalidRequest, RequestNotFound, Unavailable
from ...api import openai_requests as openai
from ...config import RouterConfig
from ..call import GenerateCall
from ..dialects.routes import dialect_routes
from ..fields import Body, ChatBody, CompletionBody
from ..frontend import Frontend
from ..running.resumable import CURSOR_HEADER, HEADER, KEY_HEADER, Terms, fingerprint_of
from ..running.started import Started
from ..validate import is_request_id, new_request_id
from .adapters import adapter_routes
from .bodies import read_body
from .browser import middleware_for_pages
from .callers import Caller, KeyDoor, caller_of
from .chunks import EVENT_ID_PARTS, USAGE_MARK, answer_to, chunks_of, events_of, first_of, wants_usage, whole
from .failures import TidyPaths, no_such_route, refusal, typed_handler, wrong_method
from .page import page
from .sse import EventStream, JsonAnswer, until_disconnect
from .structure import SLICE_BYTES, finished

log = logging.getLogger(__name__)

_NO_MESSAGES = [{"role": "user", "content": ""}]  # in a journaled body, whose prompt is elsewhere as token ids
# Fields that act through the journaled request alone. The others may shape the answer and are journaled with the body.
_OF_THE_REQUEST = frozenset(
    {
        *("messages", "prompt", "suffix", "request_id", "tools", "tool_choice", "documents", "chat_template_kwargs"),
        *("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
        "structural_tag",
    }
)

T = TypeVar("T")


def make_app(config: RouterConfig, front: Frontend) -> Starlette:
    """The ASGI application of one router."""
    face = _Face(config, front)
    typed = partial(typed_handler, front)
    routes = [
        Route("/v1/chat/completions", typed(face.chat), methods=["POST"]),
        Route("/v1/completions", typed(face.completions), methods=["POST"]),
        Route("/v1/models", typed(face.models), methods=["GET"]),
        Route("/v1/models/{name:path}", typed(face.model), methods=["GET"]),
        Route("/v1/requests/{request_id}/explain", typed(face.explain), methods=["GET"]),
        Route("/v1/cluster", typed(face.cluster), methods=["GET"]),
        Route("/health", typed(face.health), methods=["GET"]),
        Route("/ping", typed(face.health), methods=["GET", "POST"]),  # SageMaker's health check, as in vLLM
        Route("/", typed(face.root), methods=["GET"]),  # HEAD: how Ollama's client looks for a server
        Route("/version", typed(face.version), methods=["GET"]),
        Route("/metrics", typed(face.metrics), methods=["GET"]),
    ]
    routes += adapter_routes(config, front, face, typed)
    dialects = dialect_routes(config, front, face)
    routes += [Route(one.path, typed(one.handler), methods=[one.method]) for one in dialects]
    door = Middleware(KeyDoor, front=front, answer=refusal)
    return Starlette(
        routes=routes,
        middleware=[*middleware_for_pages(config, refusal), Middleware(TidyPaths), door],
        exception_handlers={404: no_such_route, 405: wrong_method},
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

    async def read_plain(self, http: HttpRequest, parse: Callable[[dict[str, Any]], tuple[T, list[str]]]) -> T:
        """Read and check the body of a call that is no request to a model (adapters.py)."""
        return await self._read(http, parse, caller_of(http).grant.tenant)

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
                work = partial(answer_to, body, head, started)
                answer = await self._front.texts.run(work, sizes, started.request.timeout_s)
            else:
                answer = answer_to(body, head, started)
            if not body.stream:
                return JsonAnswer(await until_disconnect(http, whole(started, answer, self._scores)))
            chunks = chunks_of(started, answer, self._scores, with_usage=wants_usage(body) and not has_usage)
            first: bytes | None = None
            if started.track is not None:
                first = await until_disconnect(http, first_of(chunks))  # a wrong cursor is an error before the stream
        except BaseException:
            await started.rest.aclose()
            raise
        events = events_of(chunks, first, answer)
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
            "parent": facts.base or None,  # as in vLLM: the model that an adapter changes
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

    async def root(self, http: HttpRequest) -> Response:
        if "text/html" in http.headers.get("accept", ""):  # a browser; Ollama's clients want the plain words
            return page(f"{http.url.scheme}://{http.url.netloc}")
        return PlainTextResponse("Twostroke is running")

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
