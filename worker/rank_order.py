"""Orders of a worker's process to its other ranks at the start, and their answers. Plain data, as JSON."""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

from pydantic import Field

from ..core import errors
from ..core.config import Section
from ..core.errors import InternalError, TwostrokeError
from .settings import WorkerSettings

_LENGTH = struct.Struct("<I")
_MAX_ANSWER_BYTES = 1 << 20


class RankOrder(Section):
    """Everything that a rank needs to load its part of the model. It holds the cluster's key: never an argument."""

    settings: WorkerSettings  # with every value decided, as rank 0 uses them
    rank: int
    size: int
    num_blocks: int
    num_swap_blocks: int
    slot_bytes: int  # of the group
    cores: tuple[int, ...] = Field((), description="processors that its threads may use; empty: any")


def send_answer(sock: socket.socket, error: BaseException | None) -> None:
    """Tell the worker's process that this rank is loaded, or why not."""
    answer = {} if error is None else {"kind": type(error).__name__, "message": str(error)}
    data = json.dumps(answer).encode()
    sock.sendall(_LENGTH.pack(len(data)) + data)


def read_answer(sock: socket.socket) -> None:
    """Read a rank's answer, within the socket's timeout.

    Raises:
        TwostrokeError: the rank could not load; of the type that it had there.
        EOFError: the rank's process ended without an answer.
    """
    (size,) = _LENGTH.unpack(_exactly(sock, _LENGTH.size))
    if size > _MAX_ANSWER_BYTES:
        raise InternalError(f"a rank answered with {size} bytes")
    answer: dict[str, Any] = json.loads(_exactly(sock, size))
    if answer:
        raise _error(answer["kind"], answer["message"])


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def _error(kind: str, message: str) -> TwostrokeError:
    found = getattr(errors, kind, None)
    if isinstance(found, type) and issubclass(found, TwostrokeError):
        return found(message)
    return InternalError(f"{kind}: {message}")
