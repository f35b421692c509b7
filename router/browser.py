"""What web pages may do here: CORS as it was configured, and nothing for pages that nobody allowed."""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest

from ..core.errors import OriginForbidden
from .config import RouterConfig
from .words import short

EXPOSED_HEADERS = ("x-request-id", "x-twostroke-ignored", "retry-after")


def cors(config: RouterConfig) -> list[Middleware]:
    """Answers preflights, before any key is asked for, and lets allowed pages read. None: no origin is allowed."""
    if not config.allowed_origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_methods=config.allowed_methods,
            allow_headers=config.allowed_headers,
            allow_credentials=config.allow_credentials,
            expose_headers=EXPOSED_HEADERS,
        )
    ]


def refuse_foreign_page(http: HttpRequest, config: RouterConfig) -> None:
    """Where no key is asked for, any page that a user opens could spend the model: browsers send such a request first
    and keep only its answer from the page. They name the page's origin, which no script can change.

    Raises:
        OriginForbidden: a page of another origin asks, and that origin is not in `router.allowed_origins`.
    """
    origin = http.headers.get("origin")
    if origin is None or config.api_keys or {"*", origin} & set(config.allowed_origins):
        return
    is_own = http.headers.get("sec-fetch-site") == "same-origin"  # also behind a proxy that changes the host
    if not is_own and origin.partition("://")[2] != http.headers.get("host"):
        raise OriginForbidden(
            f"a page of {short(origin)} asks, which may not use this router; allow it with --allowed-origins"
        )
