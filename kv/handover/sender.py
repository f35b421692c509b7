"""State machine of the prefill side of a hand-over: waits for room at decode, then streams KV beside the computation.

    QUEUED ──started──▶ OFFERED ──Bind──▶ BOUND ──every frame sent, first token──▶ DONE ──Verified(all)──▶ RELEASED
                          │                ▲  ╰ progress → Read → frame_read → SendFrame … SlotFree
                          ╰─NotYet─▶ PARKED╯    Refetch → Read again
                                         Bind
    any of these ──Cancel, silence, end of stream, deadline, unexpected message, failed──▶ ABORTED

Every wait ends by the peer's silence or the request's deadline. The blocks stay until everything is verified or the
stream ends, so a Refetch can be answered after Done too. Frames that are being read, and those sent but not yet freed
by SlotFree, are together never more than the slots. With shared memory each of them has a slot of its own, from before
it is read until SlotFree names the slot. A frame gets its sequence number when it is sent, not when its
reading begins: FirstToken and beats may be sent in between. Knows no bytes and no store.
"""

from __future__ import annotations

from collections import deque
from enum import StrEnum
from heapq import heappop, heappush

from ...core.errors import DeadlineExceeded, InternalError, InvalidRequest
from ...core.lease import Lease
from ...protos import common_pb2
from ...protos import handover_pb2 as pb
from ..spec import HASH_BLOCK_TOKENS
from .machine import (
    MAX_REFETCHES,
    Abort,
    Action,
    Close,
    Counters,
    DownBody,
    EngineBound,
    EngineNotYet,
    HandoverEnd,
    Label,
    MessageVerdict,
    NumberedStream,
    Read,
    ReleaseBlocks,
    Send,
    SendFrame,
)
from .plane_channel import GLOO, GRPC, SHM, Transport
from .sources import NOTHING_FETCHED, FetchedBlocks


class SenderState(StrEnum):
    """States, for display and tests; the drawing above shows the transitions."""

    QUEUED = "queued"
    OFFERED = "offered"
    PARKED = "parked"
    BOUND = "bound"
    DONE = "done"
    RELEASED = "released"
    ABORTED = "aborted"


_OVER = (SenderState.RELEASED, SenderState.ABORTED)


def refuse(message: pb.HandoverUp, error: common_pb2.Error) -> pb.HandoverDown:
    """Refusal of an Open for which no Sender is made, the only message of its stream."""
    return Label.of(message).down(1, error)


class Sender:
    """One hand-over, from an accepted Open to ReleaseBlocks or Abort.

    `tokens_per_frame` is a multiple of 16; `max_frames` is our own bound on the slots that the peer offers.

    Raises:
        InvalidRequest: the message is no Open, or one of its fields has an invalid value.
    """

    def __init__(
        self, message: pb.HandoverUp, tokens_per_frame: int, max_frames: int, timing: Lease, now_s: float
    ) -> None:
        assert tokens_per_frame > 0 and tokens_per_frame % HASH_BLOCK_TOKENS == 0, tokens_per_frame  # noqa: PT018
        order = _checked(message)
        self.label = Label.of(message)
        self.state = SenderState.QUEUED
        self.order = order
        self.transport: Transport = GRPC  # of planes
        self._transport_reason = ""
        self._fetched = NOTHING_FETCHED
        self._num_tokens = len(order.prompt_ids)
        self._tokens_per_frame = tokens_per_frame
        self._slots = min(order.frame_slots, max_frames)
        deadline_s = now_s + order.timeout_ms / 1000
        self._stream = NumberedStream(self.label, timing, deadline_s, said_s=now_s, heard_s=now_s)
        self._stream.admit(self.label, message.sequence, now_s)
        # held_tokens ≤ verified ≤ next ≤ sealed: verified by decode, asked to be read, computed here.
        self._verified = order.held_tokens
        self._next = order.held_tokens
        self._sealed = 0
        self._again: deque[tuple[int, int]] = deque()  # damaged ranges to read once more
        self._reading: dict[tuple[int, int], int | None] = {}  # (start, count), to its slot of shared memory
        self._unfreed = 0  # frames sent whose slots are not freed yet
        self._free: list[int] = []  # slots of shared memory without a frame: a heap, so that the first ones are used
        self._unfreed_slots: set[int] = set()  # those of frames sent
        num_units = -(-self._num_tokens // HASH_BLOCK_TOKENS)
        self._times_sent = bytearray(num_units)  # per hash block; at most 1 + MAX_REFETCHES
        self._times_refetched = bytearray(num_units)
        self._said_first_token = False

    @property
    def counters(self) -> Counters:
        """Event counts so far."""
        return self._stream.counters

    @property
    def is_over(self) -> bool:
        """True after the machine ended."""
        return self.state in _OVER

    @property
    def next_deadline_s(self) -> float | None:
        """Latest time of the next `tick` call; None after the end."""
        return None if self.is_over else self._stream.next_deadline_s

    def share(self, slots: int, tokens_per_frame: int) -> None:
        """Use the shared memory that decode offered; call it before `started`. Its slots hold `tokens_per_frame`."""
        assert self.state is SenderState.QUEUED, self.state
        assert 0 < tokens_per_frame <= self._tokens_per_frame, tokens_per_frame
        self.transport = SHM
        self._tokens_per_frame = tokens_per_frame
        self._slots = min(self._slots, slots)
        self._free = list(range(self._slots))

    def pair(self) -> None:
        """Use the paired channel that decode offered; call it before `started`. Its slots are its own business."""
        assert self.state is SenderState.QUEUED, self.state
        self.transport = GLOO

    def decline(self, reason: str) -> None:
        """Do not use the shared memory or channel that decode offered; Started says why."""
        self._transport_reason = reason

    def fetched(self, blocks: FetchedBlocks) -> None:
        """Blocks of the prompt came from other workers; call it before `started`, which tells decode."""
        self._fetched = blocks

    def leaves_out_windows(self, token_start: int, token_count: int) -> bool:
        """True if decode does not want the windowed layers of a frame's tokens."""
        return token_start + token_count <= self.order.windows_from

    # ------------------------------------------------------------------ the stream's events

    def on_message(self, message: pb.HandoverUp, now_s: float) -> list[Action]:
        """A message arrived (all but the Open that this machine was made from)."""
        if self._is_late():
            return []
        overdue = self._stream.overdue(now_s)
        if overdue is not None:
            return self._abort(overdue, now_s)
        verdict = self._stream.admit(Label.of(message), message.sequence, now_s)
        if verdict is MessageVerdict.DROP:
            return []
        if verdict is not MessageVerdict.ACCEPT:
            return self._abort(HandoverEnd.PROTOCOL, now_s, f"{verdict.value} at sequence {message.sequence}")
        body = message.WhichOneof("body")
        if body == "beat":
            return []
        if body == "bind":
            return self._bind(now_s)
        if body == "not_yet":
            return self._park(now_s)
        if body == "verified":
            return self._take_verified(message.verified.upto_token, now_s)
        if body == "refetch":
            return self._refetch(message.refetch, now_s)
        if body == "slot_free":
            return self._free_slots(message.slot_free, now_s)
        if body == "cancel":
            return self._abort(HandoverEnd.CANCELLED, now_s, message.cancel.reason)
        return self._abort(HandoverEnd.PROTOCOL, now_s, f"a message of kind {body}")

    def garbled(self, now_s: float, detail: str = "") -> list[Action]:
        """Malformed bytes arrived (kv/handover/frames.py: WireError)."""
        return (
            [] if self._is_late() else self._abort(HandoverEnd.PROTOCOL, now_s, detail or "bytes that are no message")
        )

    def closed(self, now_s: float) -> list[Action]:
        """The peer's direction of the stream ended."""
        return [] if self._is_late() else self._abort(HandoverEnd.CLOSED, now_s)

    def tick(self, now_s: float) -> list[Action]:
        """Time passed."""
        if self.is_over:
            return []
        overdue = self._stream.overdue(now_s)
        if overdue is not None:
            return self._abort(overdue, now_s)
        return [self._send(pb.HandoverBeat(), now_s)] if self._stream.beat_due(now_s) else []

    # ------------------------------------------------------------------ the engine's events

    def started(self, cached_tokens: int, now_s: float) -> list[Action]:
        """The request is next to run, and `cached_tokens` of it are cached. Repeated calls are ignored."""
        if self._is_late() or self.state is not SenderState.QUEUED:
            return []
        self.state = SenderState.OFFERED
        started = pb.Started(
            cached_tokens=cached_tokens,
            transport=self.transport,
            transport_reason=self._transport_reason,
            fetched_tokens=self._fetched.num_tokens,
            fetched_from=self._fetched.source,
            fetch_end=self._fetched.end,
        )
        return [self._send(started, now_s)]

    def progress(self, num_computed: int, now_s: float) -> list[Action]:
        """KV of all tokens below `num_computed` (cached ones included) is in our blocks and sealed."""
        if self._is_late():
            return []
        assert num_computed <= self._num_tokens, num_computed
        self._sealed = max(self._sealed, num_computed)
        return self._pump()

    def first_token(self, first: pb.FirstToken, now_s: float) -> list[Action]:
        """The first token is sampled: it is sent at once, before frames that are still being read."""
        if self._is_late():
            return []
        assert not self._said_first_token, "the first token comes once"
        self._said_first_token = True
        return [self._send(first, now_s), *self._perhaps_done(now_s)]

    def frame_read(self, token_start: int, token_count: int, num_bytes: int, now_s: float) -> list[Action]:
        """The planes of a Read were read; they have `num_bytes` bytes."""
        if self._is_late():
            return []
        slot = self._reading.pop((token_start, token_count))
        for unit in _units(token_start, token_count):
            self._times_sent[unit] += 1
        self._unfreed += 1
        self.counters.frames += 1
        self.counters.frame_bytes += num_bytes
        if slot is not None:
            self._unfreed_slots.add(slot)
            self.counters.shared_frames += 1
            self.counters.shared_bytes += num_bytes
        is_last = token_start + token_count == self._num_tokens
        frame = SendFrame(self._stream.number(now_s), token_start, token_count, is_last, slot)
        return [frame, *self._perhaps_done(now_s)]

    def failed(self, error: common_pb2.Error, now_s: float) -> list[Action]:
        """The engine refused the request or failed."""
        return [] if self._is_late() else self._abort(HandoverEnd.FAILED, now_s, error.message, error)

    # ------------------------------------------------------------------ inside

    def _is_late(self) -> bool:
        self.counters.late += self.is_over
        return self.is_over

    def _bind(self, now_s: float) -> list[Action]:
        if self.state not in (SenderState.OFFERED, SenderState.PARKED):
            return self._abort(HandoverEnd.PROTOCOL, now_s, f"bind while {self.state}")
        self.state = SenderState.BOUND
        return [EngineBound(), *self._pump()]

    def _park(self, now_s: float) -> list[Action]:
        if self.state is not SenderState.OFFERED:
            return self._abort(HandoverEnd.PROTOCOL, now_s, f"not_yet while {self.state}")
        self.state = SenderState.PARKED
        return [EngineNotYet()]

    def _take_verified(self, upto: int, now_s: float) -> list[Action]:
        is_new = self._verified < upto <= self._next and self._is_edge(upto)
        if not is_new or not all(self._times_sent[unit] for unit in _units(self._verified, upto - self._verified)):
            return self._abort(
                HandoverEnd.PROTOCOL, now_s, f"verified up to {upto}, known {self._verified} to {self._next}"
            )
        self._verified = upto
        return self._perhaps_release()

    def _refetch(self, wanted: pb.Refetch, now_s: float) -> list[Action]:
        start, end = wanted.token_start, wanted.token_start + wanted.token_count
        known = self._verified <= start < end <= self._next and not start % HASH_BLOCK_TOKENS and self._is_edge(end)
        units = _units(start, wanted.token_count) if known else range(0)
        if not units or any(self._times_sent[u] <= self._times_refetched[u] for u in units):
            return self._abort(HandoverEnd.PROTOCOL, now_s, f"refetch of tokens [{start}, {end}) that were not sent")
        if any(self._times_refetched[unit] >= MAX_REFETCHES for unit in units):
            return self._abort(HandoverEnd.PROTOCOL, now_s, f"refetch of tokens [{start}, {end}) once too often")
        for unit in units:
            self._times_refetched[unit] += 1
        self.counters.refetches += 1
        while start < end:
            count = self._frame_tokens(start, end)
            self._again.append((start, count))
            start += count
        return self._pump()

    def _free_slots(self, freed: pb.SlotFree, now_s: float) -> list[Action]:
        count, slots = freed.count, set(freed.slots)
        if not 0 < count <= self._unfreed:
            return self._abort(HandoverEnd.PROTOCOL, now_s, f"{count} slots freed, {self._unfreed} in use")
        if not slots <= self._unfreed_slots or len(slots) != (count if self.transport is SHM else 0):
            return self._abort(HandoverEnd.PROTOCOL, now_s, f"slots {sorted(slots)} freed of {self._unfreed_slots}")
        self._unfreed -= count
        self._unfreed_slots -= slots
        for slot in slots:
            heappush(self._free, slot)
        return self._pump()

    def _pump(self) -> list[Action]:
        """Read as many frames as slots are free: damaged ranges first, then sealed tokens, in whole hash blocks."""
        actions: list[Action] = []
        if self.state not in (SenderState.BOUND, SenderState.DONE):
            return actions
        whole = self._sealed if self._sealed == self._num_tokens else self._sealed - self._sealed % HASH_BLOCK_TOKENS
        while len(self._reading) + self._unfreed < self._slots:
            if self._again:
                start, count = self._again.popleft()
            elif self._next < whole:
                start, count = self._next, self._frame_tokens(self._next, whole)
                self._next += count
            else:
                break
            slot = heappop(self._free) if self.transport is SHM else None
            self._reading[start, count] = slot
            actions.append(Read(start, count, slot))
        return actions

    def _frame_tokens(self, start: int, end: int) -> int:
        """Tokens of the frame that begins at `start`: all of them with their windowed layers, or all without."""
        edge = self.order.windows_from
        return min(self._tokens_per_frame, (edge if start < edge < end else end) - start)

    def _perhaps_done(self, now_s: float) -> list[Action]:
        is_all_sent = self._next == self._num_tokens and not self._reading and not self._again
        if self.state is not SenderState.BOUND or not is_all_sent or not self._said_first_token:
            return []
        self.state = SenderState.DONE
        done = pb.Done(num_frames=self.counters.frames, bytes_sent=self.counters.frame_bytes)
        return [self._send(done, now_s), *self._perhaps_release()]

    def _perhaps_release(self) -> list[Action]:
        if self.state is not SenderState.DONE or self._verified < self._num_tokens:
            return []
        self.state = SenderState.RELEASED
        return [ReleaseBlocks(), Close(now=False)]

    def _abort(
        self, reason: HandoverEnd, now_s: float, detail: str = "", error: common_pb2.Error | None = None
    ) -> list[Action]:
        if reason is HandoverEnd.PROTOCOL:
            error = common_pb2.Error(code=InternalError.code, message=f"hand-over protocol: {detail}")
        elif reason is HandoverEnd.DEADLINE:
            error = common_pb2.Error(code=DeadlineExceeded.code, message="the request's time is over")
        said = [self._send(error, now_s)] if error is not None else []
        self.state = SenderState.ABORTED
        return [*said, Abort(reason, detail), Close(now=True)]

    def _send(self, body: DownBody, now_s: float) -> Send:
        return Send(self.label.down(self._stream.number(now_s), body))

    def _is_edge(self, token: int) -> bool:
        """True if a frame can end at this token: at the end of a hash block or of the prompt."""
        return token % HASH_BLOCK_TOKENS == 0 or token == self._num_tokens


def _units(token_start: int, token_count: int) -> range:
    """Hash blocks of a token range that begins at a hash block's start."""
    return range(token_start // HASH_BLOCK_TOKENS, -(-(token_start + token_count) // HASH_BLOCK_TOKENS))


def _checked(message: pb.HandoverUp) -> pb.Open:
    order = message.open
    if message.WhichOneof("body") != "open" or message.sequence != 1:
        raise InvalidRequest("a hand-over begins with open, sequence 1")
    if order.held_tokens % HASH_BLOCK_TOKENS or order.held_tokens >= len(order.prompt_ids):
        raise InvalidRequest(
            f"held_tokens is {order.held_tokens} of {len(order.prompt_ids)}; must be a multiple of 16 below the prompt",
            param="held_tokens",
        )
    if order.windows_from % HASH_BLOCK_TOKENS or order.windows_from >= len(order.prompt_ids):
        raise InvalidRequest(
            f"windows_from is {order.windows_from} of {len(order.prompt_ids)}; must be a multiple of 16 below the "
            "prompt",
            param="windows_from",
        )
    if order.frame_slots < 1 or order.timeout_ms < 1:
        raise InvalidRequest("frame_slots and timeout_ms must be at least 1", param="open")
    return order
