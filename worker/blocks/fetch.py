"""Blocks.Fetch: cached blocks by identity, as frames. Knows no request and no session."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import grpc
from google.protobuf.message import DecodeError

from ...core.request import Epoch, SequenceKey
from ...engine.facts import FaceFacts
from ...engine.link.client import EngineClient
from ...engine.link.messages import BlocksFetched, Reading
from ...kv.block import IDENTITY_BYTES, BlockIdentity
from ...kv.handover.frames import FrameLabel, encode_frame
from ...kv.handover.machine import Label
from ...kv.handover.transports.grpc import ServerContext
from ...kv.messages import scope_from_wire
from ...kv.section import SectionData
from ...kv.spec import HASH_BLOCK_TOKENS
from ...kv.windows import first_needed
from ...protos import handover_pb2
from .departing import Departing

MAX_IDENTITIES = 65_536  # a million tokens


class FetchService:
    """Serves cached blocks of one cache scope. The guard has checked before that the caller may ask."""

    def __init__(
        self, facts: FaceFacts, dispatcher: EngineClient, counters: Counter[str], departing: Departing | None = None
    ) -> None:
        """`departing` is told of every fetch on behalf of a choice."""
        self._facts = facts
        self._dispatcher = dispatcher
        self._counters = counters
        self._departing = departing

    async def fetch(self, request: bytes, context: ServerContext) -> AsyncIterator[bytes]:
        """Handler of Blocks.Fetch: yields frames of the longest leading part that is held, in order."""
        wanted = await _parsed(request, context)
        if self._departing is None:
            async for frame in self._frames(wanted):
                yield frame
            return
        key, is_whole = SequenceKey(wanted.request_id, wanted.choice), False
        self._departing.fetch_began(key)
        try:
            async for frame in self._frames(wanted):
                yield frame
            is_whole = True
        finally:
            self._departing.fetch_ended(key, is_whole=is_whole)

    async def _frames(self, wanted: handover_pb2.FetchRequest) -> AsyncIterator[bytes]:
        answer = FetchAnswer(wanted, self._facts, self._counters)
        while (part := answer.next_part()) is not None:
            found = await self._dispatcher.fetch(part.identities, part.first_token, answer.root, part.how)
            frame = answer.frame(found)
            if frame is not None:
                yield frame


class FetchPart(NamedTuple):
    """Blocks that one frame may hold; or all of them, to be counted."""

    identities: tuple[BlockIdentity, ...]
    first_token: int
    how: Reading = Reading.ALL


class FetchAnswer:
    """Answer to one request, frame by frame, until a block is not held. Pure: the driver asks the engine for each part.

    Blocks of another isolation domain or adapter than the request's count as not held. If windowed layers may be left
    out, the first part asks how many blocks are held, because their window is counted from the last one.
    """

    def __init__(self, wanted: handover_pb2.FetchRequest, facts: FaceFacts, counters: Counter[str]) -> None:
        """`wanted`: a request that `why_malformed` finds no fault in."""
        self.root = facts.namer.root(scope_from_wire(wanted))
        self._wanted = wanted
        self._facts = facts
        self._counters = counters
        self._identities = [BlockIdentity(identity) for identity in wanted.identities]
        self._first = 0  # of the part that is next
        self._num_frames = 0
        self._is_over = False
        self._windowed = facts.model.kv_spec.main.windowed if wanted.only_windows else None
        self._counts = self._windowed is not None
        self._windows_from = 0  # number of the first of the blocks whose windowed layers are sent

    def next_part(self) -> FetchPart | None:
        """The blocks to read next; None: nothing follows. `frame` must be called with them."""
        if self._is_over or self._first >= len(self._identities):
            return None
        if self._counts:
            return FetchPart(tuple(self._identities), self._wanted.first_token, Reading.NOTHING)
        is_before = self._first < self._windows_from
        end = self._windows_from if is_before else len(self._identities)
        end = min(end, self._first + self._identities_per_frame())
        asked, how = self._identities[self._first : end], Reading.WITHOUT_WINDOWS if is_before else Reading.ALL
        return FetchPart(tuple(asked), self._wanted.first_token + self._first * HASH_BLOCK_TOKENS, how)

    def frame(self, found: BlocksFetched) -> bytes | None:
        """The frame of the last part, of which these blocks are held; None: of none."""
        part = self.next_part()
        assert part is not None, "no part was asked for"
        if part.how is Reading.NOTHING:
            self._count(found.num_blocks)
            return None
        self._first += len(part.identities)
        self._is_over = found.num_blocks < len(part.identities)
        if not found.num_blocks:
            return None
        self._num_frames += 1
        sections = select(found.sections, self._wanted)
        self._counters["fetch_served_blocks"] += found.num_blocks
        self._counters["fetch_served_bytes"] += sum(section.num_bytes for section in sections)
        label = FrameLabel(
            Label("", 0, Epoch(0, 0)),
            self._num_frames,
            self._facts.model.numerics_class,
            part.first_token,
            found.num_blocks * HASH_BLOCK_TOKENS,
            part.identities[: found.num_blocks],
        )
        is_last = self._is_over or self._first >= len(self._identities)
        return encode_frame(label, sections, is_last=is_last)

    def _count(self, num_held: int) -> None:
        self._counts = False
        del self._identities[num_held:]
        start = self._wanted.first_token
        first = first_needed(self._windowed, start + num_held * HASH_BLOCK_TOKENS)
        self._windows_from = max(0, first - start) // HASH_BLOCK_TOKENS

    def _identities_per_frame(self) -> int:
        facts = self._facts
        per_block = facts.model.kv_spec.bytes_per_token * facts.block_tokens
        return max(1, facts.frame_bytes // per_block) * (facts.block_tokens // HASH_BLOCK_TOKENS)


def select(sections: Sequence[SectionData], wanted: handover_pb2.FetchRequest) -> list[SectionData]:
    """The components, layers and heads that `wanted` names, of whole sections; zero counts mean all."""
    chosen = []
    for section in sections:
        if wanted.components and section.component not in wanted.components:
            continue
        layers = _cut(section.layer_start, section.layer_count, wanted.layer_start, wanted.layer_count)
        heads = _cut(section.head_start, section.head_count, wanted.head_start, wanted.head_count)
        if layers.start >= layers.stop or heads.start >= heads.stop:
            continue
        chosen.append(
            replace(
                section,
                layer_start=section.layer_start + layers.start,
                layer_count=layers.stop - layers.start,
                head_start=section.head_start + heads.start,
                head_count=heads.stop - heads.start,
                payload=section.payload[layers, heads],
                scales=None if section.scales is None else section.scales[layers, heads],
                digests=section.digests[layers, heads],
            )
        )
    return chosen


def _cut(start: int, count: int, wanted_start: int, wanted_count: int) -> slice:
    """The wanted range within [start, start + count), as offsets from `start`."""
    end = start + count if wanted_count == 0 else min(start + count, wanted_start + wanted_count)
    return slice(max(0, wanted_start - start), end - start)


def why_malformed(wanted: handover_pb2.FetchRequest) -> str:
    """What is wrong with a request, as text; empty if nothing is."""
    if any(len(identity) != IDENTITY_BYTES for identity in wanted.identities):
        return f"an identity is not {IDENTITY_BYTES} bytes"
    if len(wanted.identities) > MAX_IDENTITIES:
        return f"{len(wanted.identities)} identities; at most {MAX_IDENTITIES} at once"
    if wanted.first_token % HASH_BLOCK_TOKENS:
        return f"first_token is {wanted.first_token}; must be a multiple of {HASH_BLOCK_TOKENS}"
    return ""


async def _parsed(request: bytes, context: ServerContext) -> handover_pb2.FetchRequest:
    try:
        wanted = handover_pb2.FetchRequest.FromString(request)
    except DecodeError:
        await _refuse(context, "not a FetchRequest")
        raise
    why = why_malformed(wanted)
    if why:
        await _refuse(context, why)
    return wanted


async def _refuse(context: Any, message: str) -> None:
    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, message)
