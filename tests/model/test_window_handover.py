"""Prompts of models with windows in some layers: handed over without what lies before the window, and continued.

The stores are full of NaN before, so a token that depends on anything that was left out is none.
"""

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
from twostroke.core.errors import KvCorrupted
from twostroke.core.request import Epoch
from twostroke.kv.handover.damage import verify_frame
from twostroke.kv.handover.frames import Frame, FrameLabel, decode_envelope, encode_frame
from twostroke.kv.handover.machine import Label
from twostroke.kv.section import HeldTokens
from twostroke.kv.slices import RankSlices
from twostroke.kv.spec import KvSpec
from twostroke.kv.store.store import KvStore
from twostroke.kv.windows import windows_from

KEY = 99  # of make_ranks
PROMPT = [(7 * i + i * i) % (VOCAB - 10) + 3 for i in range(300)]
FIRST = 192  # from here on windowed layers are needed: 256 - 20 + 1, rounded down


def with_blocks(ranks: Ranks, block_tokens: int) -> Ranks:
    """The same ranks, on stores of other physical blocks."""
    hands = []
    for hand in ranks.hands:
        store = KvStore(hand.store.spec, 65, block_tokens, digest_key=KEY)
        poison(store)
        hands.append(replace(hand, store=store))
    return Ranks(ranks.group, hands)


def held(ranks: Ranks, start: int, end: int) -> list[HeldTokens]:
    tables = [hand.table("p", len(PROMPT)) for hand in ranks.hands]
    return [HeldTokens(table, (1,) * len(table), start, end - start) for table in tables]


def prefilled(ranks: Ranks) -> int:
    """Compute and seal the prompt; returns the first token."""
    (logits,) = ranks.logits([("p", 0, PROMPT)])
    for hand, at in zip(ranks.hands, held(ranks, 0, len(PROMPT)), strict=True):
        hand.store.seal(at)
    return int(logits[-1].argmax())


def handed_over(prefill: Ranks, decode: Ranks, spec: KvSpec, first: int) -> int:
    """Send the prompt in two frames, the first one without the windowed layers; returns the bytes of both."""
    out, into = (RankSlices(spec, len(ranks.hands)) for ranks in (prefill, decode))
    num_bytes = 0
    for start, end in ((0, first), (first, len(PROMPT))):
        if start == end:
            continue
        without = end <= first
        parts = [
            out.packed(rank, hand.store.read_tokens(at, without_windows=without), end - start)
            for rank, (hand, at) in enumerate(zip(prefill.hands, held(prefill, start, end), strict=True))
        ]
        sections = out.joined(parts, end - start, without_windows=without)
        label = FrameLabel(Label("r", 0, Epoch(1, 1)), 1, b"", start, end - start)
        envelope = encode_frame(label, sections, is_last=not without)
        num_bytes += len(envelope)
        frame = decode_envelope(envelope)
        assert isinstance(frame, Frame)
        assert verify_frame(frame, KEY, spec, first)
        pieces = zip(decode.hands, held(decode, start, end), into.taken_apart(frame.sections), strict=True)
        for hand, at, own in pieces:
            hand.store.write_tokens(at, own)
            assert hand.store.verify(at)
    return num_bytes


def continued(ranks: Ranks, token: int, count: int) -> tuple[list[int], list[torch.Tensor]]:
    """Greedy tokens after the prompt and its first token, and the logits of each."""
    tokens, rows = [token], []
    for place in range(len(PROMPT), len(PROMPT) + count):
        (logits,) = ranks.logits([("p", place, tokens[-1:])])
        rows.append(logits[-1])
        tokens.append(int(logits[-1].argmax()))
    return tokens, rows


@pytest.mark.parametrize("pair", [(1, 1), (1, 2), (2, 1)], ids=lambda pair: f"{pair[0]} to {pair[1]}")
@pytest.mark.parametrize("name", ["gemma3", "gpt-oss"])
def test_a_prompt_goes_on_without_what_its_windows_do_not_see(
    name: str, pair: tuple[int, int], family_directory: Callable[[str], Path]
) -> None:
    path, (source, destination) = family_directory(name), pair
    codec = "fp8" if source == destination else "float32"
    spec = load_spec(path).kv_spec(codec)
    assert spec.main.windowed is not None
    first = windows_from(spec.main.windowed, 0, len(PROMPT))
    assert first == FIRST
    prefill = make_ranks(path, source, kv=codec)
    decode = with_blocks(make_ranks(path, destination, kv=codec), 64)
    token = prefilled(prefill)
    few = handed_over(prefill, decode, spec, first)
    tokens, rows = continued(decode, token, 12)
    expected, exactly = continued(prefill, token, 12)
    assert tokens == expected
    if source == destination:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(rows, exactly, strict=True)), "other bits"
    for hand, at in zip(decode.hands, held(decode, 0, FIRST), strict=True):
        with pytest.raises(KvCorrupted, match="without its windowed layers"):
            hand.store.read_tokens(at)
    whole = with_blocks(make_ranks(path, destination, kv=codec), 32)
    many = handed_over(prefill, whole, spec, 0)
    share = 1 - FIRST / len(PROMPT) * len(spec.main.windowed.layers) / spec.main.num_layers
    assert few < many * share * 1.02, f"{few} bytes instead of {many}: more than {share:.3f} of them"


def test_a_token_too_early_sees_what_is_not_there(family_directory: Callable[[str], Path]) -> None:
    """The test above can fail: with one more hash block left out, the next token differs or is none."""
    path = family_directory("gemma3")
    spec = load_spec(path).kv_spec("float32")
    prefill, decode = make_ranks(path, 1), with_blocks(make_ranks(path, 1), 16)
    token = prefilled(prefill)
    handed_over(prefill, decode, spec, 288)
    _, mine = continued(decode, token, 1)
    _, theirs = continued(prefill, token, 1)
    assert not torch.equal(mine[0], theirs[0])
    assert np.isfinite(mine[0].numpy()).all(), "what was left out is zeros"
