"""A prompt computed by workers of one TP size and continued by another: the tokens of one size alone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints.models import poison
from support.checkpoints.tiny_families import VOCAB
from support.engines.thread_group import Ranks, make_ranks

from twostroke.checkpoint.config_json import load_spec
from twostroke.core.request import Epoch
from twostroke.kv.handover.damage import verify_frame
from twostroke.kv.handover.frames import Frame, FrameLabel, decode_envelope, encode_frame
from twostroke.kv.handover.machine import Label
from twostroke.kv.section import HeldTokens, SectionData
from twostroke.kv.slices import RankSlices
from twostroke.kv.store.store import KvStore

KEY = 99  # of make_ranks
PAIRS = [(1, 2), (2, 1), (2, 4), (4, 2)]
PROMPT = [(7 * i + i * i) % (VOCAB - 10) + 3 for i in range(77)]  # ends inside a hash block
LABEL = FrameLabel(Label("r", 0, Epoch(1, 1)), 1, b"", 0, len(PROMPT))


def with_blocks(ranks: Ranks, block_tokens: int) -> Ranks:
    """The same ranks, on stores of other physical blocks."""
    hands = []
    for hand in ranks.hands:
        store = KvStore(hand.store.spec, 130, block_tokens, digest_key=KEY)
        poison(store)
        hands.append(replace(hand, store=store))
    return Ranks(ranks.group, hands)


def held(ranks: Ranks, name: str, count: int) -> list[HeldTokens]:
    tables = [hand.table(name, count) for hand in ranks.hands]
    return [HeldTokens(table, (1,) * len(table), 0, count) for table in tables]


def given(ranks: Ranks, slices: RankSlices, count: int) -> tuple[SectionData, ...]:
    """What leaves the endpoint of a worker."""
    each = zip(ranks.hands, held(ranks, "p", count), strict=True)
    parts = [slices.packed(rank, hand.store.read_tokens(at), count) for rank, (hand, at) in enumerate(each)]
    return slices.joined(parts, count)


def taken(ranks: Ranks, slices: RankSlices, sections: tuple[SectionData, ...], count: int) -> None:
    parts = zip(ranks.hands, held(ranks, "p", count), slices.taken_apart(sections), strict=True)
    for hand, at, own in parts:
        hand.store.write_tokens(at, own)
        assert hand.store.verify(at)


def prefilled(ranks: Ranks) -> int:
    """Compute and seal the prompt; returns the first token."""
    (logits,) = ranks.logits([("p", 0, PROMPT)])
    for hand, at in zip(ranks.hands, held(ranks, "p", len(PROMPT)), strict=True):
        hand.store.seal(at)
    return int(logits[-1].argmax())


def continued(ranks: Ranks, token: int, count: int) -> list[int]:
    """Greedy tokens after the prompt and its first token."""
    tokens = [token]
    for place in range(len(PROMPT), len(PROMPT) + count):
        (logits,) = ranks.logits([("p", place, tokens[-1:])])
        tokens.append(int(logits[-1].argmax()))
    return tokens


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0]} to {pair[1]}")
@pytest.mark.parametrize("codec", ["float32", "fp8"])
@pytest.mark.parametrize(
    "name",
    ["qwen3", "llama-linear", "deepseek-v2-lite", "ministral", "gpt-oss"],
    ids=["gqa", "mqa", "mla", "window", "sinks"],
)
def test_a_prompt_goes_on_at_another_tp_size(
    name: str, codec: str, pair: tuple[int, int], family_directory: Callable[[str], Path]
) -> None:
    path, (source, destination) = family_directory(name), pair
    prefill = make_ranks(path, source, kv=codec)
    decode = with_blocks(make_ranks(path, destination, kv=codec), 32)
    spec = load_spec(path).kv_spec(codec)
    out, into = RankSlices(spec, source), RankSlices(spec, destination)
    first = prefilled(prefill)
    sections = given(prefill, out, len(PROMPT))
    frame = decode_envelope(encode_frame(LABEL, sections, is_last=True))
    assert isinstance(frame, Frame)
    assert verify_frame(frame, KEY, spec)
    taken(decode, into, frame.sections, len(PROMPT))
    for before, after in zip(sections, given(decode, into, len(PROMPT)), strict=True):
        assert np.array_equal(before.payload, after.payload), "every byte of every head"
        assert (before.scales is None) == (after.scales is None)
        assert before.scales is None or np.array_equal(before.scales, after.scales)
        assert np.array_equal(before.digests, after.digests)
    tokens = continued(decode, first, 24)
    assert tokens == continued(prefill, first, 24)
    if codec == "float32":
        alone = make_ranks(path, destination, kv=codec)
        assert tokens == continued(alone, prefilled(alone), 24)


@pytest.mark.parametrize("wide", ["float32", "bfloat16", "fp8"])
def test_fp8_is_translated_exactly_and_not_quantised_again(wide: str, family_directory: Callable[[str], Path]) -> None:
    """From a prefill worker in fp8 to one in a wider codec, and back: the same numbers."""
    path = family_directory("qwen3")
    prefill = make_ranks(path, 2, kv="fp8")
    prefilled(prefill)
    specs = {codec: load_spec(path).kv_spec(codec) for codec in ("fp8", wide)}
    sections = given(prefill, RankSlices(specs["fp8"], 2), len(PROMPT))
    decode = with_blocks(make_ranks(path, 4, kv=wide), 64)
    taken(decode, RankSlices(specs[wide], 4), sections, len(PROMPT))
    back = make_ranks(path, 1, kv="fp8")
    taken(back, RankSlices(specs["fp8"], 1), given(decode, RankSlices(specs[wide], 4), len(PROMPT)), len(PROMPT))
    for before, after in zip(sections, given(back, RankSlices(specs["fp8"], 1), len(PROMPT)), strict=True):
        assert np.array_equal(values(before), values(after))


def values(section: SectionData) -> np.ndarray:
    """The numbers of an fp8 section."""
    rows = torch.from_numpy(section.payload.copy()).view(torch.float8_e4m3fn).double().numpy()
    assert section.scales is not None
    return rows * np.exp2(section.scales.astype(np.float64)[..., None] - 127)
