"""Envelopes and frames of the hand-over, as described in handover.proto. Knows bytes and shapes, no stream, no store.

    "TK" | version u8 | kind u8 | length u32 LE | crc32 u32 LE | protobuf bytes | zeros to 16 | raw planes (frames only)

A frame's planes are behind its header, or in a slot of shared memory (plane_channel.py) which the header names. The
checksum covers all bytes before the zeros except itself, because a flipped bit in FirstToken would be a wrong token.
Planes carry their digests. `decode_envelope` checks every length, offset and range of its input; malformed input
raises WireError and no other error. Arrays that it returns are views of the envelope or of the slot, not copies.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from ...protos import handover_pb2 as pb
from ...protos import worker_pb2
from ..block import IDENTITY_BYTES
from ..codec import Codec, payload_bytes, scale_bytes
from ..digest import U64
from ..section import PLANE_ALIGNMENT, SectionData
from ..spec import HASH_BLOCK_TOKENS, KvSpec
from .machine import Label
from .plane_channel import PlaneMemory, Planes, PlaneSlot

VERSION = 1
MAX_ENVELOPE_BYTES = 64 << 20
DEFAULT_FRAME_BYTES = 4 << 20

_MAGIC = b"TK"
_UP, _FRAME, _DOWN = 1, 2, 3  # kinds
_HEAD = struct.Struct("<2sBBI")
_CRC = struct.Struct("<I")
_ALIGN = PLANE_ALIGNMENT
_MAX_MESSAGE_BYTES = 16 << 20
_MAX_ROW_BYTES = 1 << 16
_MAX_LAYERS_OR_HEADS = 1 << 16
_MAX_TOKENS = HASH_BLOCK_TOKENS << 24  # the limit of digest places: 2**24 hash blocks
_MAX_SECTIONS = 4096
_DIGESTS = pb.Section.DESCRIPTOR.fields_by_name["digests"].number
_DIGESTS_TAG = bytes([_DIGESTS << 3 | 2])  # the field's number, and that it has a length
assert _DIGESTS < 16, "the tag has one byte"


class WireError(Exception):
    """Malformed bytes: cut off, damaged, or not written by a peer of this release."""


class FrameLabel(NamedTuple):
    """Hand-over and token range of a frame. For Blocks.Fetch the label is empty and `identities` are set."""

    label: Label
    sequence: int
    numerics_class: bytes
    token_start: int
    token_count: int
    identities: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """A well-formed frame. Its digests are not verified yet: `damage.verify_frame` does that."""

    header: pb.FrameHeader
    planes: memoryview
    sections: tuple[SectionData, ...]  # views of `planes`

    @property
    def slot(self) -> int | None:
        """Slot of shared memory that has the planes; None: they came with the header."""
        return self.header.slot if self.header.HasField("slot") else None


def tokens_per_frame(spec: KvSpec, max_bytes: int = DEFAULT_FRAME_BYTES) -> int:
    """Most tokens whose planes fit `max_bytes`: a multiple of 16, and at least 16 for any bound."""
    return max(1, max_bytes // (spec.bytes_per_token * HASH_BLOCK_TOKENS)) * HASH_BLOCK_TOKENS


def slot_bytes(spec: KvSpec, max_bytes: int = DEFAULT_FRAME_BYTES) -> int:
    """Size of a slot that holds a frame of `tokens_per_frame` tokens with the padding between its planes."""
    num_planes = 2 * len(spec.main.components)
    return tokens_per_frame(spec, max_bytes) * spec.bytes_per_token + num_planes * _ALIGN


def tokens_per_slot(spec: KvSpec, size: int) -> int:
    """Most tokens whose planes fit a slot of `size` bytes: a multiple of 16, or 0."""
    left = size - 2 * len(spec.main.components) * _ALIGN
    return max(0, left) // (spec.bytes_per_token * HASH_BLOCK_TOKENS) * HASH_BLOCK_TOKENS


# ------------------------------------------------------------------ out


def encode_message(message: pb.HandoverUp | pb.HandoverDown) -> bytes:
    """Encode a control message as an envelope."""
    body = message.SerializeToString()
    return _start(_UP if isinstance(message, pb.HandoverUp) else _DOWN, body) + body


def encode_frame(
    label: FrameLabel, sections: Sequence[SectionData], *, is_last: bool, slot: PlaneSlot | None = None
) -> bytes:
    """Encode a frame as an envelope. All sections have `label.token_count` tokens.

    With a `slot`, its memory receives the planes, and planes that lie at their place in it already are not copied.
    """
    header, planes = _laid_out(label, sections, is_last, slot)
    if slot is not None:
        header.slot, header.slot_bytes = slot.number, planes.num_bytes
    body = header.SerializeToString()
    start = _start(_FRAME, body)
    if slot is not None:
        return start + body
    return b"".join([start, body, bytes(-(len(start) + len(body)) % _ALIGN), *planes.parts])


class FrameApart:
    """A frame whose planes travel apart from its header, by a paired channel, which takes them before it is encoded."""

    def __init__(self, label: FrameLabel, sections: Sequence[SectionData], *, is_last: bool) -> None:
        self._header, planes = _laid_out(label, sections, is_last, None)
        self.planes: Planes = planes.parts
        self.num_bytes = planes.num_bytes

    def encode(self, transfer: int | None) -> bytes:
        """The envelope. `transfer`: number of the transfer that brings the planes; None: they follow their header."""
        if transfer is not None:
            self._header.transfer, self._header.slot_bytes = transfer, self.num_bytes
        body = self._header.SerializeToString()
        start = _start(_FRAME, body)
        if transfer is not None:
            return start + body
        return b"".join([start, body, bytes(-(len(start) + len(body)) % _ALIGN), *self.planes])


def _laid_out(
    label: FrameLabel, sections: Sequence[SectionData], is_last: bool, slot: PlaneSlot | None
) -> tuple[pb.FrameHeader, _Planes]:
    """A frame's header, which does not say yet where the planes are, and the planes."""
    mine = label.label
    header = pb.FrameHeader(
        request_id=mine.request_id,
        choice=mine.choice,
        epoch=worker_pb2.Epoch(incarnation=mine.epoch.incarnation, counter=mine.epoch.counter),
        sequence=label.sequence,
        numerics_class=label.numerics_class,
        token_start=label.token_start,
        token_count=label.token_count,
        identities=label.identities,
        last=is_last,
    )
    planes = _Planes() if slot is None else _SlotPlanes(slot.memory)
    for section in sections:
        shape = (section.layer_count, section.head_count, label.token_count, section.row_bytes)
        assert section.payload.shape == shape, f"payload {section.payload.shape}, not {shape}"
        message = header.sections.add(
            group=section.group,
            component=section.component,
            layer_start=section.layer_start,
            layer_count=section.layer_count,
            head_start=section.head_start,
            head_count=section.head_count,
            codec=section.codec,
            row_bytes=section.row_bytes,
            payload_offset=planes.append(section.payload),
            payload_bytes=section.payload.nbytes,
        )
        message.MergeFromString(_packed(section.digests))
        if section.scales is not None:
            message.scale_offset = planes.append(section.scales)
            message.scale_bytes = section.scales.nbytes
    return header, planes


def _packed(digests: U64) -> bytes:
    """The field Section.digests on the wire (packed fixed64): ten times as fast as setting it number by number."""
    raw, size = digests.astype("<u8", copy=False).tobytes(), bytearray()
    left = len(raw)
    while left > 0x7F:
        size.append(left & 0x7F | 0x80)
        left >>= 7
    size.append(left)
    return _DIGESTS_TAG + bytes(size) + raw


class _Planes:
    """Planes in sequence, each aligned to 16 bytes."""

    def __init__(self) -> None:
        self.parts: list[bytes | memoryview] = []
        self.num_bytes = 0

    def append(self, plane: NDArray[np.uint8]) -> int:
        """Add a plane; returns its offset in bytes."""
        padding = -self.num_bytes % _ALIGN
        offset = self.num_bytes + padding
        self.num_bytes = offset + plane.nbytes
        self._put(padding, plane, offset)
        return offset

    def _put(self, padding: int, plane: NDArray[np.uint8], offset: int) -> None:
        self.parts += [bytes(padding), np.ascontiguousarray(plane).data.cast("B")]


class _SlotPlanes(_Planes):
    """The same in a slot: the padding is not written, and not sent."""

    def __init__(self, memory: memoryview) -> None:
        super().__init__()
        self._memory = np.frombuffer(memory, np.uint8)

    def _put(self, padding: int, plane: NDArray[np.uint8], offset: int) -> None:
        target = self._memory[offset : self.num_bytes].reshape(plane.shape)
        if target.ctypes.data != plane.ctypes.data or not plane.flags.c_contiguous:
            assert not np.may_share_memory(self._memory, plane), "a plane at another place of its slot"
            target[...] = plane


def _start(kind: int, body: bytes) -> bytes:
    head = _HEAD.pack(_MAGIC, VERSION, kind, len(body))
    return head + _CRC.pack(zlib.crc32(body, zlib.crc32(head)))


# ------------------------------------------------------------------ in


def transfer_of(envelope: bytes) -> pb.FrameHeader | None:
    """The header of a frame whose planes travel by a paired channel; None: it is none, or malformed."""
    try:
        kind, body, _ = _opened(envelope)
        header = pb.FrameHeader.FromString(body) if kind == _FRAME else None
    except (WireError, DecodeError):
        return None
    return header if header is not None and header.transfer else None


def decode_envelope(
    envelope: bytes,
    max_bytes: int = MAX_ENVELOPE_BYTES,
    memory: PlaneMemory | None = None,
    planes: memoryview | None = None,
) -> pb.HandoverUp | pb.HandoverDown | Frame:
    """Decode one envelope to its control message or frame.

    `memory`: the ring that both sides agreed on; None: planes must be in the envelope. `planes`: what the transfer
    that the header names has brought.

    Raises:
        WireError: the envelope is cut off, damaged, too large, or of another version.
    """
    if len(envelope) > max_bytes:
        raise WireError(f"{len(envelope)} bytes; at most {max_bytes}")
    kind, body, end = _opened(envelope)
    try:
        if kind == _FRAME:
            header = pb.FrameHeader.FromString(body)
            is_apart = header.HasField("slot") or bool(header.transfer)
            if is_apart and end != len(envelope):
                raise WireError(f"{len(envelope) - end} bytes after the header of planes that travel apart")
            if header.transfer:
                return _frame(header, _brought(header, planes))
            return _frame(header, _slot(header, memory) if is_apart else _planes(envelope, end))
        message = (pb.HandoverUp if kind == _UP else pb.HandoverDown).FromString(body)
    except DecodeError as error:
        raise WireError(f"no protobuf message: {error}") from None
    if end != len(envelope):
        raise WireError(f"{len(envelope) - end} bytes after the message")
    if message.WhichOneof("body") is None:
        raise WireError("a message without a body")
    return message


def _opened(envelope: bytes) -> tuple[int, bytes, int]:
    """Kind, protobuf bytes, and the offset of their end."""
    first = _HEAD.size + _CRC.size
    if len(envelope) < first:
        raise WireError(f"{len(envelope)} bytes are no envelope")
    magic, version, kind, length = _HEAD.unpack_from(envelope)
    if magic != _MAGIC:
        raise WireError(f"the envelope begins with {magic!r}")
    if version != VERSION:
        raise WireError(f"version {version}; this release speaks {VERSION}")
    if kind not in (_UP, _FRAME, _DOWN):
        raise WireError(f"kind {kind}")
    if length > _MAX_MESSAGE_BYTES or first + length > len(envelope):
        raise WireError(f"a message of {length} bytes in an envelope of {len(envelope)}")
    body = envelope[first : first + length]
    if zlib.crc32(body, zlib.crc32(envelope[: _HEAD.size])) != _CRC.unpack_from(envelope, _HEAD.size)[0]:
        raise WireError("the checksum does not hold")
    return kind, body, first + length


def _planes(envelope: bytes, end: int) -> memoryview:
    start = end + -end % _ALIGN
    if len(envelope) < start or any(envelope[end:start]):
        raise WireError("no zeros between header and planes")
    return memoryview(envelope)[start:]


def _brought(header: pb.FrameHeader, planes: memoryview | None) -> memoryview:
    if planes is None or header.HasField("slot"):
        raise WireError("planes of a paired channel, which was not agreed on")
    if header.slot_bytes != len(planes):
        raise WireError(f"transfer {header.transfer} brought {len(planes)} bytes, not {header.slot_bytes}")
    return planes.toreadonly()


def _slot(header: pb.FrameHeader, memory: PlaneMemory | None) -> memoryview:
    if memory is None:
        raise WireError("planes in shared memory, which was not agreed on")
    if header.slot >= memory.slots or header.slot_bytes > memory.slot_bytes:
        raise WireError(f"{header.slot_bytes} bytes in slot {header.slot} of {memory.slots}")
    return memory.slot(header.slot)[: header.slot_bytes].toreadonly()


def _frame(header: pb.FrameHeader, planes: memoryview) -> Frame:
    tokens, stop = header.token_count, header.token_start + header.token_count
    if tokens < 1 or header.token_start % HASH_BLOCK_TOKENS or stop > _MAX_TOKENS:
        raise WireError(f"tokens [{header.token_start}, {stop})")
    if any(len(identity) != IDENTITY_BYTES for identity in header.identities):
        raise WireError(f"an identity is not {IDENTITY_BYTES} bytes")
    if len(header.identities) > tokens // HASH_BLOCK_TOKENS:
        raise WireError(f"{len(header.identities)} identities for {tokens} tokens")
    if not 0 < len(header.sections) <= _MAX_SECTIONS:
        raise WireError(f"{len(header.sections)} sections")
    extents = [extent for section in header.sections for extent in _extents(section, tokens)]
    _check_layout(extents, len(planes))
    sections = tuple(_section(section, tokens, planes) for section in header.sections)
    _check_overlap(sections)
    return Frame(header, planes, sections)


def _extents(section: pb.Section, tokens: int) -> list[tuple[int, int]]:
    """Check a section's numbers; returns (offset, size) of each of its planes, in bytes."""
    layers, heads = section.layer_count, section.head_count
    for start, count in ((section.layer_start, layers), (section.head_start, heads)):
        if count < 1 or start + count > _MAX_LAYERS_OR_HEADS:
            raise WireError(f"layers or heads [{start}, {start + count})")
    if section.codec not in Codec._value2member_map_:
        raise WireError(f"codec {section.codec}")
    codec = Codec(section.codec)
    if not 0 < section.row_bytes <= _MAX_ROW_BYTES or section.row_bytes % payload_bytes(codec, 1):
        raise WireError(f"rows of {section.row_bytes} bytes in {codec.name}")
    rows = layers * heads * tokens
    if section.payload_bytes != rows * section.row_bytes or section.scale_bytes != rows * scale_bytes(codec):
        raise WireError(f"{section.payload_bytes} and {section.scale_bytes} bytes for {rows} rows in {codec.name}")
    if len(section.digests) != layers * heads * _units(tokens):
        raise WireError(f"{len(section.digests)} digests for {tokens} tokens of {layers} layers and {heads} heads")
    payload = (section.payload_offset, section.payload_bytes)
    return [payload, (section.scale_offset, section.scale_bytes)] if section.scale_bytes else [payload]


def _check_layout(extents: list[tuple[int, int]], num_bytes: int) -> None:
    """Check that planes are aligned, separated by padding only, and fill the envelope."""
    ordered = sorted(extents)
    end = 0
    for offset, size in ordered:
        if offset != end + -end % _ALIGN:
            raise WireError(f"a plane at {offset}; the one before ends at {end}")
        end = offset + size
    if end != num_bytes:
        raise WireError(f"planes of {end} bytes in {num_bytes}")


def _check_overlap(sections: Sequence[SectionData]) -> None:
    """Check that the sections of a component form a grid of layers and heads, so that no row occurs twice."""
    by_component: dict[tuple[str, str], list[SectionData]] = {}
    for section in sections:
        by_component.setdefault((section.group, section.component), []).append(section)
    for parts in by_component.values():
        parts.sort(key=lambda s: (s.layer_start, s.head_start))
        for one, other in pairwise(parts):
            same_layers = (one.layer_start, one.layer_count) == (other.layer_start, other.layer_count)
            if same_layers and one.head_start + one.head_count <= other.head_start:
                continue
            if one.layer_start + one.layer_count <= other.layer_start:
                continue
            raise WireError(f"sections of {one.component} overlap, or are no grid")


def _section(section: pb.Section, tokens: int, planes: memoryview) -> SectionData:
    shape = (section.layer_count, section.head_count, tokens)
    payload = np.frombuffer(planes, np.uint8, section.payload_bytes, section.payload_offset)
    scales = None
    if section.scale_bytes:
        scales = np.frombuffer(planes, np.uint8, section.scale_bytes, section.scale_offset).reshape(shape)
    return SectionData(
        group=section.group,
        component=section.component,
        layer_start=section.layer_start,
        layer_count=section.layer_count,
        head_start=section.head_start,
        head_count=section.head_count,
        codec=section.codec,
        row_bytes=section.row_bytes,
        payload=payload.reshape(*shape, section.row_bytes),
        scales=scales,
        digests=np.array(section.digests, np.uint64).reshape(*shape[:2], _units(tokens)),
    )


def _units(tokens: int) -> int:
    return -(-tokens // HASH_BLOCK_TOKENS)
