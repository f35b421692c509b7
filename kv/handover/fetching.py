"""Machine of one fetch: leading blocks of a chain, from one worker that holds them in its cache. Pure.

    new ── begin ──▶ asking ── frames, in order ──▶ asking … ── last frame ──▶ storing ── all stored ──▶ over
                        │                                                        ▲
                        └── stream over, silence, damage, protocol ──────────────┘

A fetch never fails its request: whatever ends it, the leading tokens that are stored are kept, and the rest is fetched
from another holder or computed. The source answers with what it holds, so an answer may end early ("short"). What came
without its windowed layers is kept only if computing may begin behind it (`kv/windows.py`).
Duties of the caller are those of machine.py; the source's frames are those of `Blocks.Fetch` (worker/blocks/fetch.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ..block import BlockIdentity
from ..spec import HASH_BLOCK_TOKENS, WindowedLayers
from ..windows import furthest_start
from .machine import Action, AskBlocks, Close, Fetched, Write

MAX_WRITING = 8  # frames that wait to be stored; with more, nothing is read from the source


class FetchEnd(StrEnum):
    """Why a fetch ended."""

    COMPLETE = "complete"
    SHORT = "short"  # the source holds no more of them
    EMPTY = "empty"  # no frame: the source holds none of them, or cannot be reached
    CLOSED = "closed"  # the stream broke
    SILENT = "silent"  # no frame for silence_s
    PROTOCOL = "protocol"  # malformed bytes, or a frame that was not asked for
    CORRUPTED = "corrupted"  # a frame does not match its digests
    DEADLINE = "deadline"  # the request's own
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Wanted:
    """Blocks that a fetch asks for."""

    identities: tuple[BlockIdentity, ...]  # hash blocks, a chain in order
    first_token: int  # place of the first one
    numerics_class: bytes | None  # that the frames must have; None: any
    windowed: WindowedLayers | None = None  # layers that may be left out before their window

    @property
    def end_token(self) -> int:
        """Place behind the last one."""
        return self.first_token + len(self.identities) * HASH_BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class FetchedFrame:
    """A frame's header, and whether its digests hold."""

    sequence: int
    token_start: int
    token_count: int
    identities: tuple[bytes, ...]
    numerics_class: bytes
    is_last: bool
    is_intact: bool
    num_bytes: int
    lacks_windows: bool = False  # its windowed layers were left out


class BlockFetch:
    """One fetch from one source, until all of it is stored or nothing more comes."""

    def __init__(self, wanted: Wanted, silence_s: float, deadline_s: float, now_s: float) -> None:
        """`silence_s`: longest wait for the next frame."""
        assert wanted.identities, "nothing is wanted"
        self.wanted = wanted
        self.num_bytes = 0
        self._stored_upto = wanted.first_token
        self._lacking: set[int] = set()  # hash blocks that came without their windowed layers
        self.end: FetchEnd | None = None  # decided; the machine is over when the writes under way are done too
        self.is_over = False
        self._silence_s = silence_s
        self._deadline_s = deadline_s
        self._heard_s = now_s
        self._taken_upto = wanted.first_token
        self._writing: list[tuple[int, int]] = []
        self._num_frames = 0
        self._detail = ""
        self._is_closed = False

    @property
    def stored_upto(self) -> int:
        """End of the leading tokens that are stored, such that computing may begin there."""
        num_blocks = self._stored_upto // HASH_BLOCK_TOKENS  # the first ones are the asker's own and lack nothing here
        return furthest_start(self.wanted.windowed, num_blocks, self._lacking) * HASH_BLOCK_TOKENS

    @property
    def num_writing(self) -> int:
        """Frames that wait to be stored."""
        return len(self._writing)

    @property
    def next_deadline_s(self) -> float | None:
        """Latest time of the next `tick`; None: no further call."""
        if self.is_over:
            return None
        return self._deadline_s if self.end is not None else min(self._deadline_s, self._heard_s + self._silence_s)

    # ------------------------------------------------------------------ events

    def begin(self, now_s: float) -> list[Action]:
        """The engine has bound blocks: ask."""
        if self.end is not None:
            return []
        self._heard_s = now_s
        return [AskBlocks(self.wanted.identities, self.wanted.first_token)]

    def on_frame(self, frame: FetchedFrame, now_s: float) -> list[Action]:
        """A frame arrived. Store its planes only if the answer has a Write."""
        if self.end is not None or frame.sequence <= self._num_frames:
            return []  # late, or a duplicate
        self._heard_s = now_s
        fault = self._fault(frame)
        if fault:
            return self._finish(FetchEnd.PROTOCOL, fault)
        self._num_frames += 1
        if not frame.is_intact:
            return self._finish(FetchEnd.CORRUPTED, f"tokens {frame.token_start}+{frame.token_count}")
        self.num_bytes += frame.num_bytes
        self._taken_upto = frame.token_start + frame.token_count
        self._writing.append((frame.token_start, frame.token_count))
        if frame.lacks_windows:
            self._lacking.update(range(frame.token_start // HASH_BLOCK_TOKENS, self._taken_upto // HASH_BLOCK_TOKENS))
        actions: list[Action] = [Write(frame.sequence, frame.token_start, frame.token_count)]
        if self._taken_upto == self.wanted.end_token:
            actions += self._finish(FetchEnd.COMPLETE)
        elif frame.is_last:
            actions += self._finish(FetchEnd.SHORT)
        return actions

    def written(self, token_start: int, token_count: int) -> list[Action]:
        """The engine stored a frame's planes."""
        if self.is_over or (token_start, token_count) not in self._writing:
            return []
        self._writing.remove((token_start, token_count))
        self._stored_upto = self._writing[0][0] if self._writing else self._taken_upto
        return self._perhaps_over()

    def garbled(self, detail: str) -> list[Action]:
        """Malformed bytes arrived."""
        return self._finish(FetchEnd.PROTOCOL, detail)

    def closed(self) -> list[Action]:
        """The stream ended before a last frame."""
        return self._finish(FetchEnd.CLOSED if self._num_frames else FetchEnd.EMPTY)

    def tick(self, now_s: float) -> list[Action]:
        """Time passed."""
        if self.is_over:
            return []
        if now_s >= self._deadline_s:
            self._writing.clear()  # the sequence ends by the same deadline
            return self._finish(FetchEnd.DEADLINE) if self.end is None else self._perhaps_over()
        if self.end is None and now_s - self._heard_s >= self._silence_s:
            return self._finish(FetchEnd.SILENT)
        return []

    def cancel(self) -> list[Action]:
        """The result is no longer wanted: nothing is reported."""
        if self.is_over:
            return []
        self.end = self.end or FetchEnd.CANCELLED
        self.is_over = True
        return self._close()

    # ------------------------------------------------------------------ inside

    def _fault(self, frame: FetchedFrame) -> str:
        """What is wrong with a frame, as text; empty if nothing is."""
        count = frame.token_count // HASH_BLOCK_TOKENS
        end = frame.token_start + frame.token_count
        if frame.sequence != self._num_frames + 1:
            return f"frame {frame.sequence} came as number {self._num_frames + 1}"
        if frame.token_start != self._taken_upto:
            return f"tokens from {frame.token_start} came where {self._taken_upto} was next"
        if count < 1 or frame.token_count % HASH_BLOCK_TOKENS or end > self.wanted.end_token:
            return f"tokens [{frame.token_start}, {end}) were not asked for"
        first = (frame.token_start - self.wanted.first_token) // HASH_BLOCK_TOKENS
        if frame.identities != self.wanted.identities[first : first + count]:
            return f"other blocks than those asked for at token {frame.token_start}"
        if self.wanted.numerics_class is not None and frame.numerics_class != self.wanted.numerics_class:
            return f"a frame of numerics class {frame.numerics_class.hex()}, not {self.wanted.numerics_class.hex()}"
        return ""

    def _finish(self, end: FetchEnd, detail: str = "") -> list[Action]:
        if self.end is not None:
            return []
        self.end, self._detail = end, detail
        return [*self._close(), *self._perhaps_over()]

    def _perhaps_over(self) -> list[Action]:
        if self.end is None or self._writing or self.is_over:
            return []
        self.is_over = True
        return [Fetched(self.end.value, self.stored_upto, self._detail)]

    def _close(self) -> list[Action]:
        if self._is_closed:
            return []
        self._is_closed = True
        return [Close(now=self.end not in (FetchEnd.COMPLETE, FetchEnd.SHORT))]  # then the source's end is awaited
