"""Rules for web pages: CORS as configured; requests of pages that are not allowed are refused.

A browser sends a page's request and only hides the answer from the page. A page whose own name was made to resolve to
this machine (DNS rebinding) can even read the answer. But a page cannot change the Host and Origin headers, and its
browser sends a preflight request before content types other than the simple ones. These are checked here.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from ....core.errors import HostForbidden, InvalidRequest, OriginForbidden, TwostrokeError, UnsupportedContentType
from ....core.hosts import is_allowed_name, is_loopback_name, name_in
from ....core.ports import numeric_host
from ...config import RouterConfig
from ..checks import short

EXPOSED_HEADERS = ("x-request-id", "x-twostroke-ignored", "retry-after")
PROBES = ("/health", "/ping")  # load balancers use any host name, and the answer has no private information

Answer = Callable[[TwostrokeError], ASGIApp]


def middleware_for_pages(config: RouterConfig, answer: Answer) -> list[Middleware]:
    """Middleware for every request. `answer` converts an error to a response."""
    guard = Middleware(PageGuard, config=config, answer=answer)
    if not config.allowed_origins:
        return [guard]
    cors = Middleware(  # answers preflights before keys are checked, and lets allowed pages read answers
        CORSMiddleware,
        allow_origins=config.allowed_origins,
        allow_methods=config.allowed_methods,
        allow_headers=config.allowed_headers,
        allow_credentials=config.allow_credentials,
        expose_headers=EXPOSED_HEADERS,
    )
    return [cors, guard]


class PageGuard:
    """Refuses requests of web pages that are not allowed, before their body is read."""

    def __init__(self, app: ASGIApp, config: RouterConfig, answer: Answer) -> None:
        self._app, self._config, self._answer = app, config, answer
        is_private = is_loopback_name(numeric_host(config.host))
        # With keys, a page has none. On a public address, only the operator knows its host names.
        self._checks_host = bool(config.allowed_hosts) or (is_private and not config.has_keys)
        self._names = (*config.allowed_hosts, config.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it here."""
        if scope["type"] == "http" and scope["path"].rstrip("/") not in PROBES:
            try:
                self._check(scope)
            except TwostrokeError as error:
                await self._answer(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self._checks_host:
            _check_host(headers, self._names, is_old=scope["http_version"] == "1.0")
        if self._config.has_keys or {"*", headers.get("origin")} & set(self._config.allowed_origins):
            return
        _check_origin(headers)
        if scope["method"] == "POST":
            _check_content_type(headers)


def _check_host(headers: Headers, names: tuple[str, ...], *, is_old: bool) -> None:
    """Check the Host header. `is_old`: HTTP/1.0, which browsers do not use and which needs no Host."""
    hosts = headers.getlist("host")
    if is_old and not hosts:
        return
    if len(hosts) != 1:
        raise InvalidRequest(f"the request has {len(hosts)} Host headers; must be one")
    name = name_in(hosts[0])
    if name is None or not (is_loopback_name(name) or is_allowed_name(name, names)):
        raise HostForbidden(
            f"Host is {short(hosts[0])}, a name that this router does not know; ask for localhost, or allow the name "
            "with --allowed-hosts (router.allowed_hosts)"
        )


def _check_origin(headers: Headers) -> None:
    """Check the page's origin: without keys, any page that a user opens could use the model."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if origin is not None:
        is_own = site == "same-origin" or origin.partition("://")[2] == headers.get("host")  # also behind a proxy
    else:  # a navigation is started by the user
        is_own = site not in ("cross-site", "same-site") or headers.get("sec-fetch-mode") == "navigate"
    if not is_own:
        page = short(origin) if origin is not None else "another origin"
        raise OriginForbidden(
            f"a page of {page} asks, which may not use this router; allow it with --allowed-origins "
            "(router.allowed_origins)"
        )


def _check_content_type(headers: Headers) -> None:
    """Check the content type of browsers: old ones send no Origin, but send a preflight before JSON."""
    essence = headers.get("content-type", "").partition(";")[0].strip().lower()
    is_json = essence == "application/json" or (essence.startswith("application/") and essence.endswith("+json"))
    if not is_json and _is_of_a_browser(headers):
        raise UnsupportedContentType(
            f"content-type is {short(essence)}; a browser's request must say application/json, which pages of other "
            "origins cannot without being allowed to"
        )


def _is_of_a_browser(headers: Headers) -> bool:
    if "referer" in headers or "origin" in headers or any(name.startswith("sec-fetch-") for name in headers):
        return True
    return headers.get("user-agent", "").lower().startswith("mozilla/")
