"""State machine of the decode side of a hand-over: receives a prompt's KV and knows which tokens are usable.

    NEW ──opened──▶ OPEN ──Started──▶ ASKING ──bound──▶ RECEIVING ──all verified, Done──▶ STORING ──all stored──▶
                                        │                  ▲  ╰ frame held → Write → written → SlotFree   COMPLETE
                                        ╰─not_yet─▶ PARKED ╯    frame damaged → Refetch (once), SlotFree
                                                  bound
    any ──deadline──▶ LOST        any but STORING ──silence, end of stream, unexpected message, Failed,
    any ──cancel──▶ CANCELLED                       the same tokens damaged twice──▶ LOST

Every wait ends by the peer's silence or the request's deadline. FirstToken may come at any time before Done. In STORING
the peer is no longer needed: its silence and the stream's end are ignored there. If they happen when only Done is
missing, the machine goes to STORING too. A frame of tokens [start, end) moves each of its hash blocks: missing →
verified (digests match) → stored (the engine wrote it). Knows no bytes: the caller verifies a frame's digests.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ...core.lease import Lease
from ...protos import handover_pb2 as pb
from ..messages import logprobs_from_wire
from ..spec import HASH_BLOCK_TOKENS
from ..windows import usable
from .machine import (
    MAX_REFETCHES,
    Action,
    AskBind,
    Close,
    Complete,
    Counters,
    GotFirstToken,
    HandoverEnd,
    Label,
    Lost,
    MessageVerdict,
    NumberedStream,
    Send,
    UpBody,
    Write,
)
from .plane_channel import GLOO, GRPC, SHM, Transport

_MISSING, _VERIFIED, _STORED = 0, 1, 2


class ReceiverState(StrEnum):
    """States, for display and tests; the drawing above shows the transitions."""

    NEW = "new"
    OPEN = "open"
    ASKING = "asking"
    PARKED = "parked"
    RECEIVING = "receiving"
    STORING = "storing"
    COMPLETE = "complete"
    LOST = "lost"
    CANCELLED = "cancelled"


FREE_SHARE = 2  # SlotFree names this part of all slots at once

_OVER = (ReceiverState.COMPLETE, ReceiverState.LOST, ReceiverState.CANCELLED)


@dataclass(frozen=True, slots=True)
class FrameArrived:
    """A well-formed frame arrived. `is_intact`: all rows that it must hold are present and every digest matches."""

    label: Label
    sequence: int
    token_start: int
    token_count: int
    is_intact: bool
    num_bytes: int
    numerics_class: bytes = b""
    slot: int | None = None  # of shared memory; None: its planes came with it

    @classmethod
    def of(cls, header: pb.FrameHeader, *, is_intact: bool, num_bytes: int) -> FrameArrived:
        """Build the event from a frame's header."""
        place = (header.sequence, header.token_start, header.token_count)
        slot = header.slot if header.HasField("slot") else None
        return cls(Label.of(header), *place, is_intact, num_bytes, header.numerics_class, slot)


class Receiver:
    """One hand-over, from Open to Complete or Lost.

    `order` is sent unchanged; its held_tokens and frame_slots are also checked against the frames that arrive.
    """

    def __init__(self, label: Label, order: pb.Open, timing: Lease, deadline_s: float, now_s: float) -> None:
        num_tokens = len(order.prompt_ids)
        assert order.held_tokens % HASH_BLOCK_TOKENS == 0, order.held_tokens
        assert order.held_tokens < num_tokens, "nothing to hand over"
        assert order.frame_slots > 0, "no slot, no frame"
        self.label = label
        self.state = ReceiverState.NEW
        self.first_token: int | None = None
        self.transport: Transport = GRPC  # of planes; Started may say otherwise
        self._order = order
        self._num_tokens = num_tokens
        self._stream = NumberedStream(label, timing, deadline_s, said_s=now_s, heard_s=now_s)
        num_units = -(-num_tokens // HASH_BLOCK_TOKENS)
        held_units = order.held_tokens // HASH_BLOCK_TOKENS
        # One state per hash block of the prompt; blocks that decode held before count as stored.
        self._units = bytearray([_STORED]) * held_units + bytearray(num_units - held_units)
        self._damaged = bytearray(num_units)  # times each hash block arrived damaged
        self._awaited: set[int] = set()  # hash blocks whose refetch is under way
        self._verified_units = held_units  # leading ones
        self._stored_units = held_units  # leading ones
        self._writing: dict[tuple[int, int], int | None] = {}  # (start, count) of a frame being written, to its slot
        # A message per frame costs as much as a small frame. With fewer than this many slots kept back, most are free.
        self._free_at_once = max(1, order.frame_slots // FREE_SHARE)
        self._unsaid_free: list[int | None] = []  # slots that are free here, and not yet told
        self._said_verified = order.held_tokens
        self._is_done = False
        self._is_closed = False

    @property
    def counters(self) -> Counters:
        """Event counts so far."""
        return self._stream.counters

    @property
    def is_over(self) -> bool:
        """True after the machine ended."""
        return self.state in _OVER

    @property
    def is_orderly(self) -> bool:
        """True if the peer has nothing left to write: it said Done, and all its frames are stored."""
        return self.state is ReceiverState.COMPLETE and self._is_done

    @property
    def next_deadline_s(self) -> float | None:
        """Latest time of the next `tick` call; None after the end."""
        if self.is_over:
            return None
        return self._stream.deadline_s if self.state is ReceiverState.STORING else self._stream.next_deadline_s

    @property
    def windows_from(self) -> int:
        """First token whose windowed layers are awaited."""
        return self._order.windows_from

    @property
    def verified_upto(self) -> int:
        """End of the leading tokens that were held before, or arrived with matching digests."""
        return self._tokens(self._verified_units)

    @property
    def stored_upto(self) -> int:
        """End of the leading tokens whose KV is stored, such that computing may begin there."""
        order = self._order
        return usable(self._tokens(self._stored_units), order.held_tokens, order.windows_from, self._num_tokens)

    # ------------------------------------------------------------------ the stream's events

    def opened(self, now_s: float) -> list[Action]:
        """The stream is open: send the order."""
        if self._is_late() or self.state is not ReceiverState.NEW:
            return []
        self.state = ReceiverState.OPEN
        self._stream.heard_s = now_s  # the peer has had no chance to speak before
        return [self._send(self._order, now_s)]

    def on_message(self, message: pb.HandoverDown, now_s: float) -> list[Action]:
        """A control message arrived."""
        refusal = self._refusal(Label.of(message), message.sequence, now_s)
        if refusal is not None:
            return refusal
        body = message.WhichOneof("body")
        if body == "beat":
            return []
        if body == "started":
            return self._started(message.started, now_s)
        if body == "first_token":
            return self._first_token(message.first_token, now_s)
        if body == "done":
            return self._done(message.done, now_s)
        if body == "failed":
            error = message.failed
            return self._lose(HandoverEnd.FAILED, now_s, code=error.code, text=error.message)
        return self._lose(HandoverEnd.PROTOCOL, now_s, f"a message of kind {body}")

    def on_frame(self, frame: FrameArrived, now_s: float) -> list[Action]:
        """A frame arrived. Store its planes only if the answer has a Write of its sequence number."""
        refusal = self._refusal(frame.label, frame.sequence, now_s)
        if refusal is not None:
            return refusal
        fault = self._fault(frame)
        if fault:
            return self._lose(HandoverEnd.PROTOCOL, now_s, fault)
        self.counters.frames += 1
        self.counters.frame_bytes += frame.num_bytes
        if frame.slot is not None:
            self.counters.shared_frames += 1
            self.counters.shared_bytes += frame.num_bytes
        units = self._range(frame.token_start, frame.token_count)
        return self._take(frame, units, now_s) if frame.is_intact else self._refetch(frame, units, now_s)

    def garbled(self, now_s: float, detail: str = "") -> list[Action]:
        """Malformed bytes arrived (kv/handover/frames.py: WireError)."""
        return (
            []
            if self._needs_nobody()
            else self._lose(HandoverEnd.PROTOCOL, now_s, detail or "bytes that are no message")
        )

    def closed(self, now_s: float) -> list[Action]:
        """The peer's direction of the stream ended."""
        return [] if self._needs_nobody() else self._lose(HandoverEnd.CLOSED, now_s)

    def tick(self, now_s: float) -> list[Action]:
        """Time passed."""
        if self.is_over:
            return []
        overdue = self._stream.overdue(now_s)
        if self.state is ReceiverState.STORING:
            return self._lose(overdue, now_s) if overdue is HandoverEnd.DEADLINE else []
        if overdue is not None:
            return self._lose(overdue, now_s)
        if self.state is not ReceiverState.NEW and self._stream.beat_due(now_s):
            return [self._send(pb.HandoverBeat(), now_s)]
        return []

    # ------------------------------------------------------------------ the worker's events

    def bound(self, now_s: float) -> list[Action]:
        """The engine has bound blocks for the whole prompt: the answer to AskBind, or later, after `not_yet`."""
        if self._is_late():
            return []
        assert self.state in (ReceiverState.ASKING, ReceiverState.PARKED), self.state
        self.state = ReceiverState.RECEIVING
        return [self._send(pb.Bind(), now_s)]

    def not_yet(self, now_s: float) -> list[Action]:
        """The engine has no room now; `bound` will be called when it has."""
        if self._is_late():
            return []
        assert self.state is ReceiverState.ASKING, self.state
        self.state = ReceiverState.PARKED
        return [self._send(pb.NotYet(), now_s)]

    def written(self, token_start: int, token_count: int, now_s: float) -> list[Action]:
        """The engine carried out a Write; the frame's buffer is free again."""
        if self._is_late():
            return []
        if (token_start, token_count) not in self._writing:
            self.counters.late += 1  # written for a hand-over of the same prompt that was lost before this one
            return []
        slot = self._writing.pop((token_start, token_count))
        for unit in self._range(token_start, token_count):
            self._units[unit] = _STORED
        self._stored_units = self._advance(self._stored_units, _STORED)
        if self.state is ReceiverState.STORING:
            return self._perhaps_complete()
        self._unsaid_free.append(slot)
        is_due = len(self._unsaid_free) >= self._free_at_once and self._verified_units < len(self._units)
        return self._say_free(now_s) if is_due else []

    def cancel(self, reason: str, now_s: float) -> list[Action]:
        """The result is no longer wanted."""
        if self._is_late():
            return []
        actions: list[Action] = []
        if self.state not in (ReceiverState.NEW, ReceiverState.STORING):
            actions.append(self._send(pb.Cancel(reason=reason), now_s))
        self.state = ReceiverState.CANCELLED
        return [*actions, *self._close(now=True)]

    # ------------------------------------------------------------------ inside

    def _is_late(self) -> bool:
        self.counters.late += self.is_over
        return self.is_over

    def _refusal(self, label: Label, sequence: int, now_s: float) -> list[Action] | None:
        """Actions if a message must not be handled; None: handle its body."""
        if self._needs_nobody():
            return []
        overdue = self._stream.overdue(now_s)
        if overdue is not None:
            return self._lose(overdue, now_s)
        verdict = self._stream.admit(label, sequence, now_s)
        if verdict is MessageVerdict.DROP:
            return []
        if verdict is not MessageVerdict.ACCEPT:
            return self._lose(HandoverEnd.PROTOCOL, now_s, f"{verdict.value} at sequence {sequence}")
        if self.state is ReceiverState.NEW:
            return self._lose(HandoverEnd.PROTOCOL, now_s, "an answer before the order")
        return None

    def _needs_nobody(self) -> bool:
        return self._is_late() or self.state is ReceiverState.STORING

    def _started(self, started: pb.Started, now_s: float) -> list[Action]:
        if self.state is not ReceiverState.OPEN:
            return self._lose(HandoverEnd.PROTOCOL, now_s, "started twice")
        if started.transport == SHM:
            if not self._order.HasField("shared_memory"):
                return self._lose(HandoverEnd.PROTOCOL, now_s, "planes in shared memory that was not offered")
            self.transport = SHM
        elif started.transport == GLOO:
            if not self._order.pair:
                return self._lose(HandoverEnd.PROTOCOL, now_s, "planes by a paired channel that was not offered")
            self.transport = GLOO
        required = self._order.required_transport
        if required not in ("", self.transport):
            detail = f"{required} is required, and the peer uses {self.transport}: {started.transport_reason}"
            return self._lose(HandoverEnd.TRANSPORT, now_s, detail)
        self.state = ReceiverState.ASKING
        return [AskBind()]

    def _first_token(self, first: pb.FirstToken, now_s: float) -> list[Action]:
        if self.first_token is not None:
            return self._lose(HandoverEnd.PROTOCOL, now_s, "a second first token")
        self.first_token = first.token_id
        logprobs = logprobs_from_wire([first.logprobs]) if first.HasField("logprobs") else ()
        return [GotFirstToken(first.token_id, logprobs, logprobs_from_wire(first.prompt_logprobs))]

    def _done(self, done: pb.Done, now_s: float) -> list[Action]:
        if self._is_done or self.first_token is None or self.state is not ReceiverState.RECEIVING:
            return self._lose(HandoverEnd.PROTOCOL, now_s, "done out of place")
        if done.num_frames != self.counters.frames:
            return self._lose(
                HandoverEnd.PROTOCOL, now_s, f"{done.num_frames} frames sent, {self.counters.frames} arrived"
            )
        if any(unit not in self._awaited for unit, state in enumerate(self._units) if state == _MISSING):
            return self._lose(HandoverEnd.PROTOCOL, now_s, "done, but tokens are missing")
        self._is_done = True
        return self._perhaps_complete()

    def _fault(self, frame: FrameArrived) -> str:
        """Protocol violation of a frame, as text; empty if there is none."""
        end = frame.token_start + frame.token_count
        if self.state is not ReceiverState.RECEIVING:
            return "a frame before Bind"
        if len(self._writing) + len(self._unsaid_free) >= self._order.frame_slots:
            return f"more than {self._order.frame_slots} frames under way"
        if (frame.slot is None) is (self.transport is SHM):
            return f"planes in slot {frame.slot}, and the transport is {self.transport}"
        if frame.slot is not None and frame.slot in (*self._writing.values(), *self._unsaid_free):
            return f"slot {frame.slot} is not free"
        if self._order.deterministic and frame.numerics_class != self._order.numerics_class:
            return f"a frame of numerics class {frame.numerics_class.hex()}, not {self._order.numerics_class.hex()}"
        if (
            frame.token_count < 1
            or frame.token_start % HASH_BLOCK_TOKENS
            or frame.token_start < self._order.held_tokens
        ):
            return f"tokens [{frame.token_start}, {end}) were not asked for"
        if end > self._num_tokens or (end % HASH_BLOCK_TOKENS and end != self._num_tokens):
            return f"tokens [{frame.token_start}, {end}) do not end with a block or the prompt"
        if any(self._units[unit] != _MISSING for unit in self._range(frame.token_start, frame.token_count)):
            return f"tokens [{frame.token_start}, {end}) overlap those that are held"
        return ""

    def _take(self, frame: FrameArrived, units: range, now_s: float) -> list[Action]:
        for unit in units:
            self._units[unit] = _VERIFIED
        self._awaited.difference_update(units)
        self._writing[frame.token_start, frame.token_count] = frame.slot
        actions: list[Action] = [Write(frame.sequence, frame.token_start, frame.token_count)]
        self._verified_units = self._advance(self._verified_units, _VERIFIED)
        if self._verified_units == len(self._units):
            actions += self._say_verified(now_s)
        return [*actions, *self._perhaps_complete()]

    def _refetch(self, frame: FrameArrived, units: range, now_s: float) -> list[Action]:
        for unit in units:
            self._damaged[unit] += 1
        attempt = max(self._damaged[unit] for unit in units)
        if attempt > MAX_REFETCHES:
            return self._lose(HandoverEnd.CORRUPTED, now_s, f"frame {frame.sequence}, the same tokens again")
        self.counters.refetches += 1
        self._awaited.update(units)
        wanted = pb.Refetch(token_start=frame.token_start, token_count=frame.token_count, attempt=attempt)
        self._unsaid_free.append(frame.slot)
        return [self._send(wanted, now_s), *self._say_free(now_s)]

    def _say_verified(self, now_s: float) -> list[Action]:
        if self.verified_upto == self._said_verified:
            return []
        self._said_verified = self.verified_upto
        return [self._send(pb.Verified(upto_token=self.verified_upto), now_s)]

    def _say_free(self, now_s: float) -> list[Action]:
        """Tell how far everything is verified, and which slots are free since the last time."""
        slots = [slot for slot in self._unsaid_free if slot is not None]
        count, self._unsaid_free = len(self._unsaid_free), []
        return [*self._say_verified(now_s), self._send(pb.SlotFree(count=count, slots=slots), now_s)]

    def _has_all(self) -> bool:
        return self._verified_units == len(self._units) and self.first_token is not None

    def _perhaps_complete(self) -> list[Action]:
        actions: list[Action] = []
        if self.state is ReceiverState.RECEIVING and self._is_done and self._has_all():
            self.state = ReceiverState.STORING
            actions += self._close(now=False)
        if self.state is ReceiverState.STORING and self._stored_units == len(self._units):
            self.state = ReceiverState.COMPLETE
            actions.append(Complete())
        return actions

    def _lose(
        self, reason: HandoverEnd, now_s: float, detail: str = "", *, code: str = "", text: str = ""
    ) -> list[Action]:
        if (
            self.state is ReceiverState.RECEIVING
            and self._has_all()
            and reason in (HandoverEnd.SILENT, HandoverEnd.CLOSED, HandoverEnd.PROTOCOL)
        ):
            self.state = ReceiverState.STORING  # only Done is missing, and Done carries no data that is needed
            return [*self._close(now=True), *self._perhaps_complete()]
        actions: list[Action] = []
        is_heard = reason not in (HandoverEnd.CLOSED, HandoverEnd.FAILED)
        if is_heard and self.state not in (ReceiverState.NEW, ReceiverState.STORING):
            actions.append(self._send(pb.Cancel(reason=reason.value), now_s))
        self.state = ReceiverState.LOST
        lost = Lost(reason, self.stored_upto, self.first_token, detail, code, text)
        return [*actions, lost, *self._close(now=True)]

    def _send(self, body: UpBody, now_s: float) -> Send:
        return Send(self.label.up(self._stream.number(now_s), body))

    def _close(self, *, now: bool) -> list[Action]:
        if self._is_closed:
            return []
        self._is_closed = True
        return [Close(now)]

    def _range(self, token_start: int, token_count: int) -> range:
        """Hash blocks of a token range that begins and ends at a block's edge, or ends with the prompt."""
        return range(token_start // HASH_BLOCK_TOKENS, -(-(token_start + token_count) // HASH_BLOCK_TOKENS))

    def _advance(self, leading: int, at_least: int) -> int:
        """Number of leading hash blocks in state `at_least` or later; `leading` are known to be."""
        while leading < len(self._units) and self._units[leading] >= at_least:
            leading += 1
        return leading

    def _tokens(self, leading: int) -> int:
        return min(leading * HASH_BLOCK_TOKENS, self._num_tokens)
