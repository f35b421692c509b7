"""Resumable requests and what came of them, bounded in number, bytes and time. Pure: knows no task and no network.

    add ──▶ running ── end ──▶ kept for `keep_s`, then forgotten
               │ no reader for `grace_s`
               └──▶ `tick` returns it: its owner cancels it

A request belongs to its tenant: another one finds neither its id nor its key. Over a bound the oldest request that is
over is forgotten, of the tenant that keeps most; then the oldest running one, which goes on for its readers and can no
longer be resumed.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ...core.errors import IdempotencyKeyReused, InvalidRequest, TwostrokeError
from ...core.request import Request
from ..requests.pieces import OutputDelta

_ENTRY_BYTES = 2048  # of an entry without prompt and pieces
_PIECE_BYTES = 400  # of a piece without logprobs, measured
_LOGPROBS_BYTES = 200  # of the logprobs of one token, and of each alternative

RESPONSE = "response"  # face of the Responses API


@dataclass(frozen=True, slots=True)
class JournalLimits:
    """Bounds on resumable requests."""

    max_requests: int = 1000
    max_bytes: int = 64 << 20
    keep_s: float = 300.0  # after the end
    keep_responses_s: float = 3600.0  # the same of responses, which their clients ask for again
    grace_s: float = 30.0  # without a reader


@dataclass(frozen=True, slots=True)
class Asked:
    """A resumable request, with all that its answers are made of."""

    request: Request
    face: str  # object of its answers: "chat.completion", "text_completion", "response"; "grpc"
    body: dict[str, Any]  # fields of the HTTP body that shape the answer
    created_s: int  # as its answers say
    key: str = ""  # Idempotency-Key; empty: none
    fingerprint: bytes = b""  # of what the client sent

    @property
    def name(self) -> tuple[str, str]:
        """Tenant and client's id."""
        return self.request.owner, self.request.request_id

    @property
    def is_response(self) -> bool:
        """Whether it is kept for clients who ask for it by its id, and its events have numbers."""
        return self.face == RESPONSE

    @property
    def runs_alone(self) -> bool:
        """Whether it runs to its end without a reader, and its failure is kept, too."""
        return self.is_response and self.body.get("background") is True


@dataclass(eq=False, slots=True)
class Entry:
    """One resumable request and its pieces so far."""

    asked: Asked
    left_s: float | None  # since when nobody reads it; None: somebody does
    num_had: int | None = None  # pieces of another router that it was adopted with; None: it began here
    num_read: int = 0  # most pieces that a reader was given
    pieces: list[OutputDelta] = field(default_factory=list)
    error: TwostrokeError | None = None
    ended_s: float | None = None
    size_bytes: int = _ENTRY_BYTES
    num_readers: int = 0
    listeners: set[Callable[[], None]] = field(default_factory=set)  # called after every change

    @property
    def is_over(self) -> bool:
        """True if no piece will be added."""
        return self.ended_s is not None

    @property
    def num_proven(self) -> int | None:
        """Pieces that a client may know of by their number. None: all, because it began here.

        Of an adopted request: those that came with it, and those that were read here.
        """
        return None if self.num_had is None else max(self.num_had, self.num_read)

    def changed(self) -> None:
        """Tell all readers."""
        for listener in tuple(self.listeners):
            listener()


class Journal:
    """The resumable requests of one router."""

    def __init__(self, limits: JournalLimits | None = None) -> None:
        self.limits = limits or JournalLimits()
        self._entries: OrderedDict[tuple[str, str], Entry] = OrderedDict()  # in the order they came
        self._by_key: dict[tuple[str, str], Entry] = {}  # by tenant and Idempotency-Key
        self.num_bytes = 0
        self._bytes: Counter[str] = Counter()  # of each tenant
        self.num_evicted = 0  # forgotten for a bound, before their time

    def __len__(self) -> int:
        return len(self._entries)

    def entries(self) -> tuple[Entry, ...]:
        """All requests, in the order they came."""
        return tuple(self._entries.values())

    def keep_s(self, asked: Asked) -> float:
        """How long a request is kept after its end."""
        return self.limits.keep_responses_s if asked.is_response else self.limits.keep_s

    def add(self, asked: Asked, now_s: float) -> Entry:
        """Add a request that begins now; `attach` its first reader next.

        Raises:
            InvalidRequest: its tenant has a resumable request of that id that still runs.
        """
        tenant, request_id = asked.name
        known = self._entries.get(asked.name)
        if known is not None and not known.is_over:
            raise InvalidRequest(f"request_id {request_id!r} is in use; choose another", param="request_id")
        if known is not None:
            self.forget(known)
        entry = Entry(asked, now_s)
        entry.size_bytes += _asked_bytes(asked)
        self._entries[asked.name] = entry
        if asked.key:
            self._by_key[tenant, asked.key] = entry
        self._count(entry, entry.size_bytes)
        self._keep_bounds(entry)
        return entry

    def find(self, tenant: str, request_id: str) -> Entry | None:
        """A tenant's request, or None."""
        return self._entries.get((tenant, request_id))

    def find_key(self, tenant: str, key: str) -> Entry | None:
        """A tenant's request by its Idempotency-Key, or None."""
        return self._by_key.get((tenant, key))

    def put(self, entry: Entry, piece: OutputDelta) -> None:
        """Add a piece."""
        assert not entry.is_over
        entry.pieces.append(piece)
        self._grow(entry, piece_bytes(piece))
        entry.changed()

    def end(self, entry: Entry, error: TwostrokeError | None, now_s: float) -> None:
        """The request is over. One that failed before its first piece is forgotten: its key may be used again.

        One that runs alone is kept: its client learns of the failure later.
        """
        if entry.is_over:
            return
        entry.error, entry.ended_s = error, now_s
        if error is not None and not entry.pieces and not entry.asked.runs_alone:
            self.forget(entry)
        entry.changed()

    def attach(self, entry: Entry) -> None:
        """A reader follows the request; `detach` must follow."""
        entry.num_readers += 1
        entry.left_s = None

    def detach(self, entry: Entry, now_s: float) -> None:
        """A reader left."""
        entry.num_readers -= 1
        if entry.num_readers == 0:
            entry.left_s = now_s

    def tick(self, now_s: float) -> list[Entry]:
        """Forget what was kept long enough; returns running requests that nobody came back for."""
        for entry in self.entries():
            if entry.ended_s is not None and now_s - entry.ended_s > self.keep_s(entry.asked):
                self.forget(entry)
        return [entry for entry in self._entries.values() if self._is_left(entry, now_s)]

    def _is_left(self, entry: Entry, now_s: float) -> bool:
        if entry.is_over or entry.left_s is None or entry.asked.runs_alone:
            return False
        return now_s - entry.left_s > self.limits.grace_s

    def is_kept(self, entry: Entry) -> bool:
        """True while the request can be found."""
        return self._entries.get(entry.asked.name) is entry

    def forget(self, entry: Entry) -> None:
        """Remove a request; its readers may go on."""
        if not self.is_kept(entry):
            return
        del self._entries[entry.asked.name]
        self._count(entry, -entry.size_bytes)
        name = (entry.asked.request.owner, entry.asked.key)
        if self._by_key.get(name) is entry:
            del self._by_key[name]

    def _grow(self, entry: Entry, num_bytes: int) -> None:
        entry.size_bytes += num_bytes
        if self.is_kept(entry):
            self._count(entry, num_bytes)
            self._keep_bounds(entry)

    def _count(self, entry: Entry, num_bytes: int) -> None:
        tenant = entry.asked.request.owner
        self.num_bytes += num_bytes
        self._bytes[tenant] += num_bytes
        if not self._bytes[tenant]:
            del self._bytes[tenant]

    def _keep_bounds(self, newest: Entry) -> None:
        limits = self.limits
        while len(self._entries) > limits.max_requests or self.num_bytes > limits.max_bytes:
            self.forget(self._victim(newest))
            self.num_evicted += 1

    def _victim(self, newest: Entry) -> Entry:
        """The oldest request that is over, of the tenant that keeps most; then the same of all that run."""
        tenants = [tenant for tenant, _ in self._bytes.most_common()]
        for takes_running in (False, True):
            for tenant in tenants:
                for entry in self._entries.values():  # found near its beginning, as a rule
                    is_one = entry.is_over or takes_running
                    if is_one and entry is not newest and entry.asked.request.owner == tenant:
                        return entry
        return newest


def _asked_bytes(asked: Asked) -> int:
    """Approximate size of what a client asked: its prompt, body, tools, stop strings and grammar."""
    request = asked.request
    said = sum(len(part if isinstance(part, str) else repr(part)) for part in asked.body.values())
    return 4 * len(request.prompt_ids) + said + len(repr(request.answer)) + len(repr(request.sampling))


def check_same(fingerprint: bytes, asked: bytes) -> None:
    """Check that a request is the one that its Idempotency-Key was first sent with.

    Raises:
        IdempotencyKeyReused: it is another one.
    """
    if fingerprint != asked:
        raise IdempotencyKeyReused(
            "the Idempotency-Key was sent before with another request; use a new key for a new request",
            param="Idempotency-Key",
        )


def piece_bytes(piece: OutputDelta) -> int:
    """Estimated memory of a piece."""
    num_scores = sum(1 + len(one.top) for one in piece.logprobs)
    return _PIECE_BYTES + 4 * len(piece.token_ids) + 4 * len(piece.text) + _LOGPROBS_BYTES * num_scores
