"""Frames on their way: which envelopes are some, and damage to their planes wherever these are."""

from twostroke.kv.handover.plane_channel import RingPool
from twostroke.protos import handover_pb2 as pb

HEAD = 12  # magic, version, kind, length, checksum


def is_frame(envelope: bytes) -> bool:
    return envelope[3] == 2


def header_of(envelope: bytes) -> pb.FrameHeader:
    length = int.from_bytes(envelope[4:8], "little")
    return pb.FrameHeader.FromString(envelope[HEAD : HEAD + length])


def damaged(envelope: bytes, rings: RingPool | None) -> bytes:
    """The envelope with a flipped bit in its planes; planes in a slot of the only used ring are damaged there."""
    header = header_of(envelope)
    if not header.HasField("slot"):
        return envelope[:-5] + bytes([envelope[-5] ^ 0x40]) + envelope[-4:]
    (ring,) = rings.used
    ring.slot(header.slot)[header.slot_bytes - 5] ^= 0x40
    return envelope
