"""The wire's codecs: their values, their limits, and what never changes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from twostroke.kv.codec import Codec, decode, encode, payload_bytes, scale_bytes, transcode

ALL = list(Codec)
WIDE = st.floats(allow_nan=False, allow_infinity=False, width=32)
ROWS = hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 7, 64])), elements=WIDE)


def rows(seed: int, count: int = 500, width: int = 64, spread: float = 15.0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (random.standard_normal((count, width)) * np.exp(random.standard_normal((count, 1)) * spread)).astype("f4")


def test_ids_are_the_wire_s_and_never_change() -> None:
    ids = {"FP8_E4M3": 1, "BF16": 2, "FP32": 3, "FP8_E5M2": 4, "INT8": 5, "INT8_CHANNEL": 6}
    assert {codec.name: int(codec) for codec in Codec} == ids


@pytest.mark.parametrize("codec", ALL)
def test_sizes_are_what_encode_makes(codec: Codec) -> None:
    encoded = encode(rows(0, 3, 80, 1.0), codec)
    assert encoded.payload.shape == (3, payload_bytes(codec, 80))
    assert (encoded.scales is None) == (scale_bytes(codec) == 0)


def test_fp8_payload_is_torch_s_cast_of_the_scaled_row() -> None:
    x = rows(1)
    payload, scales, _ = encode(x, Codec.FP8_E4M3)
    assert scales is not None
    scaled = torch.from_numpy(np.ldexp(x.astype("f8"), 127 - scales.astype(int)[:, None]).astype("f4"))
    assert np.array_equal(payload, scaled.to(torch.float8_e4m3fn).view(torch.uint8).numpy())


def test_scale_is_the_smallest_power_of_two_that_holds_amax() -> None:
    x = rows(2, spread=20.0)
    scales = encode(x, Codec.FP8_E4M3).scales
    assert scales is not None
    amax, exponent = np.abs(x).max(-1).astype("f8"), scales.astype(int) - 127
    assert (amax <= np.ldexp(448.0, exponent)).all()
    assert (amax > np.ldexp(448.0, exponent - 1))[scales > 11].all()
    assert len(np.unique(scales)) > 30


@pytest.mark.parametrize(
    ("amax", "byte"), [(448.0, 127), (np.nextafter(np.float32(448), np.float32(999)), 128), (1, 119)]
)
def test_scale_at_its_borders(amax: float, byte: int) -> None:
    scales = encode(np.array([[amax, 0.0]], "f4"), Codec.FP8_E4M3).scales
    assert scales is not None
    assert scales.tolist() == [byte]


def test_fp8_error_is_within_half_a_step() -> None:
    x = rows(3, spread=5.0)
    payload, scales, _ = encode(x, Codec.FP8_E4M3)
    assert scales is not None
    step = np.maximum(np.abs(x) / 16, np.ldexp(2.0**-10, scales.astype(int)[:, None] - 127))
    assert (np.abs(decode(payload, scales, Codec.FP8_E4M3) - x) <= step).all()


def test_overflow_saturates_and_the_range_ends_where_stated() -> None:
    largest = np.finfo(np.float32).max
    top = encode(np.array([[largest, -largest, 2.0**120]], "f4"), Codec.FP8_E4M3)
    assert decode(top.payload, top.scales, Codec.FP8_E4M3).tolist() == [[448 * 2.0**119, -448 * 2.0**119, 2.0**120]]
    bottom = encode(np.array([[2.0**-125, 2.0**-127, -(2.0**-126), 0.0]], "f4"), Codec.FP8_E4M3)
    assert decode(bottom.payload, bottom.scales, Codec.FP8_E4M3).tolist() == [[2.0**-125, 0.0, 0.0, 0.0]]
    assert bottom.scales is not None
    assert bottom.scales.tolist() == [11]
    bf16 = encode(np.array([[largest, -largest]], "f4"), Codec.BF16)
    assert np.isfinite(decode(bf16.payload, None, Codec.BF16)).all()


@given(ROWS)
def test_encoding_a_decoded_row_never_changes_a_value(x: np.ndarray) -> None:
    for codec in ALL:
        once = decode(*encode(x, codec)[:2], codec)
        second = encode(once, codec)
        again = decode(second.payload, second.scales, codec)
        assert np.array_equal(once, again)
        third = encode(again, codec)  # and from the second time on no byte either
        assert np.array_equal(third.payload, second.payload)


@given(ROWS)
def test_fp8_is_exact_in_bf16_and_fp32(x: np.ndarray) -> None:
    fp8 = encode(x, Codec.FP8_E4M3)
    values = decode(fp8.payload, fp8.scales, Codec.FP8_E4M3)
    for wider in (Codec.BF16, Codec.FP32):
        there = transcode(fp8.payload, fp8.scales, Codec.FP8_E4M3, wider)
        assert np.array_equal(decode(there.payload, None, wider), values)
        back = transcode(there.payload, None, wider, Codec.FP8_E4M3)
        assert np.array_equal(decode(back.payload, back.scales, Codec.FP8_E4M3), values)
    assert (np.abs(values[values != 0]) >= 2.0**-125).all()


def test_the_same_codec_transcodes_without_touching_a_byte() -> None:
    fp8 = encode(rows(4), Codec.FP8_E4M3)
    same = transcode(fp8.payload, fp8.scales, Codec.FP8_E4M3, Codec.FP8_E4M3)
    assert same.payload is fp8.payload
    assert same.scales is fp8.scales


def test_bf16_is_torch_s_cast() -> None:
    x = rows(5)
    ours = encode(x, Codec.BF16).payload
    assert np.array_equal(ours, torch.from_numpy(x).to(torch.bfloat16).view(torch.uint8).numpy())


@pytest.mark.parametrize("codec", ALL)
@pytest.mark.parametrize("poison", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_non_finite_row_is_counted_and_stored_as_zeros(codec: Codec, poison: float) -> None:
    x = rows(6, 9, 16, 1.0)
    clean = encode(x, codec)
    x[4, 7] = x[6, 0] = poison
    encoded = encode(x, codec)
    assert encoded.non_finite == 2
    assert not encoded.payload[[4, 6]].any()
    assert not decode(encoded.payload, encoded.scales, codec)[[4, 6]].any()
    others = [0, 1, 2, 3, 5, 7, 8]
    assert np.array_equal(encoded.payload[others], clean.payload[others])
    if encoded.scales is not None:
        assert encoded.scales[[4, 6]].tolist() == [0, 0]
        assert (encoded.scales[others] >= 11).all()


def test_zeros_keep_their_sign_and_fp8_without_scales_is_refused() -> None:
    payload, scales, _ = encode(np.array([[0.0, -0.0, 1.0]], "f4"), Codec.FP8_E4M3)
    assert np.signbit(decode(payload, scales, Codec.FP8_E4M3)).tolist() == [[False, True, False]]
    with pytest.raises(ValueError, match="scale bytes"):
        decode(payload, None, Codec.FP8_E4M3)
