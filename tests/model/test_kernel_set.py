"""The bits of our CPU kernels, written down: who changes one counts KERNEL_SET_VERSION up.

Workers exchange KV where their numerics are the same, and that number stands in these: bits that moved behind it would
be KV that is silently wrong after an update of half a cluster.
"""

import hashlib
from math import prod
from pathlib import Path

import pytest
import torch
from support.engines.native_cache import BLOCK, Cache
from support.session.older_machines import PLAYED, library_for
from support.session.recorded import Recorded

from twostroke.kernels.cpu import library as native
from twostroke.model.loader import KERNEL_SET_VERSION
from twostroke.model.ops.int4 import Int4Matrix
from twostroke.model.ops.native_ops import NativeOps
from twostroke.model.ops.seam import AttentionKind, Norm, Quantization, Span

RECORDED = Path(__file__).parents[1] / "scenarios" / "kernel_set"  # a file for each level of instructions
ROWS = 40


def numbers(seed: int, *shape: int) -> torch.Tensor:
    """From -1 to 1 in steps of 2**-23, the same on every machine."""
    i = torch.arange(prod(shape), dtype=torch.int64) + seed * 1_000_003
    i = (i ^ (i >> 7)) * 2_654_435_761 & 0xFFFF_FFFF
    i = (i ^ (i >> 15)) * 2_246_822_519 & 0xFFFF_FFFF
    return ((i >> 8).double() * 2.0**-23 - 1.0).float().view(shape)


def codes(seed: int, *shape: int) -> torch.Tensor:
    """Bytes, the same on every machine."""
    return (numbers(seed, *shape) * 128.0 + 128.0).byte()


def answers(dtype: torch.dtype, quantization: Quantization) -> list[torch.Tensor]:
    """One of every op whose order of computing is ours to choose."""
    ops = NativeOps(dtype, 2, quantization)
    x = numbers(1, ROWS, 256).to(dtype)
    norm = Norm(numbers(2, 256) + 1.5, 1e-5)
    gates = ops.pack(numbers(3, 2 * 70, 256), numbers(4, 2 * 70), gated=True)
    plain_gates = ops.pack(numbers(5, 2 * 64, 256) * 4, gated=True)
    found = [
        ops.linear(x, ops.pack(numbers(6, 90, 256))),
        ops.gated_linear(x, gates, "silu"),
        ops.gated_linear(x, plain_gates, "silu"),
        ops.gated_linear(x, plain_gates, "gelu_tanh"),
        ops.gated_linear(x, plain_gates, "clamped_swiglu"),
        ops.rms_norm(x, norm),
        ops.rotary(x.clone().view(ROWS, 4, 64), numbers(7, ROWS, 32), numbers(8, ROWS, 32)),
    ]
    for zeros, inner in ((None, 256), (codes(17, 90, 4) & 15, 128)):
        stored = Int4Matrix(codes(16, 90, inner // 2), numbers(18, 90, inner // 32).half(), zeros)
        found.append(ops.linear(x[:, :inner].contiguous(), ops.pack_int4(stored)))
    kv = [numbers(seed, 300, 2, 64).to(dtype) * 2 for seed in (9, 10)]
    q = numbers(11, 300, 6, 64).to(dtype) * 3
    cache = Cache(ops, (300,), kv, "fp8")
    layout = ops.lay_out([Span(0, 0, 300, cache.tables[0])], BLOCK)
    for kind in (AttentionKind(0.125), AttentionKind(0.3, window=37, softcap=5.0)):
        found.append(ops.attend((q,), cache.planes[:1], cache.planes[1], layout, kind))
    sinks = numbers(16, 6) * 4
    found.append(ops.attend((q,), cache.planes[:1], cache.planes[1], layout, AttentionKind(0.125), sinks=sinks))
    found += [part for plane in cache.planes for part in plane[:2] if part is not None]
    parts = [numbers(seed, 130, 1, width).to(dtype) for seed, width in ((12, 96), (13, 32))]
    q_parts = tuple(numbers(seed, 16, 20, width).to(dtype) for seed, width in ((14, 96), (15, 32)))
    latent = Cache(ops, (130,), parts, "bf16")
    layout = ops.lay_out([Span(0, 114, 16, latent.tables[0])], BLOCK)
    found.append(ops.attend(q_parts, latent.planes, latent.planes[0], layout, AttentionKind(0.1)))
    return found


def digest() -> str:
    hasher = hashlib.sha256()
    for dtype in (torch.float32, torch.bfloat16):
        for quantization in ("none", "int8"):
            for answer in answers(dtype, quantization):  # type: ignore[arg-type]
                hasher.update(answer.contiguous().view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()[:16]


@pytest.mark.parametrize("machine", ["native", *PLAYED])
def test_bits_are_those_of_the_version_that_stands_in_the_numerics(
    machine: str, monkeypatch: pytest.MonkeyPatch, recorded: Recorded
) -> None:
    library = library_for(machine)
    monkeypatch.setattr(native, "load", lambda: library)
    path = RECORDED / f"{library.level().decode()}.txt"
    if not path.exists():
        pytest.skip(f"no bits are written down in {path}")
    text, version = path.read_text(), f"version {KERNEL_SET_VERSION}: "
    found = f"{version}{digest()}\n"
    if found != text and text.startswith(version):
        pytest.fail(
            f"{path} says {text.strip()!r}, and the kernels say {found.strip()!r}. Bits that change need another "
            f"version: add one to KERNEL_SET_VERSION in model/loader.py. {recorded.advice}",
            pytrace=False,
        )
    recorded.check(path, found)
