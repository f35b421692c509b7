"""What both sides of a hand-over share: timing, counters, the words towards their worker, and the order on the stream.

The machines themselves are `handover_receiver.py` (decode) and `handover_sender.py` (prefill). They are pure: a method
per event, each with the time it happened, returns actions. No clock, network, tensor or asyncio. On the wire they speak
the messages of handover.proto; towards their worker the small values below.

The caller's part of the bargain:
* Actions are carried out in the order they are returned, and messages and frames leave in that order: the two share
  one sequence per direction.
* `next_deadline_s` says when to call `tick` at the latest, even when nothing else happens.
* After `Complete`, `Lost`, `ReleaseBlocks`, `Abort` or `cancel` the machine is over: later events return no action.
* `Close` comes at most once. What is sent to a stream that broke is lost silently; `closed` reports the break.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeAlias

from ...core.request import Epoch, TokenLogprobs
from ...protos import common_pb2, worker_pb2
from ...protos import handover_pb2 as pb

MAX_REFETCHES = 1  # per damaged hash block; then the suffix is recomputed

HANDOVER = "handover.grpc.1"  # this hand-over's name among a worker's capabilities


@dataclass(frozen=True, slots=True)
class Timing:
    """When to speak, and when to give a silent peer up."""

    beat_s: float = 0.5
    silence_s: float = 2.0


@dataclass(slots=True)
class Counters:
    """What happened on one stream; for metrics and `explain`."""

    messages_sent: int = 0  # frames included
    messages_received: int = 0  # accepted ones, frames included
    frames: int = 0  # sent or accepted, refetched ones included
    frame_bytes: int = 0
    duplicates: int = 0  # dropped: sequence seen before
    stale: int = 0  # dropped: another epoch's
    gaps: int = 0  # ended the stream
    refetches: int = 0
    late: int = 0  # events after the end


class HandoverEnd(StrEnum):
    """Why a hand-over ended without success. `Lost` and `Abort` carry one."""

    SILENT = "silent"  # nothing heard for silence_s
    CLOSED = "closed"  # the stream ended before its time
    DEADLINE = "deadline"  # the request's own
    PROTOCOL = "protocol"  # gap, garbled bytes, or a word out of place
    FAILED = "failed"  # the prefill side refused or gave up; `error` says why
    CORRUPTED = "corrupted"  # the same tokens arrived damaged twice
    CANCELLED = "cancelled"  # the decode side asked for it


# ------------------------------------------------------------------ actions


@dataclass(frozen=True, slots=True)
class Send:
    """Write this message to the stream. It is numbered already."""

    message: pb.HandoverUp | pb.HandoverDown


@dataclass(frozen=True, slots=True)
class Close:
    """HandoverEnd the stream after what was sent before. `now`: do not wait for the peer to read it."""

    now: bool


@dataclass(frozen=True, slots=True)
class AskBind:
    """Receiver: have the engine bind blocks for the whole prompt; answer with `bound` or `not_yet`."""


@dataclass(frozen=True, slots=True)
class Write:
    """Receiver: store the frame of this sequence; answer with `written`. A frame without a Write is to be dropped."""

    sequence: int
    token_start: int
    token_count: int


@dataclass(frozen=True, slots=True)
class GotFirstToken:
    """Receiver: the first generated token, to be forwarded at once."""

    token_id: int
    logprobs: tuple[TokenLogprobs, ...] = ()  # its own, if asked for
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # if asked for


@dataclass(frozen=True, slots=True)
class Complete:
    """Receiver: the whole prompt's KV is verified and stored, and the first token known. Decoding may go on."""


@dataclass(frozen=True, slots=True)
class Lost:
    """Receiver: no more will come. Tokens below `stored_upto` are verified and stored; compute the rest here.

    Writes that the engine has not begun are void from now on. `first_token` is what GotFirstToken said, if it did.
    """

    reason: HandoverEnd
    stored_upto: int
    first_token: int | None
    detail: str = ""
    error_code: str = ""  # core/errors.py, for FAILED
    error_message: str = ""


@dataclass(frozen=True, slots=True)
class EngineBound:
    """Sender: decode holds the blocks; run the request."""


@dataclass(frozen=True, slots=True)
class EngineNotYet:
    """Sender: decode cannot hold it now; park the request, run another."""


@dataclass(frozen=True, slots=True)
class Read:
    """Sender: read the planes of these tokens from the store; answer with `frame_read` (in any order)."""

    token_start: int
    token_count: int


@dataclass(frozen=True, slots=True)
class SendFrame:
    """Sender: write the planes just read to the stream, under this sequence and epoch."""

    sequence: int
    token_start: int
    token_count: int
    is_last: bool


@dataclass(frozen=True, slots=True)
class ReleaseBlocks:
    """Sender: everything is verified over there. Give the blocks back."""


@dataclass(frozen=True, slots=True)
class Abort:
    """Sender: nobody waits for this any more. Stop computing it and give the blocks back."""

    reason: HandoverEnd
    detail: str = ""


Action: TypeAlias = (
    Send
    | Close
    | AskBind
    | Write
    | GotFirstToken
    | Complete
    | Lost
    | EngineBound
    | EngineNotYet
    | Read
    | SendFrame
    | ReleaseBlocks
    | Abort
)


# ------------------------------------------------------------------ the stream

UpBody: TypeAlias = pb.Open | pb.Bind | pb.NotYet | pb.Verified | pb.Refetch | pb.SlotFree | pb.Cancel | pb.HandoverBeat
DownBody: TypeAlias = pb.Started | pb.FirstToken | pb.Done | common_pb2.Error | pb.HandoverBeat
_FIELD_BY_BODY: dict[type, str] = {
    pb.Open: "open",
    pb.Bind: "bind",
    pb.NotYet: "not_yet",
    pb.Verified: "verified",
    pb.Refetch: "refetch",
    pb.SlotFree: "slot_free",
    pb.Cancel: "cancel",
    pb.HandoverBeat: "beat",
    pb.Started: "started",
    pb.FirstToken: "first_token",
    pb.Done: "done",
    common_pb2.Error: "failed",
}


@dataclass(frozen=True, slots=True)
class Label:
    """Whose hand-over this is; stands on every message and frame."""

    request_id: str
    choice: int
    epoch: Epoch

    @classmethod
    def of(cls, message: pb.HandoverUp | pb.HandoverDown | pb.FrameHeader) -> Label:
        """The label of a message or frame."""
        return cls(message.request_id, message.choice, Epoch(message.epoch.incarnation, message.epoch.counter))

    def _fields(self, sequence: int, body: UpBody | DownBody) -> dict[str, Any]:
        epoch = worker_pb2.Epoch(incarnation=self.epoch.incarnation, counter=self.epoch.counter)
        numbered = {"request_id": self.request_id, "choice": self.choice, "epoch": epoch, "sequence": sequence}
        return {**numbered, _FIELD_BY_BODY[type(body)]: body}

    def up(self, sequence: int, body: UpBody) -> pb.HandoverUp:
        """A message from decode to prefill."""
        return pb.HandoverUp(**self._fields(sequence, body))

    def down(self, sequence: int, body: DownBody) -> pb.HandoverDown:
        """A message from prefill to decode."""
        return pb.HandoverDown(**self._fields(sequence, body))


class MessageVerdict(StrEnum):
    """What to do with a numbered message."""

    ACCEPT = "accept"
    DROP = "drop"
    FOREIGN = "foreign"
    GAP = "gap"


@dataclass(slots=True)
class NumberedStream:
    """Numbers what goes out, admits what comes in once and in order, and watches the time of both."""

    label: Label
    timing: Timing
    deadline_s: float  # of the request
    said_s: float
    heard_s: float
    counters: Counters = field(default_factory=Counters)
    _sent: int = 0
    _received: int = 0

    def number(self, now_s: float) -> int:
        """The sequence of the next message or frame to leave; it leaves now."""
        self._sent += 1
        self.said_s = now_s
        self.counters.messages_sent += 1
        return self._sent

    def admit(self, label: Label, sequence: int, now_s: float) -> MessageVerdict:
        """Accept (request, epoch, sequence) once and in order; only what is accepted counts as a sign of life."""
        mine = self.label
        if (label.request_id, label.choice) != (mine.request_id, mine.choice) or label.epoch > mine.epoch:
            return MessageVerdict.FOREIGN
        if label.epoch < mine.epoch:
            self.counters.stale += 1
            return MessageVerdict.DROP
        if sequence <= self._received:
            self.counters.duplicates += 1
            return MessageVerdict.DROP
        if sequence > self._received + 1:
            self.counters.gaps += 1
            return MessageVerdict.GAP
        self._received = sequence
        self.heard_s = now_s
        self.counters.messages_received += 1
        return MessageVerdict.ACCEPT

    def overdue(self, now_s: float) -> HandoverEnd | None:
        """Why the wait is over, if it is. Also true for a process that slept itself: its peer has given it up."""
        if now_s >= self.deadline_s:
            return HandoverEnd.DEADLINE
        if now_s >= self.heard_s + self.timing.silence_s:
            return HandoverEnd.SILENT
        return None

    def beat_due(self, now_s: float) -> bool:
        """Whether we have been silent for a beat."""
        return now_s >= self.said_s + self.timing.beat_s

    @property
    def next_deadline_s(self) -> float:
        """When the next of the three can happen."""
        return min(self.said_s + self.timing.beat_s, self.heard_s + self.timing.silence_s, self.deadline_s)
