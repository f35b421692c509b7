"""How fast the KV kernels move bytes, beside what memory allows on the same device in the same run.

`python bench/kernels.py [--tokens 4096] [--sequences 16] [--context 2048]`. With a GPU the Triton kernels, without one
the torch reference that serves on CPUs, and products with 4-bit weights. A line is printed only after its result was
held against the reference.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from twostroke.kernels import reference, reference_attention
from twostroke.kernels.reference import Planes
from twostroke.kv import codec, digest
from twostroke.model.ops.int4 import Int4Matrix, decoded
from twostroke.model.ops.native_ops import NativeOps

KV_HEADS, GROUP, WIDTH, BLOCK_TOKENS = 8, 4, 128, 16
ROW_BYTES = WIDTH + 1  # fp8 payload and its scale
SIDE, NUM_MATRICES = 4096, 24  # of the matrices of 4-bit groups


@dataclass(frozen=True)
class Sizes:
    """What one run moves."""

    tokens: int  # stored in one step
    sequences: int  # decoded in one step
    context: int  # of each of them


def median_seconds(action: Callable[[], object], device: str, repeats: int = 15) -> float:
    """Median wall time; on a GPU between events, so that launches do not count."""
    for _ in range(3):
        action()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            action()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            action()
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def read_limit(device: str) -> float:
    """Bytes per second of a sum over more memory than any cache holds."""
    size = (4 << 30) if device == "cuda" else (512 << 20)
    numbers = torch.ones(size // 4, dtype=torch.float32, device=device)
    return size / median_seconds(numbers.sum, device, repeats=7)


def report(name: str, size_bytes: float, seconds: float, limit: float) -> None:
    rate = size_bytes / seconds
    print(f"{name:<44} {seconds * 1e6:>10.1f} µs {rate / 1e9:>9.2f} GB/s {rate / limit:>7.1%} of the read limit")


def empty_planes(num_blocks: int, device: str) -> Planes:
    payload = torch.zeros((num_blocks, KV_HEADS, BLOCK_TOKENS, WIDTH), dtype=torch.uint8, device=device)
    return Planes(payload, torch.full(payload.shape[:3], 127, dtype=torch.uint8, device=device))


def bench_store(sizes: Sizes, device: str, limit: float) -> None:
    from twostroke.kernels.gpu.store_kv import store_kv  # imports triton, which a CPU run does not need to launch

    store = store_kv if device == "cuda" else reference.store_kv
    k, v = torch.randn((2, sizes.tokens, KV_HEADS, WIDTH), device=device).bfloat16()
    slots = torch.randperm(sizes.tokens, device=device)
    num_blocks = -(-sizes.tokens // BLOCK_TOKENS)
    planes, expected = ([empty_planes(num_blocks, device) for _ in "kv"] for _ in range(2))
    store(k, v, slots, *planes)
    reference.store_kv(k, v, slots, *expected)
    for plane, wanted in zip(planes, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plane[:2], wanted[:2], strict=True))
    rows = 2 * sizes.tokens * KV_HEADS
    moved = rows * (2 * WIDTH + ROW_BYTES + 2 * WIDTH)  # bf16 in, fp8 and bf16 scratch out
    seconds = median_seconds(lambda: store(k, v, slots, *planes), device)
    report(f"store_kv, {sizes.tokens} tokens", moved, seconds, limit)


def bench_attention(sizes: Sizes, device: str, limit: float) -> None:
    from twostroke.kernels.gpu.paged_decode import paged_decode_attention

    attend = paged_decode_attention if device == "cuda" else reference_attention.paged_decode_attention
    blocks_each = -(-sizes.context // BLOCK_TOKENS)
    planes = [empty_planes(sizes.sequences * blocks_each, device) for _ in "kv"]
    tables = torch.randperm(sizes.sequences * blocks_each, device=device).view(sizes.sequences, -1).int()
    for table in tables.long():
        position = torch.arange(sizes.context, device=device)
        slots = table[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS
        k, v = torch.randn((2, sizes.context, KV_HEADS, WIDTH), device=device).bfloat16()
        reference.store_kv(k, v, slots, *planes)
    contexts = torch.full((sizes.sequences,), sizes.context, dtype=torch.int32, device=device)
    q = torch.randn((sizes.sequences, KV_HEADS * GROUP, WIDTH), device=device).bfloat16()

    def run() -> torch.Tensor:
        return attend(q, *planes, tables, contexts, scale=WIDTH**-0.5)

    expected = reference_attention.paged_decode_attention(q, *planes, tables, contexts, scale=WIDTH**-0.5)
    torch.testing.assert_close(run(), expected, rtol=2e-2, atol=2e-3)
    moved = 2 * sizes.sequences * sizes.context * KV_HEADS * ROW_BYTES
    name = f"paged_decode_attention, {sizes.sequences} x {sizes.context}"
    report(name, moved, median_seconds(run, device), limit)


def bench_wire(sizes: Sizes) -> None:
    """The wire's side runs on the CPU everywhere, on one thread."""
    limit = read_limit("cpu")
    x = np.random.default_rng(0).standard_normal((KV_HEADS, sizes.tokens, WIDTH), dtype=np.float32)
    payload, scales, _ = codec.encode(x, codec.Codec.FP8_E4M3)
    fp8_bytes = KV_HEADS * sizes.tokens * ROW_BYTES
    report(
        "codec.encode, fp32 to fp8",
        x.nbytes,
        median_seconds(lambda: codec.encode(x, codec.Codec.FP8_E4M3), "cpu"),
        limit,
    )
    seconds = median_seconds(lambda: codec.decode(payload, scales, codec.Codec.FP8_E4M3), "cpu")
    report("codec.decode, fp8 to fp32", fp8_bytes, seconds, limit)
    place = digest.places(0, 0, np.arange(KV_HEADS)[:, None], np.arange(-(-sizes.tokens // 16)))
    seconds = median_seconds(lambda: digest.frame_digests(payload, scales, place, 1, 16), "cpu")
    report("digest.frame_digests, fp8", fp8_bytes, seconds, limit)


def bench_int4(threads: int, limit: float) -> None:
    """Matrices of 4-bit groups, more than any cache holds, by rows of bfloat16: bytes of their panels."""
    ops = NativeOps(torch.bfloat16, threads)
    stored = [
        Int4Matrix(torch.randint(0, 256, (SIDE, SIDE // 2), dtype=torch.uint8), torch.rand(SIDE, SIDE // 32).half())
        for _ in range(NUM_MATRICES)
    ]
    packed = [ops.pack_int4(matrix) for matrix in stored]
    ops.prepare()
    for rows in (1, 16):
        x = torch.randn(rows, SIDE).bfloat16()
        expected = x.float() @ decoded(stored[0]).t()
        torch.testing.assert_close(
            ops.linear(x, packed[0]).float(), expected, rtol=1e-2, atol=1e-2 * float(expected.std())
        )

        def run(x: torch.Tensor = x) -> None:
            for matrix in packed:
                ops.linear(x, matrix)

        moved = sum(matrix.num_bytes for matrix in packed)
        report(f"linear of 4-bit groups of 32, {rows} rows", moved, median_seconds(run, "cpu"), limit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens stored in one step")
    parser.add_argument("--sequences", type=int, default=16, help="sequences decoded in one step")
    parser.add_argument("--context", type=int, default=2048, help="tokens in each sequence's context")
    sizes = Sizes(**vars(parser.parse_args()))
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    limit = read_limit(device)
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads, reference"
    print(f"{where}; memory reads at {limit / 1e9:.1f} GB/s; {KV_HEADS} KV heads of {WIDTH}, group {GROUP}")
    bench_store(sizes, device, limit)
    bench_attention(sizes, device, limit)
    bench_wire(sizes)
    if device == "cpu":
        bench_int4(torch.get_num_threads(), limit)


if __name__ == "__main__":
    main()
