"""e5m2, int8 and int8 per channel: their values and limits, and that both definitions make the same bytes."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from twostroke.kernels.reference import Planes, store_kv
from twostroke.kernels.reference_codecs import byte_numbers, channel_exponents, e5m2_encode, int8_encode
from twostroke.kv import codec as wire
from twostroke.kv.codec import Codec, decode, encode, transcode

ROUNDED = (Codec.FP8_E4M3, Codec.FP8_E5M2, Codec.INT8, Codec.INT8_CHANNEL)
LARGEST = float(np.finfo(np.float32).max)


def keys(seed: int, *, outliers: float = 0.0, width: int = 64, tokens: int = 48) -> np.ndarray:
    """Keys [3, tokens, width] as rotary embedding leaves them: some pairs of channels turn with radii of their own."""
    x = np.random.default_rng(seed).standard_normal((3, tokens, width)).astype("f4")
    for channel, share, turn in ((5, 1.0, 0.7), (11, 0.4, 0.1), (3, 0.6, 0.01)):
        angle = np.arange(tokens) * turn + seed
        x[..., channel] += outliers * share * np.cos(angle)
        x[..., channel + width // 2] += outliers * share * np.sin(angle)
    return x


def at_the_end_of_the_range(seed: int, exponent: int) -> np.ndarray:
    """Some numbers become infinite, or zero."""
    with np.errstate(over="ignore", under="ignore"):
        return np.ldexp(keys(seed), exponent)


def wild(seed: int) -> np.ndarray:
    """Any bits: subnormal, huge, infinite and NaN."""
    return np.random.default_rng(seed).integers(0, 2**32, (3, 48, 64), dtype=np.uint32).view(np.float32)


def snr_db(x: np.ndarray, codec: Codec) -> float:
    """Signal to noise of the channels that are no outliers."""
    encoded = encode(x, codec)
    plain = np.ones(x.shape[-1], bool)
    plain[[5, 11, 3, 5 + 32, 11 + 32, 3 + 32]] = False
    error = (decode(encoded.payload, encoded.scales, codec) - x)[..., plain]
    return float(10 * np.log10((x[..., plain] ** 2).sum() / (error**2).sum()))


KINDS = {
    "even": keys(0),
    "uneven": keys(1, outliers=40.0),
    "any bits": wild(2),
    "huge": at_the_end_of_the_range(3, 127),
    "tiny": at_the_end_of_the_range(4, -126),
}


@pytest.mark.parametrize("kind", KINDS)
def test_numpy_and_torch_make_the_same_bytes_and_numbers(kind: str) -> None:
    x = KINDS[kind]
    rows = torch.from_numpy(x)
    for codec, ours in ((Codec.FP8_E5M2, e5m2_encode(rows)), (Codec.INT8, int8_encode(rows))):
        encoded = encode(x, codec)
        assert np.array_equal(encoded.payload, ours.payload.numpy())
        assert np.array_equal(encoded.scales, ours.scales.numpy())
        assert encoded.non_finite == int(ours.non_finite.sum())
    payload = torch.full((3, 3, 16, 64), 0xFF, dtype=torch.uint8)
    planes = [Planes(payload.clone(), payload[..., 0].clone(), "int8_channel") for _ in range(2)]
    k = rows.transpose(0, 1)
    stored = store_kv(k, k, torch.arange(48), *planes)
    encoded = encode(x, Codec.INT8_CHANNEL)
    assert np.array_equal(planes[0].payload.transpose(0, 1).reshape(3, 48, 64).numpy(), encoded.payload)
    values = decode(encoded.payload, encoded.scales, Codec.INT8_CHANNEL)
    assert np.array_equal(stored.k.transpose(0, 1).numpy(), values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("codec", ROUNDED)
def test_numbers_are_finite_exact_in_bf16_and_never_change_again(kind: str, codec: Codec) -> None:
    encoded = encode(KINDS[kind], codec)
    values = decode(encoded.payload, encoded.scales, codec)
    assert np.isfinite(values).all()
    there = transcode(encoded.payload, encoded.scales, codec, Codec.BF16)
    assert np.array_equal(decode(there.payload, None, Codec.BF16), values)
    back = transcode(there.payload, None, Codec.BF16, codec)
    assert np.array_equal(decode(back.payload, back.scales, codec), values)


def test_int8_is_within_half_a_step_and_its_scale_is_the_smallest() -> None:
    x = keys(9) * np.exp(np.random.default_rng(1).standard_normal((3, 48, 1)) * 10).astype("f4")
    payload, scales, _ = encode(x, Codec.INT8)
    exponent = scales.astype(int) - 127
    assert (np.abs(decode(payload, scales, Codec.INT8) - x) <= np.ldexp(0.5, exponent)[..., None]).all()
    amax = np.abs(x).max(-1).astype("f8")
    assert (amax <= np.ldexp(127.0, exponent)).all()
    assert (amax > np.ldexp(63.5, exponent))[scales > 11].all()


def test_e5m2_payload_is_torchs_cast_of_the_scaled_row() -> None:
    x = keys(10)
    payload, scales, _ = encode(x, Codec.FP8_E5M2)
    scaled = torch.from_numpy(np.ldexp(x.astype("f8"), 127 - scales.astype(int)[..., None]).astype("f4"))
    assert np.array_equal(payload, scaled.to(torch.float8_e5m2).view(torch.uint8).numpy())
    assert np.array_equal(byte_numbers(torch.from_numpy(payload), "e5m2"), scaled.to(torch.float8_e5m2).float())


@pytest.mark.parametrize(
    ("codec", "amax", "byte"),
    [
        (Codec.INT8, 127.0, 127),
        (Codec.INT8, 127.00001, 128),
        (Codec.INT8, LARGEST, 246),
        (Codec.INT8, 0.0, 11),
        (Codec.FP8_E5M2, 57344.0, 127),
        (Codec.FP8_E5M2, 57345.0, 128),
        (Codec.FP8_E5M2, LARGEST, 239),
        (Codec.FP8_E5M2, 0.0, 17),
    ],
)
def test_scales_at_their_borders(codec: Codec, amax: float, byte: int) -> None:
    assert encode(np.array([[amax, 0.0]], "f4"), codec).scales.tolist() == [byte]


def test_only_channels_far_above_the_others_are_divided() -> None:
    anchor = np.full(64, 3, np.int8)
    anchor[7], anchor[9], anchor[40] = -127, 15, 8  # 7 turns with 39; 40 with 8; 9 with 41
    wanted = np.zeros(64, int)
    wanted[[7, 39]], wanted[[9, 41]], wanted[[40, 8]] = 3, 0, 0  # the level is 3
    assert channel_exponents(torch.from_numpy(anchor).view(torch.uint8)).tolist() == wanted.tolist()
    assert wire.channel_exponents(anchor.view(np.uint8)).tolist() == wanted.tolist()
    assert wire.channel_exponents(np.full(64, 127, np.uint8)).max() == 0
    assert wire.channel_exponents(np.zeros(64, np.uint8)).max() == 0
    one = np.zeros(128, np.int8)
    one[3] = 127
    assert wire.channel_exponents(one.view(np.uint8))[[3, 67, 4]].tolist() == [5, 5, 0]


def test_a_tokens_bytes_depend_on_its_own_prefix_only() -> None:
    """Written in chunks cut anywhere, in any order of rows within a chunk, by slots of scattered blocks."""
    k = torch.from_numpy(keys(11, outliers=40.0)).transpose(0, 1).contiguous()  # [48, 3, 64]
    whole = encode(k.transpose(0, 1).numpy(), Codec.INT8_CHANNEL)
    for cuts in ([0, 1, 2, 17, 30, 48], [0, 16, 31, 48], [0, 47, 48]):
        payload = torch.full((3, 3, 16, 64), 0xFF, dtype=torch.uint8)
        planes = Planes(payload, payload[..., 0].clone(), "int8_channel")
        table = torch.tensor([2, 0, 1])
        for start, end in pairwise(cuts):
            tokens = torch.arange(start, end).flip(0)
            slots = torch.cat((table[tokens // 16] * 16 + tokens % 16, torch.tensor([-1])))
            rows = torch.cat((k[tokens], k[:1] * 1e9))
            store_kv(rows, rows, slots, planes, Planes(payload.clone(), payload[..., 0].clone(), "int8"))
        held = planes.payload[table].transpose(0, 1).reshape(3, 48, 64)
        assert np.array_equal(held.numpy(), whole.payload)


def test_a_damaged_anchor_row_is_zeros_and_divides_nothing() -> None:
    x = keys(12, outliers=40.0)
    x[1, 16, 4] = np.nan
    channel, plain = encode(x, Codec.INT8_CHANNEL), encode(x, Codec.INT8)
    assert channel.non_finite == 1
    assert not channel.payload[1, 16].any()
    assert np.array_equal(channel.payload[1, 16:32], plain.payload[1, 16:32])
    assert not np.array_equal(channel.payload[1, :16], plain.payload[1, :16])


def test_codecs_order_of_error_is_as_designed() -> None:
    """Even channels: int8 beats e4m3 beats e5m2. Outlier channels: per channel beats e4m3 beats int8 per token."""
    even = {codec: snr_db(keys(13), codec) for codec in ROUNDED}
    assert even[Codec.INT8] > even[Codec.FP8_E4M3] + 6 > even[Codec.FP8_E5M2] + 9
    assert even[Codec.INT8_CHANNEL] > even[Codec.INT8] - 2
    uneven = {codec: snr_db(keys(14, outliers=40.0), codec) for codec in ROUNDED}
    assert uneven[Codec.INT8_CHANNEL] > uneven[Codec.INT8] + 8
    assert uneven[Codec.FP8_E4M3] > uneven[Codec.INT8] + 8
    assert uneven[Codec.FP8_E4M3] > uneven[Codec.FP8_E5M2] + 3


def test_rows_without_scales_are_refused() -> None:
    with pytest.raises(ValueError, match="INT8_CHANNEL rows need their scale bytes"):
        decode(np.zeros((16, 4), np.uint8), None, Codec.INT8_CHANNEL)
