"""Common parts of both sides of a hand-over: timing, counters, actions, and the numbering of messages on the stream.

The machines themselves are `receiver.py` (decode) and `sender.py` (prefill). They are pure: each event is a method that
takes the time of the event and returns actions. No clock, network, tensor or asyncio. To the peer they send the
messages of handover.proto, to their worker the actions below.

Duties of the caller:
* Actions are carried out in the order they are returned, and messages and frames leave in that order: the two share
  one sequence per direction.
* `next_deadline_s` is the latest time for the next call of `tick`, also when no other event happens.
* After `Complete`, `Lost`, `ReleaseBlocks`, `Abort` or `cancel` the machine is over: later events return no action.
* `Close` comes at most once. Messages sent to a broken stream are lost silently; `closed` reports the break.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeAlias

from ...core.lease import Lease
from ...core.request import Epoch, TokenLogprobs
from ...protos import common_pb2, worker_pb2
from ...protos import handover_pb2 as pb
from ..block import BlockIdentity

MAX_REFETCHES = 1  # per damaged hash block; after that the rest of the prompt is recomputed

HANDOVER = "handover.grpc.1"  # this hand-over's name among a worker's capabilities


@dataclass(slots=True)
class Counters:
    """Event counts of one stream, for metrics and `explain`."""

    messages_sent: int = 0  # frames included
    messages_received: int = 0  # accepted ones, frames included
    frames: int = 0  # sent or accepted, refetched ones included
    frame_bytes: int = 0
    duplicates: int = 0  # dropped: sequence seen before
    stale: int = 0  # dropped: another epoch's
    gaps: int = 0  # ended the stream
    refetches: int = 0
    late: int = 0  # events after the end
    shared_frames: int = 0  # those of `frames` whose planes went through shared memory
    shared_bytes: int = 0  # of those planes


class HandoverEnd(StrEnum):
    """Reason why a hand-over ended without success; part of `Lost` and `Abort`."""

    SILENT = "silent"  # no accepted message for silence_s
    CLOSED = "closed"  # the stream ended too early
    DEADLINE = "deadline"  # the request's own
    PROTOCOL = "protocol"  # sequence gap, malformed bytes, or a message not allowed in this state
    FAILED = "failed"  # the prefill side refused or failed; `error_code` and `error_message` say why
    CORRUPTED = "corrupted"  # the same tokens arrived damaged twice
    CANCELLED = "cancelled"  # the decode side asked for it
    TRANSPORT = "transport"  # the peer would use less than the required transport


# ------------------------------------------------------------------ actions


@dataclass(frozen=True, slots=True)
class Send:
    """Write this message to the stream. It has its sequence number already."""

    message: pb.HandoverUp | pb.HandoverDown


@dataclass(frozen=True, slots=True)
class Close:
    """End the stream after the messages sent before. `now`: do not wait for the peer to read them."""

    now: bool


@dataclass(frozen=True, slots=True)
class AskBind:
    """Receiver: ask the engine to bind blocks for the whole prompt; answer with `bound` or `not_yet`."""


@dataclass(frozen=True, slots=True)
class Write:
    """Receiver: store the frame of this sequence number; answer with `written`. Drop a frame that gets no Write."""

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
    """Receiver: the whole prompt's KV is verified and stored, and the first token is known. Decoding may continue."""


@dataclass(frozen=True, slots=True)
class Lost:
    """Receiver: the hand-over failed. Tokens below `stored_upto` are verified and stored; compute the rest here.

    Writes that the engine has not begun are void from now on. `first_token` is that of GotFirstToken, if it came.
    """

    reason: HandoverEnd
    stored_upto: int
    first_token: int | None
    detail: str = ""
    error_code: str = ""  # core/errors.py, for FAILED
    error_message: str = ""


@dataclass(frozen=True, slots=True)
class AskBlocks:
    """Fetch: ask the source for these hash blocks of a chain; the first one begins at `first_token`."""

    identities: tuple[BlockIdentity, ...]
    first_token: int


@dataclass(frozen=True, slots=True)
class Fetched:
    """Fetch: nothing more comes. Tokens below `stored_upto` are verified and stored. `end`: a `FetchEnd`."""

    end: str
    stored_upto: int
    detail: str = ""


@dataclass(frozen=True, slots=True)
class EngineBound:
    """Sender: decode holds the blocks; run the request."""


@dataclass(frozen=True, slots=True)
class EngineNotYet:
    """Sender: decode has no room for the prompt now; park the request, run another."""


@dataclass(frozen=True, slots=True)
class Read:
    """Sender: read the planes of these tokens from the store; answer with `frame_read` (in any order)."""

    token_start: int
    token_count: int
    slot: int | None = None  # of shared memory, for the planes; None: any memory


@dataclass(frozen=True, slots=True)
class SendFrame:
    """Sender: write the planes just read to the stream, with this sequence number."""

    sequence: int
    token_start: int
    token_count: int
    is_last: bool
    slot: int | None = None  # of shared memory, where the planes were read to


@dataclass(frozen=True, slots=True)
class ReleaseBlocks:
    """Sender: decode has verified the whole prompt. Give the blocks back."""


@dataclass(frozen=True, slots=True)
class Abort:
    """Sender: the hand-over failed. Stop computing the prompt and give the blocks back."""

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
    | AskBlocks
    | Fetched
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
    """Request, choice and epoch of a hand-over; part of every message and frame."""

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
    """Decision about a numbered message."""

    ACCEPT = "accept"
    DROP = "drop"
    FOREIGN = "foreign"
    GAP = "gap"


@dataclass(slots=True)
class NumberedStream:
    """Sequence numbers and times of both directions of a stream; admits each incoming message once and in order."""

    label: Label
    timing: Lease
    deadline_s: float  # of the request
    said_s: float  # when the last message left
    heard_s: float  # when the last accepted message arrived
    counters: Counters = field(default_factory=Counters)
    _sent: int = 0
    _received: int = 0

    def number(self, now_s: float) -> int:
        """Take the sequence number of a message or frame that is sent now."""
        self._sent += 1
        self.said_s = now_s
        self.counters.messages_sent += 1
        return self._sent

    def admit(self, label: Label, sequence: int, now_s: float) -> MessageVerdict:
        """Accept (request, epoch, sequence) once and in order; only accepted messages count as a sign of life."""
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
        """Reason to end the wait, or None. Also set after this process itself was suspended: its peer has ended too."""
        if now_s >= self.deadline_s:
            return HandoverEnd.DEADLINE
        if now_s >= self.heard_s + self.timing.silence_s:
            return HandoverEnd.SILENT
        return None

    def beat_due(self, now_s: float) -> bool:
        """True if the last message left at least one beat interval ago."""
        return now_s >= self.said_s + self.timing.beat_s

    @property
    def next_deadline_s(self) -> float:
        """Earliest time of the next beat, of the peer's silence, or of the deadline."""
        return min(self.said_s + self.timing.beat_s, self.heard_s + self.timing.silence_s, self.deadline_s)
