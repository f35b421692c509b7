"""The digest: its definition, its arithmetic, and every fault it must find."""

from collections.abc import Callable

import numpy as np
import pytest

from twostroke.kv.digest import frame_digests, key_table, place_keys, places, scale_keys, unit_digests

KEY = 0x1F3D5B79A2C4E680
TOKENS, ROW = 16, 64
N = 12_500  # faults of each kind; all kinds together are more than 10**5
U8 = np.ndarray


def content(count: int, seed: int) -> tuple[U8, U8]:
    """Units as the FP8 store holds them: payload [count, tokens, row], scales [count, tokens]."""
    random = np.random.default_rng(seed)
    payload = random.integers(0, 256, (count, TOKENS, ROW), dtype=np.uint8)
    return payload, random.integers(110, 130, (count, TOKENS), dtype=np.uint8)


def anywhere(count: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    layer, head, block = random.integers(0, 80, count), random.integers(0, 8, count), random.integers(0, 8192, count)
    return places(layer, 0, head, block)


def test_definition_in_plain_integers() -> None:
    payload, scales = content(1, 0)
    place = places(3, 1, 5, 77)
    words = payload[0].view("<u4")
    keys, columns = key_table(KEY, 0, TOKENS, ROW // 4), scale_keys(KEY, 0, TOKENS)
    unit = sum(int(keys[t, i]) * int(words[t, i]) for t in range(TOKENS) for i in range(ROW // 4))
    unit += sum(int(columns[t]) * int(scales[0, t]) for t in range(TOKENS))
    multiplier, addend = (int(k) for k in place_keys(place, KEY))
    assert int(unit_digests(payload, scales, place, KEY)[0]) == (unit * multiplier + addend * TOKENS) % 2**64


def test_is_the_same_on_every_machine_and_release() -> None:
    """Digests cross the wire between releases: these numbers may only change with the wire's version."""
    payload = np.arange(2 * TOKENS * ROW, dtype=np.uint32).astype(np.uint8).reshape(2, TOKENS, ROW)
    scales = np.arange(2 * TOKENS, dtype=np.uint8).reshape(2, TOKENS)
    digests = unit_digests(payload, scales, places([1, 2], 0, 3, 4), KEY)
    assert [hex(d) for d in digests.tolist()] == ["0x8155149214ea9b56", "0x47208d0f3d0adc02"]


def test_keys_differ_everywhere() -> None:
    keys = np.concatenate((key_table(KEY, 0, TOKENS, 64).ravel(), scale_keys(KEY, 0, TOKENS)))
    assert len(np.unique(keys)) == keys.size
    assert len(np.intersect1d(keys, key_table(KEY + 1, 0, TOKENS, 64))) == 0
    multiplier, addend = place_keys(anywhere(1000, 0), KEY)
    assert (multiplier % 2 == 1).all()
    assert (addend % 2 == 1).all()


@pytest.mark.parametrize("cut", [1, 7, 15])
def test_is_additive_over_tokens(cut: int) -> None:
    payload, scales = content(5, 1)
    place = anywhere(5, 1)
    first = unit_digests(payload[:, :cut], scales[:, :cut], place, KEY)
    second = unit_digests(payload[:, cut:], scales[:, cut:], place, KEY, first_token=cut)
    assert np.array_equal(first + second, unit_digests(payload, scales, place, KEY))


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 64, 65, 500])
@pytest.mark.parametrize("scaled", [True, False])
def test_a_frame_s_digests_are_its_units_and_every_slice_verifies_alone(tokens: int, scaled: bool) -> None:
    random = np.random.default_rng(tokens)
    payload = random.integers(0, 256, (3, 2, tokens, 32), dtype=np.uint8)
    scales = random.integers(0, 256, (3, 2, tokens), dtype=np.uint8) if scaled else None
    blocks = np.arange(9, 9 + -(-tokens // TOKENS))
    place = places(np.arange(4, 7)[:, None, None], 1, np.arange(6, 8)[:, None], blocks)
    frame = frame_digests(payload, scales, place, KEY, TOKENS)
    assert frame.shape == (3, 2, len(blocks))
    for layer, head, block in np.ndindex(frame.shape):
        here = slice(block * TOKENS, (block + 1) * TOKENS)
        part = None if scales is None else scales[layer, head, here]
        one = unit_digests(payload[layer, head, here], part, places(4 + layer, 1, 6 + head, 9 + block), KEY)
        assert int(one) == int(frame[layer, head, block])
    one_head = frame_digests(payload[1, 1:], None if scales is None else scales[1, 1:], place[1, 1:], KEY, TOKENS)
    assert np.array_equal(one_head, frame[1, 1:])


def test_a_frame_of_no_token_has_no_digest_and_odd_rows_are_padded() -> None:
    none = np.zeros((2, 0, 64), np.uint8)
    assert frame_digests(none, None, np.zeros((2, 0), np.uint64), KEY, TOKENS).shape == (2, 0)
    odd = np.arange(16 * 7, dtype=np.uint8).reshape(16, 7)
    padded = np.pad(odd, ((0, 0), (0, 1)))
    assert unit_digests(odd, None, places(0, 0, 0, 0), KEY) == unit_digests(padded, None, places(0, 0, 0, 0), KEY)


def test_layout_in_memory_does_not_matter() -> None:
    payload, scales = content(6, 2)
    place = anywhere(6, 2)
    strided = np.ascontiguousarray(payload.transpose(1, 0, 2)).transpose(1, 0, 2)
    assert not strided.flags.c_contiguous
    expected = unit_digests(payload, scales, place, KEY)
    assert np.array_equal(unit_digests(strided, scales, place, KEY), expected)


# --- Faults of content: the bytes changed, digest and place are the right ones. ---


def flip_payload_bit(p: U8, s: U8, random: np.random.Generator) -> None:
    i = np.arange(N)
    p[i, random.integers(0, TOKENS, N), random.integers(0, ROW, N)] ^= np.uint8(1) << random.integers(0, 8, N, np.uint8)


def flip_two_high_bits(p: U8, s: U8, random: np.random.Generator) -> None:
    """Bit 31 of two words of one row: the weakest bits of a multilinear sum."""
    i, t = np.arange(N), random.integers(0, TOKENS, N)
    first = random.integers(0, ROW // 4, N)
    p[i, t, first * 4 + 3] ^= 0x80
    p[i, t, (first + random.integers(1, ROW // 4, N)) % (ROW // 4) * 4 + 3] ^= 0x80


def swap_two_bytes(p: U8, s: U8, random: np.random.Generator) -> None:
    flat, i = p.reshape(N, -1), np.arange(N)
    a, b = random.integers(0, TOKENS * ROW, (2, N))
    flat[i, a], flat[i, b] = flat[i, b].copy(), flat[i, a].copy()


def swap_two_tokens(p: U8, s: U8, random: np.random.Generator) -> None:
    i, a = np.arange(N), random.integers(0, TOKENS, N)
    b = (a + random.integers(1, TOKENS, N)) % TOKENS
    p[i, a], p[i, b] = p[i, b].copy(), p[i, a].copy()
    s[i, a], s[i, b] = s[i, b].copy(), s[i, a].copy()


def take_another_unit_s_bytes(p: U8, s: U8, random: np.random.Generator) -> None:
    """Another head, layer, component or a reused page: right format, wrong content."""
    other = (np.arange(N) + random.integers(1, N, N)) % N
    p[:], s[:] = p[other], s[other]


def take_one_token_of_another_unit(p: U8, s: U8, random: np.random.Generator) -> None:
    i, t = np.arange(N), random.integers(0, TOKENS, N)
    other = (i + random.integers(1, N, N)) % N
    p[i, t], s[i, t] = p[other, t], s[other, t]


def change_a_scale(p: U8, s: U8, random: np.random.Generator) -> None:
    s[np.arange(N), random.integers(0, TOKENS, N)] += random.integers(1, 256, N, dtype=np.uint8)


def zero_everything(p: U8, s: U8, random: np.random.Generator) -> None:
    p[:], s[:] = 0, 0


def zero_the_tail(p: U8, s: U8, random: np.random.Generator) -> None:
    kept = np.arange(TOKENS) < random.integers(0, TOKENS, N)[:, None]
    p *= kept[..., None]
    s *= kept


def shift_by_one_token(p: U8, s: U8, random: np.random.Generator) -> None:
    p[:], s[:] = np.roll(p, 1, axis=1), np.roll(s, 1, axis=1)


def shift_by_one_byte(p: U8, s: U8, random: np.random.Generator) -> None:
    p[:] = np.roll(p.reshape(N, -1), 1, axis=1).reshape(p.shape)


def overwrite_a_burst(p: U8, s: U8, random: np.random.Generator) -> None:
    start = random.integers(0, TOKENS * ROW, N)[:, None]
    where = np.arange(TOKENS * ROW)
    burst = (where >= start) & (where < start + random.integers(1, 257, N)[:, None])
    flat = p.reshape(N, -1)
    flat[burst] = random.integers(0, 256, int(burst.sum()), dtype=np.uint8)


FAULTS = [
    flip_payload_bit, flip_two_high_bits, swap_two_bytes, swap_two_tokens, take_another_unit_s_bytes,
    take_one_token_of_another_unit, change_a_scale, zero_everything, zero_the_tail, shift_by_one_token,
    shift_by_one_byte, overwrite_a_burst,
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_finds_every_fault_of_content(fault: Callable[[U8, U8, np.random.Generator], None]) -> None:
    payload, scales = content(N, FAULTS.index(fault))
    place = anywhere(N, 3)
    before = unit_digests(payload, scales, place, KEY)
    bad_payload, bad_scales = payload.copy(), scales.copy()
    fault(bad_payload, bad_scales, np.random.default_rng(99))
    changed = (bad_payload != payload).any((1, 2)) | (bad_scales != scales).any(1)
    assert changed.sum() > 0.98 * N
    found = unit_digests(bad_payload, bad_scales, place, KEY) != before
    assert np.array_equal(found, changed)


def test_finds_every_single_bit_of_a_unit() -> None:
    payload, scales = content(1, 4)
    place = places(1, 0, 2, 3)
    whole = np.concatenate((payload.ravel(), scales.ravel()))
    flips = np.repeat(whole[None], whole.size * 8, axis=0)
    bit = np.arange(whole.size * 8)
    flips[bit, bit // 8] ^= np.uint8(1) << (bit % 8).astype(np.uint8)
    bad_payload, bad_scales = flips[:, : payload.size].reshape(-1, TOKENS, ROW), flips[:, payload.size :]
    digests = unit_digests(bad_payload, bad_scales, place, KEY)
    assert (digests != unit_digests(payload, scales, place, KEY)).all()
    assert len(np.unique(digests)) == len(digests)


# --- Faults of place and length: content and digest belong together, but not here. ---


@pytest.mark.parametrize(
    "shift", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 0, 4096), (3, 1, 2, 1)]
)
@pytest.mark.parametrize("zeros", [False, True])
def test_finds_every_unit_that_comes_with_its_own_digest_to_another_place(
    shift: tuple[int, int, int, int], zeros: bool
) -> None:
    payload, scales = content(N, 5)
    if zeros:
        payload[:], scales[:] = 0, 0
    random = np.random.default_rng(6)
    where = [random.integers(0, 80, N), random.integers(0, 2, N), random.integers(0, 8, N), random.integers(0, 9999, N)]
    there = [axis + step for axis, step in zip(where, shift, strict=True)]

    def at(spot: list[np.ndarray]) -> np.ndarray:
        layer, component, head, block = (axis.astype(np.uint64) for axis in spot)
        place = (layer << np.uint64(48)) | (component << np.uint64(40)) | (head << np.uint64(24)) | block
        assert int(place[0]) == int(places(layer[0], int(component[0]), head[0], block[0]))
        return unit_digests(payload, scales, place, KEY)

    assert (at(where) != at(there)).all()


def test_finds_two_units_that_change_places_in_the_sum_of_a_frame() -> None:
    payload, scales = content(N, 7)
    place = anywhere(N, 8)
    own = unit_digests(payload, scales, place, KEY)
    other = np.roll(np.arange(N), 1)
    crossed = unit_digests(payload[other], scales[other], place, KEY)
    different = place != place[other]
    frames, bad_frames = own + own[other], crossed + unit_digests(payload, scales, place[other], KEY)
    assert (frames != bad_frames)[different].all()


@pytest.mark.parametrize("zeros", [False, True])
def test_finds_every_truncation(zeros: bool) -> None:
    payload, scales = content(N // TOKENS, 9)
    if zeros:
        payload[:], scales[:] = 0, 0
    place = anywhere(len(payload), 10)
    whole = unit_digests(payload, scales, place, KEY)
    for kept in range(TOKENS):
        assert (unit_digests(payload[:, :kept], scales[:, :kept], place, KEY) != whole).all()


def test_another_key_gives_other_digests() -> None:
    payload, scales = content(N, 11)
    place = anywhere(N, 11)
    assert (unit_digests(payload, scales, place, KEY) != unit_digests(payload, scales, place, KEY ^ 1)).all()


def test_numbers_outside_their_limits_are_refused() -> None:
    with pytest.raises(ValueError, match="layers"):
        places(1 << 16, 0, 0, 0)
    with pytest.raises(ValueError, match="hash_blocks"):
        places(0, 0, 0, [0, 1 << 24])
    with pytest.raises(ValueError, match="64-bit"):
        unit_digests(np.zeros((16, 8), np.uint8), None, places(0, 0, 0, 0), 1 << 64)
