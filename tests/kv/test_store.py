"""The block store: what is written is what is sealed, read, sent and found damaged."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from twostroke.core.errors import KvCorrupted
from twostroke.kernels.reference import store_kv
from twostroke.kv.block import BlockId
from twostroke.kv.codec import Codec, decode
from twostroke.kv.digest import frame_digests, places
from twostroke.kv.section import HeldTokens, SectionData
from twostroke.kv.spec import attention_spec, codec_ids
from twostroke.kv.store.store import KvStore

LAYERS, HEADS, WIDTH, KEY = 2, 3, 16, 0xC0FFEE
CODECS = ["fp8", "int8_channel", "bfloat16", "float32"]


def make_store(codec: str = "fp8", block_tokens: int = 16, num_blocks: int = 24) -> KvStore:
    spec = attention_spec(LAYERS, HEADS, WIDTH, *codec_ids(codec))
    store = KvStore(spec, num_blocks, block_tokens, digest_key=KEY)
    for component in store.components:
        component.payload.fill_(0xFF)  # what nobody wrote must never come out
    return store


def scattered(store: KvStore, tokens: int, start: int = 0, count: int | None = None) -> HeldTokens:
    blocks = -(-tokens // store.block_tokens)
    table = [BlockId((5 * i + 3) % store.num_blocks) for i in range(blocks)]
    return HeldTokens(table, [10 + i for i in range(blocks)], start, tokens - start if count is None else count)


def rows(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, tokens, HEADS, WIDTH, generator=generator)
    return k, v


def write_rows(store: KvStore, held: HeldTokens, seed: int = 0) -> None:
    """Write the tokens of `held` in every layer, as the step does, with one row of padding."""
    place = torch.arange(held.start, held.end)
    table = torch.tensor(held.block_table)
    slots = table[place // store.block_tokens] * store.block_tokens + place % store.block_tokens
    slots = torch.cat((slots, torch.tensor([-1])))
    for layer in range(LAYERS):
        k, v = rows(held.end + 1, seed + layer)
        picked = torch.cat((place, torch.tensor([0])))
        assert not store_kv(k[picked], v[picked], slots, *store.planes(layer)).non_finite.any()


def filled(store: KvStore, tokens: int, seed: int = 0) -> HeldTokens:
    held = scattered(store, tokens)
    write_rows(store, held, seed)
    store.seal(held)
    return held


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("block_tokens", [16, 32, 64])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 65, 130])
def test_reads_back_what_was_written_with_digests_that_hold(codec: str, block_tokens: int, tokens: int) -> None:
    store = make_store(codec, block_tokens)
    held = filled(store, tokens)
    assert store.verify(held)
    sections = store.read_tokens(held)
    assert [section.component for section in sections] == ["k", "v"]
    for number, section in enumerate(sections):
        expected = torch.stack([rows(tokens + 1, layer)[number][:tokens] for layer in range(LAYERS)]).transpose(1, 2)
        got = decode(section.payload, section.scales, Codec(section.codec))
        rounding = {"fp8": 2.0**-4, "int8_channel": 0.5, "bfloat16": 2.0**-8, "float32": 0.0}[codec]
        assert np.allclose(got, expected.numpy(), rtol=rounding, atol=rounding / 16)
        words = places(np.arange(LAYERS)[:, None, None], number, np.arange(HEADS)[:, None], np.arange(-(-tokens // 16)))
        assert np.array_equal(section.digests, frame_digests(section.payload, section.scales, words, KEY, 16))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("from_tokens", "to_tokens"), [(16, 64), (64, 16), (32, 32)])
def test_travels_between_block_sizes_with_its_seals(codec: str, from_tokens: int, to_tokens: int) -> None:
    source, target = make_store(codec, from_tokens), make_store(codec, to_tokens)
    held = filled(source, 70)
    arrived = scattered(target, 70)
    for start, count in ((0, 48), (48, 22)):
        part = replace(held, start=start, count=count)
        target.write_tokens(replace(arrived, start=start, count=count), source.read_tokens(part))
    assert target.verify(arrived)
    for ours, theirs in zip(target.read_tokens(arrived), source.read_tokens(held), strict=True):
        assert np.array_equal(ours.payload, theirs.payload)
        assert np.array_equal(ours.digests, theirs.digests)


def test_puts_slices_of_layers_and_heads_together_and_refuses_when_one_is_missing() -> None:
    source, target = make_store(), make_store()
    held = filled(source, 40)
    arrived = scattered(target, 40)
    parts = [
        _cut(section, layer, heads)
        for section in source.read_tokens(held)
        for layer in range(LAYERS)
        for heads in (slice(0, 1), slice(1, HEADS))
    ]
    with pytest.raises(KvCorrupted, match="layer-heads"):
        target.write_tokens(arrived, parts[1:])
    with pytest.raises(KvCorrupted, match="not sealed"):
        target.read_tokens(arrived)
    target.write_tokens(arrived, parts)
    assert target.verify(arrived)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_ranks_seals_are_those_of_its_heads_in_the_whole_model(rank: int) -> None:
    whole = make_store()
    held = filled(whole, 40)
    store = KvStore(whole.spec.of_rank(rank, 3), whole.num_blocks, whole.block_tokens, digest_key=KEY)
    for mine, theirs in zip(store.components, whole.components, strict=True):
        mine.payload.copy_(theirs.payload[:, :, rank : rank + 1])
        mine.scales.copy_(theirs.scales[:, :, rank : rank + 1])
    store.seal(held)
    for mine, theirs in zip(store.read_tokens(held), whole.read_tokens(held), strict=True):
        assert np.array_equal(mine.digests, theirs.digests[:, rank : rank + 1])


def _cut(section: SectionData, layer: int, heads: slice) -> SectionData:
    layers = slice(layer, layer + 1)
    return replace(
        section,
        layer_start=layer,
        layer_count=1,
        head_start=heads.start,
        head_count=heads.stop - heads.start,
        payload=section.payload[layers, heads],
        scales=None if section.scales is None else section.scales[layers, heads],
        digests=section.digests[layers, heads],
    )


TRANSLATED = [
    ("fp8", "bfloat16"),
    ("fp8", "float32"),
    ("int8_channel", "bfloat16"),
    ("fp8_e5m2/int8", "bfloat16/float32"),
    ("bfloat16", "fp8"),
]


@pytest.mark.parametrize(("theirs", "ours"), TRANSLATED)
def test_translates_another_codec_and_seals_anew(theirs: str, ours: str) -> None:
    source, target = make_store(theirs), make_store(ours)
    held = filled(source, 37)
    target.write_tokens(held, source.read_tokens(held))
    assert target.verify(held)
    for sent, kept in zip(source.read_tokens(held), target.read_tokens(held), strict=True):
        a = decode(sent.payload, sent.scales, Codec(sent.codec))
        b = decode(kept.payload, kept.scales, Codec(kept.codec))
        assert np.array_equal(a, b) if theirs != "bfloat16" else np.allclose(b, a, rtol=2.0**-4, atol=2.0**-8)


@pytest.mark.parametrize("number", [np.inf, np.nan])
def test_a_number_that_is_not_finite_is_not_translated(number: float) -> None:
    source, target = make_store("float32"), make_store("fp8")
    held = filled(source, 16)
    sections = source.read_tokens(held)
    sections[1].payload.view(np.float32)[1, 2, 7, 3] = number
    with pytest.raises(KvCorrupted, match="not finite"):
        target.write_tokens(held, sections)
    assert not target.is_sealed(held)


@pytest.mark.parametrize("codec", CODECS)
def test_finds_one_flipped_bit_anywhere(codec: str) -> None:
    store = make_store(codec, 32)
    held = filled(store, 45)
    chooser = np.random.default_rng(1)
    planes = [c.payload_view for c in store.components]
    planes += [c.scales_view for c in store.components if c.scales_view is not None]
    for _ in range(60):
        plane = planes[chooser.integers(len(planes))]
        token = int(chooser.integers(held.end))
        at = [int(chooser.integers(LAYERS)), held.block_table[token // 32], int(chooser.integers(HEADS)), token % 32]
        at += [int(chooser.integers(plane.shape[4]))] if plane.ndim == 5 else []
        bit = np.uint8(1 << int(chooser.integers(8)))
        plane[tuple(at)] ^= bit
        assert not store.verify(held)
        plane[tuple(at)] ^= bit
    assert store.verify(held)


def test_a_reused_block_is_not_taken_for_its_earlier_use() -> None:
    store = make_store()
    held = filled(store, 32)
    reused = replace(held, generations=[g + 1 for g in held.generations])
    assert not store.verify(reused)
    with pytest.raises(KvCorrupted, match="not sealed for this use"):
        store.read_tokens(reused)


def test_unsealed_tokens_are_not_read() -> None:
    store = make_store()
    held = scattered(store, 32)
    write_rows(store, held)
    store.seal(replace(held, count=16))
    assert not store.verify(held)
    with pytest.raises(KvCorrupted):
        store.read_tokens(held)
    assert len(store.read_tokens(replace(held, count=16))) == 2


def test_tokens_behind_a_sealed_tail_are_not_sealed_with_it() -> None:
    store = make_store()
    held = scattered(store, 32)
    write_rows(store, held)
    store.seal(replace(held, count=20))
    assert store.is_sealed(replace(held, count=20))
    assert not store.is_sealed(replace(held, count=21))
    with pytest.raises(KvCorrupted, match="not sealed"):
        store.read_tokens(replace(held, start=16, count=16))


def test_a_sealed_tail_grows_into_a_sealed_block_without_sealing_damage_in() -> None:
    whole, grown, damaged = make_store(), make_store(), make_store()
    held = filled(whole, 16)
    for store in (grown, damaged):
        part = replace(held, count=7)
        write_rows(store, part)
        store.seal(part)
        if store is damaged:
            store.components[0].payload_view[0, held.block_table[0], 0, 2, 0] ^= 1
        for token in range(7, 16):
            write_rows(store, replace(held, start=token, count=1))
        store.seal(held)
    assert np.array_equal(grown.read_tokens(held)[0].digests, whole.read_tokens(held)[0].digests)
    assert grown.verify(held)
    assert not damaged.verify(held)


def test_a_part_of_a_sealed_block_is_read_with_a_digest_of_the_part_only_if_the_block_holds() -> None:
    store, other = make_store(), make_store()
    held = filled(store, 32)
    part = replace(held, count=20)
    other.write_tokens(part, store.read_tokens(part))
    assert other.verify(part)
    store.components[1].payload_view[1, held.block_table[1], 0, 15, 0] ^= 4  # beyond the part, in its hash block
    with pytest.raises(KvCorrupted, match="does not hold"):
        store.read_tokens(part)
