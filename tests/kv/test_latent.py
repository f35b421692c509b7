"""A cache of multi-head latent attention: two components of different widths, whole on every rank, handed over."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from twostroke.core.errors import KvCorrupted
from twostroke.core.request import Epoch
from twostroke.kernels.reference import store_kv
from twostroke.kv.block import BlockId
from twostroke.kv.handover.damage import covers, verify_frame
from twostroke.kv.handover.frames import Frame, FrameLabel, decode_envelope, encode_frame
from twostroke.kv.handover.machine import Label
from twostroke.kv.messages import spec_from_wire, spec_to_wire
from twostroke.kv.section import HeldTokens
from twostroke.kv.spec import CODEC_NAMES, COMPONENT_NUMBERS, mla_spec
from twostroke.kv.store.store import KvStore

LAYERS, LATENT, ROPE, KEY = 3, 24, 8, 0xBEEF
TOKENS = 43  # the last hash block is partial


def held_by(store: KvStore) -> HeldTokens:
    blocks = -(-TOKENS // store.block_tokens)
    table = [BlockId((5 * i + 3) % store.num_blocks) for i in range(blocks)]
    return HeldTokens(table, [7 + i for i in range(blocks)], 0, TOKENS)


def make_store(codec: str, block_tokens: int) -> KvStore:
    return KvStore(mla_spec(LAYERS, LATENT, ROPE, CODEC_NAMES[codec]), 16, block_tokens, digest_key=KEY)


def filled(codec: str, block_tokens: int) -> tuple[KvStore, HeldTokens]:
    store = make_store(codec, block_tokens)
    held, place = held_by(store), torch.arange(TOKENS)
    slots = torch.tensor(held.block_table)[place // block_tokens] * block_tokens + place % block_tokens
    for layer in range(LAYERS):
        generator = torch.Generator().manual_seed(layer)
        latent = torch.randn(TOKENS, 1, LATENT, generator=generator)
        rope = torch.randn(TOKENS, 1, ROPE, generator=generator)
        assert not store_kv(latent, rope, slots, *store.planes(layer)).non_finite.any()
    store.seal(held)
    return store, held


def frame_of(store: KvStore, held: HeldTokens) -> bytes:
    label = FrameLabel(Label("r", 0, Epoch(1, 1)), 1, b"n" * 16, held.start, held.count)
    return encode_frame(label, store.read_tokens(held), is_last=True)


def test_a_token_leaves_one_latent_and_one_rotary_row_per_layer() -> None:
    spec = mla_spec(LAYERS, LATENT, ROPE, CODEC_NAMES["fp8"])
    assert spec.bytes_per_token == LAYERS * (LATENT + 1 + ROPE + 1)
    assert [(c.name, c.heads, c.shard) for c in spec.main.components] == [
        ("latent", 1, "replicate"),
        ("rope", 1, "replicate"),
    ]
    assert spec_from_wire(spec_to_wire(spec)) == spec
    assert len(set(COMPONENT_NUMBERS.values())) == len(COMPONENT_NUMBERS)


@pytest.mark.parametrize("codec", ["fp8", "bfloat16", "float32"])
@pytest.mark.parametrize(("sender", "receiver"), [(16, 64), (32, 16)])
def test_both_components_arrive_through_a_frame_and_verify(codec: str, sender: int, receiver: int) -> None:
    source, held = filled(codec, sender)
    target = make_store(codec, receiver)
    frame = decode_envelope(frame_of(source, held))
    assert isinstance(frame, Frame)
    assert verify_frame(frame, KEY, target.spec)
    arrived = held_by(target)
    target.write_tokens(arrived, frame.sections)
    assert target.verify(arrived)
    for ours, theirs in zip(target.read_tokens(arrived), source.read_tokens(held), strict=True):
        assert ours.component == theirs.component
        assert np.array_equal(ours.payload, theirs.payload)
        assert np.array_equal(ours.digests, theirs.digests)


def test_one_flipped_bit_in_either_component_is_found() -> None:
    source, held = filled("fp8", 16)
    envelope = frame_of(source, held)
    frame = decode_envelope(envelope)
    assert isinstance(frame, Frame)
    start = len(envelope) - len(frame.planes)
    for section in frame.header.sections:
        damaged = bytearray(envelope)
        damaged[start + section.payload_offset + section.payload_bytes // 2] ^= 4
        torn = decode_envelope(bytes(damaged))
        assert isinstance(torn, Frame)
        assert not verify_frame(torn, KEY, source.spec)


def test_a_component_is_no_other_and_none_may_miss() -> None:
    source, held = filled("float32", 16)
    latent, rope = source.read_tokens(held)
    spec = source.spec
    assert covers([latent, rope], spec)
    assert not covers([latent], spec)
    assert not covers([latent, replace(rope, component="latent")], spec)
    with pytest.raises(KvCorrupted, match="rope"):
        make_store("float32", 16).write_tokens(held, [latent])
