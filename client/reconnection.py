"""When a resumable stream of the SDK is opened again after a lost connection, and with which call. Pure.

Before the first piece the same request is sent again: its Idempotency-Key makes it the same stream. After it the stream
is resumed behind the last piece that arrived.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..core.errors import TwostrokeError, Unavailable
from ..protos import inference_pb2
from .calls import Call, Rpc
from .status import RpcFailure, is_typed
from .values import Chunk

MAX_TRIES = 6  # without a new piece between them
FIRST_WAIT_S = 0.1  # doubled after each try, up to the longest
LONGEST_WAIT_S = 2.0
SHORTEST_S = 0.001  # timeout of a call whose time is over: it fails as such


class Reopening(NamedTuple):
    """What to call after a wait."""

    wait_s: float
    rpc: Rpc
    request: Any


class Reconnection:
    """The tries of one stream; without effect for one that is not resumable."""

    def __init__(self, call: Call[Chunk]) -> None:
        self._call = call
        self._is_resumable = bool(getattr(call.request, "resumable", False) or call.rpc == "Resume")
        self._cursor = call.request.cursor if call.rpc == "Resume" else ""
        self._request_id = getattr(call.request, "request_id", "")
        self._tries = 0

    def heard(self, chunk: Chunk) -> None:
        """A piece arrived."""
        if self._is_resumable:
            self._tries, self._cursor, self._request_id = 0, chunk.cursor, chunk.request_id

    def after(self, failure: RpcFailure, error: TwostrokeError) -> Reopening | None:
        """The next try after a failure; None: it is final.

        A refusal of the server is final before the first piece. After it a router that stops may leave the stream to
        another one.
        """
        is_lost = isinstance(error, Unavailable) and (bool(self._cursor) or not is_typed(failure))
        if not self._is_resumable or not is_lost or self._tries >= MAX_TRIES:
            return None
        self._tries += 1
        wait_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (self._tries - 1))
        if not self._cursor:
            return Reopening(wait_s, self._call.rpc, self._call.request)
        request = inference_pb2.ResumeRequest(request_id=self._request_id, cursor=self._cursor)
        return Reopening(wait_s, "Resume", request)
