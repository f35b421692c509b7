"""Tokens that wait in host memory: they come back as they were, or it is noticed."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from twostroke.core.errors import KvCorrupted
from twostroke.kernels.reference import store_kv
from twostroke.kv.block import BlockId
from twostroke.kv.section import HeldTokens
from twostroke.kv.spec import CODEC_NAMES, attention_spec
from twostroke.kv.store.host_store import HostStore
from twostroke.kv.store.store import KvStore

LAYERS, HEADS, WIDTH, KEY = 2, 3, 16, 0xC0FFEE
CODECS = ["fp8", "bfloat16"]


def make(codec: str, block_tokens: int = 16) -> tuple[KvStore, HostStore, KvStore]:
    """A store, host memory beside it, and the store of that memory."""
    store = KvStore(attention_spec(LAYERS, HEADS, WIDTH, CODEC_NAMES[codec]), 24, block_tokens, digest_key=KEY)
    memory = store.on_host(9)
    for component in (*store.components, *memory.components):
        component.payload.fill_(0xFF)  # what nobody wrote must never come out
    return store, HostStore(store, memory), memory


def held(store: KvStore, tokens: int, first_block: int, generation: int, start: int = 0) -> HeldTokens:
    count = -(-tokens // store.block_tokens)
    table = [BlockId(first_block + count - 1 - i) for i in range(count)]
    return HeldTokens(table, [generation + i for i in range(count)], start, tokens - start)


def fill(store: KvStore, where: HeldTokens) -> None:
    """Random rows as the step writes them; whole hash blocks are sealed, the tail is not."""
    place = torch.arange(where.end)
    slots = torch.tensor(where.block_table)[place // store.block_tokens] * store.block_tokens
    slots += place % store.block_tokens
    for layer in range(LAYERS):
        k, v = torch.randn(2, where.end, HEADS, WIDTH, generator=torch.Generator().manual_seed(layer))
        store_kv(k, v, slots, *store.planes(layer))
    store.seal(replace(where, start=0, count=where.end - where.end % 16))


def planes(store: KvStore, where: HeldTokens) -> list[np.ndarray]:
    return [store._gather(component, where)[0] for component in store.components]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("block_tokens", [16, 32])
@pytest.mark.parametrize(("tokens", "start", "back"), [(1, 0, 0), (16, 0, 0), (59, 0, 0), (59, 32, 32), (96, 32, 64)])
def test_tokens_come_back_into_other_blocks_as_they_were(codec, block_tokens, tokens, start, back):
    store, host, _ = make(codec, block_tokens)
    was, there = held(store, tokens, 3, 7, start), held(store, tokens, 1, 40, start)
    fill(store, was)
    before = planes(store, replace(was, start=back, count=tokens - back))
    host.swap_out(was, there)
    for component in store.components:
        component.payload.fill_(0xAA)  # somebody else has the blocks now
    now = held(store, tokens, 14, 70, back)
    assert host.swap_in(replace(there, start=back, count=tokens - back), now)
    assert all(np.array_equal(a, b) for a, b in zip(planes(store, now), before, strict=True))
    assert store.verify(now)


def test_a_tail_that_came_back_grows_into_the_same_sealed_block():
    (store, host, _), (other, _, _) = make("fp8"), make("fp8")
    was, there, now = held(store, 32, 3, 7), held(store, 27, 1, 40), held(store, 32, 14, 70)
    for each in (store, other):
        fill(each, replace(was, count=27))
        fill(each, was)  # in `store` the last five tokens are what the next steps compute
    store._sealed_generation[was.block_table[1]] = -1  # not sealed yet
    host.swap_out(replace(was, count=27), there)
    assert host.swap_in(there, replace(now, count=27))
    for component in store.components:
        for plane in (component.payload_view, component.scales_view):
            plane[:, now.block_table[1], :, 11:] = plane[:, was.block_table[1], :, 11:]
    store.seal(replace(now, start=16, count=16))
    for ours, theirs in zip(store.read_tokens(now), other.read_tokens(was), strict=True):
        assert np.array_equal(ours.payload, theirs.payload)
        assert np.array_equal(ours.digests, theirs.digests)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("token", [0, 20, 58])
def test_one_bit_that_flips_in_host_memory_is_found(codec, token):
    store, host, memory = make(codec)
    was, there = held(store, 59, 3, 7), held(store, 59, 1, 40)
    fill(store, was)
    host.swap_out(was, there)
    memory.components[1].payload_view[1, there.block_table[token // 16], 2, token % 16, 5] ^= 8
    assert not host.swap_in(there, held(store, 59, 14, 70))


@pytest.mark.parametrize("token", [19, 58])
def test_damage_done_before_the_swap_is_found_after_it(token):
    store, host, _ = make("fp8")
    was, there = held(store, 59, 3, 7), held(store, 59, 1, 40)
    fill(store, was)
    store.seal(replace(was, start=48, count=11))  # a prompt's tail, for a peer
    store.components[0].payload_view[0, was.block_table[token // 16], 0, token % 16, 0] ^= 1
    host.swap_out(was, there)
    assert not host.swap_in(there, held(store, 59, 14, 70))


def test_another_use_of_a_host_block_is_not_taken_for_this_one():
    store, host, _ = make("fp8")
    was, there = held(store, 48, 3, 7), held(store, 48, 1, 40)
    fill(store, was)
    host.swap_out(was, there)
    host.swap_out(replace(was, count=16), replace(there, generations=[41, 41, 42], count=16))
    assert not host.swap_in(there, held(store, 48, 14, 70))


def test_what_was_never_sealed_is_refused():
    store, host, _ = make("fp8")
    was = held(store, 48, 3, 7)
    fill(store, held(store, 30, 3, 7))
    with pytest.raises(KvCorrupted, match="not sealed"):
        host.swap_out(was, held(store, 48, 1, 40))
