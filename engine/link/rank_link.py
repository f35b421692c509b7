"""Link from a worker's first rank to its other ranks: every step plan and store operation, in order, over sockets.

    rank 0: RankSender ─┬─ messages ──▶ RankReceiver: rank 1       a socket pair per rank; nothing travels back:
                        └─ messages ──▶ RankReceiver: rank 2       ranks answer through their group's shared memory

    message   length, CRC-32 and number of the body | body: its kind, then a plan as differences, or an encoded value

Messages are numbered; one that is damaged, old, repeated or not the next one ends the receiver. Every wait has a
deadline, except that of an idle receiver, which looks at regular intervals whether its group still lives.
"""

from __future__ import annotations

import socket
import struct
import zlib
from collections.abc import Callable, Sequence

from ...core.errors import RankLost
from ..plan import StepPlan
from ..store_ops import StoreOp
from .plan_stream import PlanReceiver, PlanSender
from .wire import WireError, decode, encode

SEND_TIMEOUT_S = 30.0  # longest time in which a rank may read nothing of a message
LOOK_S = 0.5  # between an idle receiver's looks at its group
MAX_BODY_BYTES = 1 << 31

_HEAD = struct.Struct("<IIQ")
_PLAN, _VALUE = b"p", b"v"
_CHUNK_BYTES = 1 << 16
_WARM_UP = "warm up"

RankMessage = StepPlan | StoreOp | None
"""A plan to run, an operation on the rank's own slices, or None: warm up."""


class RankSender:
    """Rank 0's end. For one thread."""

    def __init__(self, sockets: Sequence[socket.socket]) -> None:
        """`sockets`: one per other rank, from rank 1 on. They belong to the sender."""
        self._sockets = list(sockets)
        self._plans = PlanSender()
        self._number = 0
        for each in self._sockets:
            each.settimeout(SEND_TIMEOUT_S)

    def send_plan(self, plan: StepPlan) -> None:
        """Send all ranks a plan. Tokens of earlier steps must be filled in: no `from_place`.

        Raises:
            RankLost: a rank's process has ended, or it reads nothing.
        """
        self._send([_PLAN + self._plans.encode(plan)] * len(self._sockets))

    def send_operations(self, operations: Sequence[StoreOp]) -> None:
        """Send each rank its own operation, from rank 1 on.

        Raises:
            RankLost: as for `send_plan`.
        """
        self._send([_VALUE + encode(operation) for operation in operations])

    def send_warm_up(self) -> None:
        """Tell all ranks to warm up.

        Raises:
            RankLost: as for `send_plan`.
        """
        self._send([_VALUE + encode(_WARM_UP)] * len(self._sockets))

    def close(self) -> None:
        """End the link: every receiver returns from its last wait."""
        for each in self._sockets:
            each.close()

    def _send(self, bodies: Sequence[bytes]) -> None:
        self._number += 1
        for rank, (sock, body) in enumerate(zip(self._sockets, bodies, strict=True), 1):
            try:
                sock.sendall(_HEAD.pack(len(body), zlib.crc32(body), self._number) + body)
            except OSError as error:
                raise RankLost(f"rank {rank} takes no step: {error or type(error).__name__}") from None


class LinkEnded(Exception):
    """The first rank has closed the link, or its process has ended."""


class RankReceiver:
    """Another rank's end. For one thread."""

    def __init__(self, sock: socket.socket) -> None:
        """`sock`: this rank's end of its socket pair. It belongs to the receiver."""
        self._socket = sock
        self._plans = PlanReceiver()
        self._number = 0
        self._unread = b""
        sock.settimeout(LOOK_S)

    def receive(self, look: Callable[[], None]) -> RankMessage:
        """Wait for the next message. `look` is called while there is none; what it raises ends the wait.

        Raises:
            LinkEnded: no message follows.
            WireError: the message is damaged, or not the next one.
        """
        while len(self._unread) < _HEAD.size:
            self._unread += self._read(look)
        size, checksum, number = _HEAD.unpack_from(self._unread)
        if size > MAX_BODY_BYTES:
            raise WireError(f"a message of {size} bytes")
        parts, missing = [self._unread[_HEAD.size :]], _HEAD.size + size - len(self._unread)
        while missing > 0:
            parts.append(self._read(look))
            missing -= len(parts[-1])
        whole = parts[0] if len(parts) == 1 else b"".join(parts)
        body, self._unread = whole[:size], whole[size:]
        if zlib.crc32(body) != checksum:
            raise WireError(f"message {number} is damaged")
        if number != self._number + 1:
            raise WireError(f"message {number} follows message {self._number}")
        self._number = number
        return self._decoded(body)

    def close(self) -> None:
        """End the link; the sender gets `RankLost`."""
        self._socket.close()

    def _decoded(self, body: bytes) -> RankMessage:
        kind, data = body[:1], body[1:]
        if kind == _PLAN:
            return self._plans.decode(data)
        value = decode(data) if kind == _VALUE else None
        if value == _WARM_UP:
            return None
        if not isinstance(value, StoreOp):
            raise WireError(f"a message of kind {kind!r} with {type(value).__name__}")
        return value

    def _read(self, look: Callable[[], None]) -> bytes:
        while True:
            try:
                data = self._socket.recv(_CHUNK_BYTES)
            except TimeoutError:
                look()
                continue
            except OSError as error:
                raise LinkEnded(str(error)) from None
            if not data:
                raise LinkEnded("the first rank has ended")
            return data
