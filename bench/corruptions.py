"""Damaged frames of every kind, and clean ones: is every damage detected before use, and no clean block refused?

A frame is made as a prefill worker makes it (planes, seals, envelope), damaged behind its seals or on its way, and
judged as a decode worker judges it: envelope, layout, digests, completeness. A damage that changes no byte of KV is
drawn again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
from report import machine, save, table

from twostroke.core.request import Epoch
from twostroke.kernels.cpu import library as native
from twostroke.kernels.cpu.build import NativeUnavailable
from twostroke.kv.codec import U8, Codec, payload_bytes, scale_bytes
from twostroke.kv.digest import places
from twostroke.kv.frame_digest import section_digests
from twostroke.kv.handover.damage import verify_frame
from twostroke.kv.handover.frames import Frame, FrameLabel, WireError, decode_envelope, encode_frame
from twostroke.kv.handover.machine import Label
from twostroke.kv.section import SectionData
from twostroke.kv.spec import COMPONENT_NUMBERS, HASH_BLOCK_TOKENS, KvSpec, attention_spec, mla_spec

KEY = 0x9E3779B97F4A7C15
SPECS = (
    attention_spec(4, 2, 64, Codec.FP8_E4M3),
    attention_spec(2, 4, 32, Codec.BF16),
    attention_spec(3, 1, 16, Codec.FP32),
    mla_spec(2, 64, 16, Codec.BF16),
)
SMALL = attention_spec(1, 1, 8, Codec.FP8_E4M3)  # of the clean blocks: many of them in little memory
CLEAN_BLOCKS_PER_FRAME = 4096
LABEL = Label("r", 0, Epoch(1, 1))
KINDS = (
    "bit", "byte", "rows swapped", "blocks swapped", "stale block", "wrong scale", "wrong layer", "wrong head",
    "truncated", "bit on the way",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Made:
    """A frame, with an older content of the same place."""

    spec: KvSpec
    token_start: int
    token_count: int
    sections: tuple[SectionData, ...]
    older: tuple[SectionData, ...]

    def envelope(self, sections: tuple[SectionData, ...]) -> bytes:
        """The frame with these sections."""
        label = FrameLabel(LABEL, 1, b"class", self.token_start, self.token_count)
        return encode_frame(label, sections, is_last=False)


def make(spec: KvSpec, token_start: int, token_count: int, rng: np.random.Generator) -> Made:
    """A frame of random planes with their seals."""
    return Made(
        spec,
        token_start,
        token_count,
        _sections(spec, token_start, token_count, rng),
        _sections(spec, token_start, token_count, rng),
    )


def _sections(spec: KvSpec, start: int, count: int, rng: np.random.Generator) -> tuple[SectionData, ...]:
    found = []
    layers = spec.main.num_layers
    blocks = start // HASH_BLOCK_TOKENS + np.arange(-(-count // HASH_BLOCK_TOKENS))
    for part in spec.main.components:
        codec = Codec(part.codec)
        width = payload_bytes(codec, part.width)
        payload = rng.integers(0, 256, (layers, part.heads, count, width), np.uint8)
        scales = rng.integers(11, 247, (layers, part.heads, count), np.uint8) if scale_bytes(codec) else None
        heads = np.arange(part.heads)
        place = places(np.arange(layers)[:, None, None], COMPONENT_NUMBERS[part.name], heads[:, None], blocks)
        seals = section_digests(payload, scales, place, KEY)
        found.append(SectionData("main", part.name, 0, layers, 0, part.heads, codec, width, payload, scales, seals))
    return tuple(found)


def accepted(made: Made, envelope: bytes) -> tuple[SectionData, ...] | None:
    """Sections that a decode worker would store; None: the damage was detected."""
    try:
        frame = decode_envelope(envelope)
    except WireError:
        return None
    if not isinstance(frame, Frame) or not verify_frame(frame, KEY, made.spec):
        return None
    header = frame.header
    place = (header.token_start, header.token_count, Label.of(header))
    return frame.sections if place == (made.token_start, made.token_count, LABEL) else None


def is_same(one: tuple[SectionData, ...], other: tuple[SectionData, ...]) -> bool:
    """True if two frames store the same bytes in the same places."""
    return len(one) == len(other) and all(
        (a.component, a.layer_start, a.head_start) == (b.component, b.layer_start, b.head_start)
        and np.array_equal(a.payload, b.payload)
        and (a.scales is None or np.array_equal(a.scales, b.scales))
        for a, b in zip(one, other, strict=True)
    )


def damaged(made: Made, kind: str, rng: np.random.Generator) -> bytes:
    """The envelope of a frame with one damage; it may be one that changes nothing."""
    if kind in ("truncated", "bit on the way"):
        envelope = made.envelope(made.sections)
        at = int(rng.integers(len(envelope)))
        if kind == "truncated":
            return envelope[:at]
        return envelope[:at] + bytes([envelope[at] ^ (1 << int(rng.integers(8)))]) + envelope[at + 1 :]
    which = int(rng.integers(len(made.sections)))
    section = made.sections[which]
    payload = section.payload.copy()
    scales = None if section.scales is None else section.scales.copy()
    _spoil(payload, scales, made.older[which].payload, kind, rng)
    changed = replace(section, payload=payload, scales=scales)
    return made.envelope((*made.sections[:which], changed, *made.sections[which + 1 :]))


def _spoil(payload: U8, scales: U8 | None, older: U8, kind: str, rng: np.random.Generator) -> None:
    layers, heads, tokens, width = payload.shape
    layer, head, token = (int(rng.integers(n)) for n in (layers, heads, tokens))
    first = token - token % HASH_BLOCK_TOKENS
    block = slice(first, first + HASH_BLOCK_TOKENS)
    if kind == "bit":
        payload[layer, head, token, rng.integers(width)] ^= 1 << int(rng.integers(8))
    elif kind == "byte":
        payload[layer, head, token, rng.integers(width)] = rng.integers(256)
    elif kind == "rows swapped":
        other = int(rng.integers(tokens))
        payload[layer, head, [token, other]] = payload[layer, head, [other, token]]
    elif kind == "blocks swapped":
        other = int(rng.integers(tokens // HASH_BLOCK_TOKENS)) * HASH_BLOCK_TOKENS
        count = min(HASH_BLOCK_TOKENS, tokens - first)
        mine = payload[layer, head, first : first + count].copy()
        payload[layer, head, first : first + count] = payload[layer, head, other : other + count]
        payload[layer, head, other : other + count] = mine
    elif kind == "stale block":
        payload[:, :, block] = older[:, :, block]
    elif kind == "wrong scale" and scales is not None:
        scales[layer, head, token] = rng.integers(11, 247)
    elif kind == "wrong layer":
        payload[[layer, layer - 1], head, block] = payload[[layer - 1, layer], head, block]
    elif kind == "wrong head":
        payload[layer, [head, head - 1], block] = payload[layer, [head - 1, head], block]


def corruptions(count: int, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """Damage `count` frames; returns the number of each kind, and what was not detected."""
    rng = np.random.default_rng(seed)
    done: Counter[str] = Counter()
    missed: list[str] = []
    pool: list[Made] = []
    while done.total() < count:
        if done.total() % 50 == 0:  # new frames, or the first ones
            pool = [make(spec, 16 * int(rng.integers(1000)), int(rng.integers(17, 81)), rng) for spec in SPECS]
        made = pool[int(rng.integers(len(pool)))]
        kind = KINDS[done.total() % len(KINDS)]
        stored = accepted(made, damaged(made, kind, rng))
        if stored is not None and is_same(stored, made.sections):
            continue  # it changed nothing, such as a byte of padding
        done[kind] += 1
        if stored is not None:
            missed.append(f"{kind} of tokens {made.token_start}+{made.token_count}, number {done.total()}")
        if sys.stderr.isatty() and done.total() % 1000 == 0:
            print(f"\r{done.total()} damaged frames", end="", file=sys.stderr)
    return done, missed


def clean(num_blocks: int, seed: int = 1) -> tuple[int, int]:
    """Judge clean blocks; returns how many there were and how many were refused."""
    rng = np.random.default_rng(seed)
    judged = refused = 0
    while judged < num_blocks:
        tokens = CLEAN_BLOCKS_PER_FRAME * HASH_BLOCK_TOKENS
        start = HASH_BLOCK_TOKENS * int(rng.integers(1 << 20))
        sections = _sections(SMALL, start, tokens, rng)
        made = Made(SMALL, start, tokens, sections, sections)
        stored = accepted(made, made.envelope(made.sections))
        judged += CLEAN_BLOCKS_PER_FRAME
        if stored is None or not is_same(stored, made.sections):
            refused += 1
        if sys.stderr.isatty():
            print(f"\r{judged} clean blocks", end="", file=sys.stderr)
    return judged, refused


def main() -> None:
    """Run both, print and save the figures; exit code 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corruptions", type=int, default=100_000)
    parser.add_argument("--clean-blocks", type=int, default=10_000_000)
    arguments = parser.parse_args()
    try:
        native.load()
    except NativeUnavailable as reason:
        print(f"digests in numpy: {reason}", file=sys.stderr)
    began_s, facts = time.perf_counter(), machine()
    done, missed = corruptions(arguments.corruptions)
    judged, refused = clean(arguments.clean_blocks)
    rows = [[kind, str(done[kind])] for kind in KINDS]
    rows += [["all damages", str(done.total())], ["not detected", str(len(missed))]]
    rows += [["clean blocks", str(judged)], ["refused", str(refused)]]
    body = table(["what", "number"], rows)
    print(f"\n{body}\n{time.perf_counter() - began_s:.0f} s")
    data = {"damaged": dict(done), "missed": missed, "clean_blocks": judged, "refused": refused}
    save("corruptions", "Damaged and clean frames", body, data, facts)
    sys.exit(1 if missed or refused else 0)


if __name__ == "__main__":
    main()
