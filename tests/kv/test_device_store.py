"""The store on a device, or on the CPU with kernels in Triton's interpreter, against the store on the CPU."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from twostroke.core.errors import KvCorrupted
from twostroke.kernels.gpu import launch
from twostroke.kernels.gpu.rotary_store import rotary_store_kv
from twostroke.kernels.reference_kv import Rotation
from twostroke.kv.block import BlockId
from twostroke.kv.section import HeldTokens
from twostroke.kv.spec import CODEC_NAMES, attention_spec, mla_spec
from twostroke.kv.store.host_store import HostStore
from twostroke.kv.store.store import KvStore

if launch.interpreted():
    from support.session.quick_interpreter import quicken

    quicken()

LAYERS, HEADS, WIDTH, KEY, BLOCKS = 2, 2, 16, 0xFEED_0123_4567_89AB, 9
CODECS = ["fp8", "bfloat16"]
CPU, DEVICE = torch.device("cpu"), torch.device("cpu" if launch.interpreted() else "cuda")


def store(codec: str, *, by_kernels: bool, block_tokens: int = 16, rank: int = 0, ranks: int = 1) -> KvStore:
    spec = attention_spec(LAYERS, HEADS * ranks, WIDTH, CODEC_NAMES[codec]).of_rank(rank, ranks)
    device = DEVICE if by_kernels else CPU
    made = KvStore(spec, BLOCKS, block_tokens, device, digest_key=KEY, by_kernels=by_kernels)
    for component in made.components:
        component.payload.fill_(0xFF)  # what nobody wrote must never come out
    return made


def held(tokens: int, start: int = 0, block_tokens: int = 16, first_block: int = 7) -> HeldTokens:
    count = -(-tokens // block_tokens)
    table = [BlockId((first_block + 5 * i) % BLOCKS) for i in range(count)]
    return HeldTokens(table, [3 + i for i in range(count)], start, tokens - start)


def slots_of(where: HeldTokens, block_tokens: int) -> torch.Tensor:
    place = torch.arange(where.start, where.end)
    return torch.tensor(where.block_table)[place // block_tokens] * block_tokens + place % block_tokens


def step(kv: KvStore, where: HeldTokens, seed: int = 0) -> None:
    """Write a range's tokens in every layer as a step does, with a row of padding at its end."""
    slots = torch.cat((slots_of(where, kv.block_tokens), torch.tensor([-1]))).to(kv.device)
    positions = torch.cat((torch.arange(where.start, where.end), torch.tensor([0]))).to(kv.device)
    births = kv.births(slots)
    assert births is not None
    angles = (torch.arange(64).unsqueeze(1) * torch.ones(1, WIDTH // 2)).to(kv.device)
    for layer in range(LAYERS):
        numbers = torch.randn(64, 3, HEADS, WIDTH, generator=torch.Generator().manual_seed(seed + layer))
        q, k, v = numbers.to(kv.device, torch.bfloat16)[positions].unbind(1)
        k_planes, v_planes = kv.planes(layer)
        stored = rotary_store_kv(
            q, k, v, slots, Rotation(positions, angles.cos(), angles.sin()),
            k_planes=k_planes, v_planes=v_planes, seal=births.seal(layer),
        )  # fmt: skip
        births.add(layer, stored.digests)


def copied(source: KvStore, target: KvStore) -> None:
    """The same bytes in another store, nothing sealed."""
    for mine, theirs in zip(target.components, source.components, strict=True):
        mine.payload.copy_(theirs.payload)
        if mine.scales is not None and theirs.scales is not None:
            mine.scales.copy_(theirs.scales)


def same_sections(a: KvStore, b: KvStore, where: HeldTokens) -> None:
    for mine, theirs in zip(a.read_tokens(where), b.read_tokens(where), strict=True):
        assert mine.component == theirs.component
        assert np.array_equal(mine.payload, theirs.payload)
        assert (mine.scales is None) == (theirs.scales is None)
        assert mine.scales is None or np.array_equal(mine.scales, theirs.scales)
        assert np.array_equal(mine.digests, theirs.digests)


@pytest.mark.parametrize(("codec", "block_tokens"), [("fp8", 32), ("bfloat16", 16)])
def test_seals_born_in_the_step_are_those_of_the_bytes(codec: str, block_tokens: int, monkeypatch: pytest.MonkeyPatch):
    device, cpu = (store(codec, by_kernels=k, block_tokens=block_tokens) for k in (True, False))
    whole = held(39, 0, block_tokens)
    read_anew = []
    monkeypatch.setattr(device, "_digest", lambda *a: read_anew.append(a))
    for start, end in ((0, 21), (21, 22), (22, 39)):  # cut anywhere, also within hash blocks
        step(device, replace(whole, start=start, count=end - start))
    device.seal(whole)
    assert not read_anew
    monkeypatch.undo()
    copied(device, cpu)
    cpu.seal(whole)
    same_sections(device, cpu, whole)
    assert device.verify(whole)
    same_sections(device, cpu, held(37, 16, block_tokens))


def test_seals_born_on_a_rank_count_heads_in_the_whole_model():
    device, cpu, other = (store("fp8", by_kernels=k, rank=r, ranks=3) for k, r in ((True, 2), (False, 2), (False, 0)))
    step(device, held(20))
    device.seal(held(20))
    for made in (cpu, other):
        copied(device, made)
        made.seal(held(20))
    same_sections(device, cpu, held(20))
    assert not np.array_equal(other.read_tokens(held(20))[0].digests, device.read_tokens(held(20))[0].digests)


def test_a_block_in_its_next_use_begins_anew():
    device, cpu = store("fp8", by_kernels=True), store("fp8", by_kernels=False)
    step(device, held(18))
    device.seal(held(18))
    again = HeldTokens([BlockId(2), BlockId(7)], [8, 9], 0, 20)  # block 7 was the first, with 16 tokens
    step(device, again)
    device.seal(again)
    copied(device, cpu)
    cpu.seal(again)
    same_sections(device, cpu, again)


def test_rows_written_twice_are_digested_from_the_bytes():
    device, cpu = store("fp8", by_kernels=True), store("fp8", by_kernels=False)
    step(device, held(20))
    step(device, held(20, 18))
    device.seal(held(20))
    copied(device, cpu)
    cpu.seal(held(20))
    same_sections(device, cpu, held(20))
    step(device, held(23, 20))  # and go on from there
    device.seal(held(23))
    copied(device, cpu)
    cpu.seal(held(23))
    same_sections(device, cpu, held(23))


def test_a_handed_over_tail_goes_on_with_its_seal_and_damage_in_between_shows():
    codec = "fp8"
    first, device = store(codec, by_kernels=True), store(codec, by_kernels=True)
    step(first, held(21))
    first.seal(held(21))
    here = held(25, 0, 16, 3)
    arrived = replace(here, count=21)
    step(device, replace(here, start=16, count=5), seed=9)  # of another sequence, as long as what comes next
    device.write_tokens(arrived, first.read_tokens(held(21)))
    assert device.verify(arrived)
    step(device, replace(here, start=21, count=4))
    device.seal(replace(here, start=16, count=9))
    assert device.verify(here)

    damaged = store(codec, by_kernels=True)
    damaged.write_tokens(arrived, first.read_tokens(held(21)))
    damaged.components[1].payload[1, here.block_table[1], 0, 2, 3] ^= 4
    step(damaged, replace(here, start=21, count=4))
    damaged.seal(replace(here, start=16, count=9))
    assert not damaged.verify(here)
    assert damaged.verify(replace(here, count=16))


def test_between_codecs_and_kinds_of_store_the_same_arrives():
    sender = store("bfloat16", by_kernels=True)
    step(sender, held(35))
    sender.seal(held(35))
    sections = sender.read_tokens(held(35))
    device, cpu = store("fp8", by_kernels=True), store("fp8", by_kernels=False)
    for kv in (device, cpu):
        kv.write_tokens(held(35), sections)
    same_sections(device, cpu, held(35))
    with pytest.raises(KvCorrupted, match="not each one once"):
        device.write_tokens(held(35), sections[:1])
    with pytest.raises(KvCorrupted, match="not sealed"):
        device.read_tokens(held(40))


@pytest.mark.parametrize("codec", CODECS)
def test_a_swap_goes_out_and_comes_back(codec: str):
    device = store(codec, by_kernels=True)
    memory = device.on_host(4)
    host = HostStore(device, memory)
    was = held(43)
    for component in device.components:
        component.payload.random_(0, 256, generator=torch.Generator(DEVICE).manual_seed(2))
    device.seal(replace(was, count=32))  # the generated tail is not sealed yet
    before = [device._gather(component, was) for component in device.components]
    there = HeldTokens([BlockId(3), BlockId(0), BlockId(2)], [1, 1, 1], 0, 43)
    host.swap_out(was, there)
    for component in device.components:
        component.payload.fill_(0xAA)
    back = HeldTokens([BlockId(1), BlockId(8), BlockId(4)], [20, 21, 22], 0, 43)
    assert host.swap_in(there, back)
    for component, (payload, scales) in zip(device.components, before, strict=True):
        now = device._gather(component, back)
        assert np.array_equal(now[0], payload)
        assert scales is None or np.array_equal(now[1], scales)
    memory.components[0].payload[0, 0, 1, 2, 3] ^= 1
    assert not host.swap_in(there, back)


def test_a_latent_cache_moves_by_kernels_too():
    spec = mla_spec(LAYERS, 24, 8, CODEC_NAMES["fp8"])
    device = KvStore(spec, BLOCKS, 16, DEVICE, digest_key=KEY, by_kernels=True)
    cpu = KvStore(spec, BLOCKS, 16, digest_key=KEY, by_kernels=False)
    for component in cpu.components:
        component.payload.random_(0, 255, generator=torch.Generator().manual_seed(1))
    copied(cpu, device)
    assert device.births(torch.tensor([0], device=DEVICE)) is None
    for kv in (device, cpu):
        kv.seal(held(21))
    same_sections(device, cpu, held(21))
