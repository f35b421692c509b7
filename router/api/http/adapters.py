"""Routes that load and unload adapters while the cluster serves, with vLLM's bodies and answers.

They are off unless `router.runtime_lora` is true. With keys, only those that may manage the cluster can use them,
because they make workers read directories of their machines.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from ....core.errors import NoSuchRoute
from ...config import RouterConfig
from ..fields import Known
from ..frontend import Frontend
from ..openai_requests import checked
from .callers import caller_of

LOAD_PATH, UNLOAD_PATH = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
MAX_PATH_CHARS = 4096
_OF_VLLM = frozenset({"lora_int_id"})  # its engine's own number; accepted, without effect

T = TypeVar("T")
Values = dict[str, Any]


class LoadBody(Known):
    """Body of POST /v1/load_lora_adapter."""

    lora_name: str = Field(min_length=1, max_length=256)
    lora_path: str = Field(min_length=1, max_length=MAX_PATH_CHARS)
    load_inplace: bool = False  # the name may be another adapter's, which it replaces


class UnloadBody(Known):
    """Body of POST /v1/unload_lora_adapter."""

    lora_name: str = Field(min_length=1, max_length=256)


class ReadsBody(Protocol):
    """Reads and checks a body within the limits of the server."""

    async def read_plain(self, http: HttpRequest, parse: Callable[[Values], tuple[T, list[str]]]) -> T:
        """The checked body."""
        ...


def adapter_routes(
    config: RouterConfig,
    front: Frontend,
    reads: ReadsBody,
    typed: Callable[[Callable[[HttpRequest], Awaitable[Response]]], Any],
) -> Sequence[Route]:
    """Both routes; `typed` wraps their handlers."""
    face = _Adapters(config, front, reads)
    return [
        Route(LOAD_PATH, typed(face.load), methods=["POST"]),
        Route(UNLOAD_PATH, typed(face.unload), methods=["POST"]),
    ]


class _Adapters:
    def __init__(self, config: RouterConfig, front: Frontend, reads: ReadsBody) -> None:
        self._config = config
        self._front = front
        self._reads = reads

    async def load(self, http: HttpRequest) -> Response:
        self._check(http)
        body = await self._reads.read_plain(http, partial(_parsed, kind=LoadBody, strict=self._config.strict))
        await self._front.flow.adapters.load(body.lora_name, body.lora_path, replace=body.load_inplace)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload(self, http: HttpRequest) -> Response:
        self._check(http)
        body = await self._reads.read_plain(http, partial(_parsed, kind=UnloadBody, strict=self._config.strict))
        await self._front.flow.adapters.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    def _check(self, http: HttpRequest) -> None:
        if not self._config.runtime_lora:
            raise NoSuchRoute(f"POST {http.url.path} is off; start with --enable-runtime-lora (router.runtime_lora)")
        caller_of(http).grant.check_manage()


K = TypeVar("K", bound=Known)


def _parsed(values: Values, kind: type[K], *, strict: bool) -> tuple[K, list[str]]:
    return checked(values, kind, _OF_VLLM, {}, strict=strict)
