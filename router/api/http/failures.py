"""Middle of the HTTP face: paths, request ids, and errors in the form of the API that was asked."""

from __future__ import annotations

import logging
import math
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping

from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ....core.errors import InternalError, MethodNotAllowed, NoSuchRoute, TwostrokeError
from ...api import openai_requests as openai
from ..dialects.errors import error_form
from ..frontend import Frontend
from .sse import JsonAnswer

log = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
IGNORED = "x-twostroke-ignored"

Handler = Callable[[HttpRequest], Awaitable[Response]]


class TidyPaths:
    """Middleware that removes superfluous slashes from paths, because base URLs often end with one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Implements ASGI."""
        if scope["type"] == "http":
            path = re.sub("/{2,}", "/", scope["path"])
            scope = {**scope, "path": path.rstrip("/") or "/"}
        await self._app(scope, receive, send)


def typed_handler(front: Frontend, handler: Handler) -> Handler:
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


def refusal(error: TwostrokeError) -> ASGIApp:
    """Error response of a request that reaches no handler."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        response = _error(error, scope["path"])
        response.headers[REQUEST_ID] = _new_id()
        await response(scope, receive, send)

    return answer


def _new_id() -> str:
    return f"req-{secrets.token_hex(12)}"


_TEXT_ONLY = "; this cluster serves models that write text: /v1/chat/completions, /v1/completions, /v1/responses"
# Paths of other servers that clients ask for, and what is there instead.
_ABSENT = {
    **dict.fromkeys(("/embeddings", "/api/embed", "/api/embeddings", "/rerank", "/score", "/pooling"), _TEXT_ONLY),
    **dict.fromkeys(("/moderations", "/images/generations", "/audio/speech", "/audio/transcriptions"), _TEXT_ONLY),
    **dict.fromkeys(
        ("/tokenize", "/detokenize"),
        "; /v1/responses/input_tokens and /v1/messages/count_tokens count tokens, return_token_ids shows an answer's",
    ),
    **dict.fromkeys(("/encode", "/classify"), _TEXT_ONLY),
    **dict.fromkeys(("/generate", "/completion"), "; /v1/completions takes prompts, /v1/chat/completions messages"),
    **dict.fromkeys(
        ("/api/pull", "/api/push", "/api/create", "/api/copy", "/api/delete"),
        "; a cluster serves the model that it was started with: twostroke serve MODEL",
    ),
    **dict.fromkeys(("/docs", "/redoc", "/openapi.json"), "; docs/api.md lists the routes and their fields"),
    **dict.fromkeys(("/conversations", "/assistants", "/threads"), "; /v1/responses keeps a conversation's turns"),
}


async def no_such_route(http: HttpRequest, error: Exception) -> Response:
    """Starlette's handler of 404; names the route that was meant, where a base URL lacks /v1."""
    path = http.url.path[:200]
    is_below = any(isinstance(route, Route) and route.path == f"/v1{path}" for route in http.app.routes)
    hint = f"; it is /v1{path}: base URLs end in /v1" if is_below else _ABSENT.get(path.removeprefix("/v1"), "")
    return _no_route(path, NoSuchRoute(f"no route {http.method} {path}{hint}"), {})


async def wrong_method(http: HttpRequest, error: Exception) -> Response:
    """Starlette's handler of 405."""
    allowed = error.headers if isinstance(error, HTTPException) else None
    path = http.url.path[:200]
    return _no_route(path, MethodNotAllowed(f"{path} does not take {http.method}"), allowed)


def _no_route(path: str, error: TwostrokeError, headers: Mapping[str, str] | None) -> Response:
    return JsonAnswer(error_form(path)(error), error.http_status, {REQUEST_ID: _new_id(), **(headers or {})})
