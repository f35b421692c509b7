"""Who calls: key, tenant and deadline from a request's headers, before any of its body is read.

Every route and method needs a key, also those that do not exist, but for the probes of load balancers. A route is not
asked whether it wants one, so that a new one cannot forget to.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp, Receive, Scope, Send

from ....core.errors import InvalidRequest, TwostrokeError
from ...keys.grants import Grant
from ..checks import short
from ..frontend import Frontend
from .browser import PROBES

TIMEOUT = "x-request-timeout"
MAX_TIMEOUT_S = 1e6
_CALLER = "twostroke.caller"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request, and when."""

    api_key: str | None
    grant: Grant
    arrived_s: float  # on the flow's clock; the deadline counts from here
    timeout_s: float | None  # its own, from its header; None: it has none
    size_bytes: int  # of its body, as announced; 0: unknown


class KeyDoor:
    """Middleware that lets only requests with a key in."""

    def __init__(self, app: ASGIApp, front: Frontend, answer: Callable[[TwostrokeError], ASGIApp]) -> None:
        self._app, self._front, self._answer = app, front, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it here."""
        if scope["type"] == "http" and scope["path"] not in PROBES:
            try:
                scope = {**scope, _CALLER: self._caller(Headers(scope=scope))}
            except TwostrokeError as error:
                await self._answer(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _caller(self, headers: Headers) -> Caller:
        api_key = _api_key(headers)
        grant = self._front.grant_of(api_key)
        announced = headers.get("content-length", "")
        size_bytes = int(announced) if announced.isdecimal() and len(announced) <= 20 else 0
        return Caller(api_key, grant, self._front.flow.clock.now_s(), _timeout_s(headers), size_bytes)


def caller_of(http: HttpRequest) -> Caller:
    """The caller of a request that passed the door."""
    caller: Caller = http.scope[_CALLER]
    return caller


def _api_key(headers: Headers) -> str | None:
    """The key in OpenAI's header, else in Azure's or Anthropic's, which some gateways send."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return key.strip()
    return headers.get("api-key") or headers.get("x-api-key")


def _timeout_s(headers: Headers) -> float | None:
    """The client's own deadline in seconds, from now on.

    Raises:
        InvalidRequest: it is no positive number.
    """
    said = headers.get(TIMEOUT)
    if said is None:
        return None
    try:
        timeout_s = math.nan if "_" in said else float(said)  # Python's float takes 1_0
    except ValueError:
        timeout_s = math.nan
    if not 0 < timeout_s <= MAX_TIMEOUT_S:
        raise InvalidRequest(f"{TIMEOUT} is {short(said)}; must be a number of seconds above 0, e.g. 30", param=TIMEOUT)
    return timeout_s
