"""The FP8 codec's definition against torch's cast, the wire's numpy and a GPU's own decoding: byte for byte."""

import pytest
import torch
import triton
import triton.language as tl

from twostroke.kernels import reference
from twostroke.kernels.gpu import e4m3, launch
from twostroke.kv import codec as wire


def every_bf16() -> torch.Tensor:
    """All 65,536 of them as float32."""
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()


def encode_at_scale_1(x: torch.Tensor) -> torch.Tensor:
    """Codes of x [n] under scale 1: each beside a 448, which fixes the scale."""
    payload, scales, _ = reference.fp8_encode(torch.stack((x, torch.full_like(x, 448.0)), -1))
    assert (scales == 127).all()
    return payload[:, 0]


def cast(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float8_e4m3fn).view(torch.uint8)


def test_integer_encoder_equals_torch_s_cast_for_every_bf16() -> None:
    x = every_bf16()
    x = x[x.abs() <= 448]
    assert len(x) > 32000
    assert torch.equal(encode_at_scale_1(x), cast(x))


def test_integer_encoder_equals_torch_s_cast_for_random_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 0x43E00001, (400_000,), generator=generator, dtype=torch.int32)  # 0 to 448, all exponents
    near = torch.randint(0x3A000000, 0x43E00001, (400_000,), generator=generator, dtype=torch.int32)
    x = torch.cat((bits, near)).view(torch.float32)
    x = torch.cat((x, -x))
    assert torch.equal(encode_at_scale_1(x), cast(x))


def test_integer_encoder_rounds_ties_to_even() -> None:
    values = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (values[1:] + values[:-1]) / 2
    assert torch.equal(encode_at_scale_1(ties), cast(ties))
    assert (encode_at_scale_1(ties) % 2 == 0).all()


def test_decoder_reads_every_code() -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    ours = reference.fp8_decode(codes.view(-1, 1), torch.full((256,), 130, dtype=torch.uint8), torch.float32)[:, 0]
    assert torch.equal(ours.nan_to_num(7.0), (codes.view(torch.float8_e4m3fn).float() * 8).nan_to_num(7.0))


@pytest.mark.parametrize("width", [1, 15, 16, 64, 80])
def test_reference_and_wire_are_equal_byte_for_byte(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(3000, width, generator=generator) * torch.exp(torch.randn(3000, 1, generator=generator) * 30)
    x = torch.cat((x, every_bf16()[: 65536 // width * width].view(-1, width)))
    payload, scales, non_finite = reference.fp8_encode(x)
    there = wire.encode(x.numpy(), wire.Codec.FP8_E4M3)
    assert there.scales is not None
    assert torch.equal(payload, torch.from_numpy(there.payload))
    assert torch.equal(scales, torch.from_numpy(there.scales))
    assert int(non_finite.sum()) == there.non_finite > 0
    decoded = wire.decode(there.payload, there.scales, wire.Codec.FP8_E4M3)
    assert torch.equal(reference.fp8_decode(payload, scales, torch.float32), torch.from_numpy(decoded))


def test_decoding_to_bf16_is_exact_and_encoding_again_changes_no_value() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4000, 64, generator=generator) * torch.exp(torch.randn(4000, 1, generator=generator) * 30)
    payload, scales, _ = reference.fp8_encode(x)
    narrow = reference.fp8_decode(payload, scales, torch.bfloat16)
    assert torch.equal(narrow.float(), reference.fp8_decode(payload, scales, torch.float32))
    payload, scales, _ = reference.fp8_encode(narrow)
    assert torch.equal(reference.fp8_decode(payload, scales, torch.bfloat16), narrow)


@triton.jit
def _cast_kernel(codes_ptr, numbers_ptr):
    place = tl.arange(0, 256)
    tl.store(numbers_ptr + place, e4m3.cast_e4m3(tl.load(codes_ptr + place)))


@pytest.mark.skipif(launch.interpreted(), reason="the instruction is a GPU's")
def test_a_gpu_s_own_cast_gives_torch_s_number_of_every_code() -> None:
    if not launch.casts_fp8(launch.architecture(torch.device("cuda", 0))):
        pytest.skip("this GPU has no such instruction")
    codes = torch.arange(256, dtype=torch.uint8, device="cuda")
    numbers = torch.empty(256, dtype=torch.bfloat16, device="cuda")
    _cast_kernel[(1,)](codes, numbers)
    wanted = codes.view(torch.float8_e4m3fn).to(torch.bfloat16)
    assert torch.equal(numbers.isnan(), wanted.isnan())
    known = ~wanted.isnan()
    assert torch.equal(numbers[known].view(torch.int16), wanted[known].view(torch.int16))
