"""One envelope of every kind of the hand-over, made of fixed numbers, and the file that keeps them per release.

    python tests/kv/recorded_wire/record.py

Writes RELEASE.json: name -> the envelope in base64. The numbers come from a counter, so that a reader can make them
again and compare: what was recorded must mean the same for every later release.
"""

from __future__ import annotations

import base64
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np

from twostroke.core.request import Epoch
from twostroke.kv.codec import Codec, payload_bytes, scale_bytes
from twostroke.kv.digest import frame_digests, places
from twostroke.kv.handover.frames import FrameLabel, encode_frame, encode_message
from twostroke.kv.handover.machine import Label
from twostroke.kv.messages import spec_to_wire
from twostroke.kv.section import SectionData
from twostroke.kv.spec import attention_spec
from twostroke.protos import common_pb2
from twostroke.protos import handover_pb2 as pb

FOLDER = Path(__file__).parent
KEY = 0x5EED0123456789AB
LABEL = Label("request-ü", 1, Epoch(0xFEDCBA98, 5))
FRAMES = [(codec, tokens) for codec in Codec for tokens in (16, 20, 48)]
FETCHED = tuple(bytes([number]) * 16 for number in (1, 2))  # identities of Blocks.Fetch


def section(component: str, codec: Codec, tokens: int, start: int, heads: tuple[int, int] = (0, 2)) -> SectionData:
    """A sealed section of counted bytes: 3 layers, 8 numbers per row."""
    first_head, num_heads = heads
    shape = (3, num_heads, tokens)
    row_bytes = payload_bytes(codec, 8)
    counted = np.arange(int(np.prod(shape)) * row_bytes) + "kv".index(component)
    payload = (counted * 37 % 251).astype(np.uint8).reshape(*shape, row_bytes)
    scales = (np.arange(int(np.prod(shape))) % 200 + 20).astype(np.uint8).reshape(shape) if scale_bytes(codec) else None
    blocks = start // 16 + np.arange(-(-tokens // 16))
    of_heads = first_head + np.arange(num_heads)
    place = places(np.arange(3)[:, None, None], "kv".index(component), of_heads[:, None], blocks)
    digests = frame_digests(payload, scales, place, KEY, 16)
    return SectionData("main", component, 0, 3, first_head, num_heads, int(codec), row_bytes, payload, scales, digests)


def sections_of(codec: Codec, tokens: int) -> list[SectionData]:
    """The sections of a recorded frame, keys and values, from token 32 on."""
    return [section(component, codec, tokens, 32) for component in "kv"]


def two_ranks() -> list[SectionData]:
    """Sections of two ranks in one frame: a head each."""
    return [section(component, Codec.BF16, 32, 32, (head, 1)) for component in "kv" for head in (0, 1)]


def messages() -> dict[str, pb.HandoverUp | pb.HandoverDown]:
    """A message of every kind, its fields set to values that are no defaults."""
    memory = pb.SharedMemory(host=b"host", pid=7, descriptor=3, nonce=b"n" * 16, slots=4, slot_bytes=1 << 20)
    wanted = pb.Open(
        prompt_ids=range(100_000, 100_040),
        held_tokens=16,
        sampling=common_pb2.SamplingParams(temperature=0.5, top_k=40, seed=7, max_tokens=9, stop=["\n\n"]),
        isolation_domain="acme",
        adapter=b"\x01" * 16,
        kv_spec=spec_to_wire(attention_spec(3, 2, 8, int(Codec.FP8_E4M3))),
        numerics_class=b"class",
        deterministic=True,
        frame_slots=4,
        timeout_ms=5000,
        capabilities=["digest"],
        worker_id="decode-0",
        priority=3,
        emitted_tokens=2,
        identity_root=b"\x02" * 16,
        shared_memory=memory,
        required_transport="shm",
        tensor_parallel_size=2,
    )
    up = {
        "open": wanted,
        "bind": pb.Bind(),
        "not_yet": pb.NotYet(),
        "verified": pb.Verified(upto_token=64),
        "refetch": pb.Refetch(token_start=32, token_count=16, attempt=1),
        "slot_free": pb.SlotFree(count=2, slots=[0, 3]),
        "cancel": pb.Cancel(reason="the client left"),
        "up_beat": pb.HandoverBeat(),
    }
    down = {
        "started": pb.Started(cached_tokens=32, transport="grpc", transport_reason="another host"),
        "first_token": pb.FirstToken(token_id=17),
        "done": pb.Done(num_frames=3, bytes_sent=1 << 33),
        "failed": common_pb2.Error(code="unavailable", message="no block is free", retry_after_ms=500),
        "down_beat": pb.HandoverBeat(),
    }
    found: dict[str, pb.HandoverUp | pb.HandoverDown] = {}
    found |= {name: LABEL.up(number, body) for number, (name, body) in enumerate(up.items(), 1)}
    found |= {name: LABEL.down(number, body) for number, (name, body) in enumerate(down.items(), 1)}
    return found


def frame_label(tokens: int, identities: tuple[bytes, ...] = ()) -> FrameLabel:
    """Label of a recorded frame."""
    return FrameLabel(LABEL, 9, b"class", 32, tokens, identities)


def envelopes() -> dict[str, bytes]:
    """Every envelope by name, as the code of now writes it."""
    found = {name: encode_message(message) for name, message in messages().items()}
    for codec, tokens in FRAMES:
        label = frame_label(tokens)
        found[f"frame of {codec.name}, {tokens} tokens"] = encode_frame(label, sections_of(codec, tokens), is_last=True)
    found["frame of two ranks"] = encode_frame(frame_label(32), two_ranks(), is_last=False)
    found["fetched frame"] = encode_frame(frame_label(32, FETCHED), sections_of(Codec.FP8_E4M3, 32), is_last=False)
    return found


if __name__ == "__main__":
    path = FOLDER / f"{version('twostroke')}.json"
    texts = {name: base64.b64encode(envelope).decode() for name, envelope in envelopes().items()}
    path.write_text(json.dumps(texts, indent=1) + "\n")
    print(f"{path.name}: {len(texts)} envelopes, {path.stat().st_size:,} bytes")
