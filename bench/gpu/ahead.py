"""Compiles what the wrappers launch, for any target, on a machine without a GPU, and reads what it costs.

The wrappers run on tensors without memory while a recorder stands in for the launch: so the types, constants and
options compiled here are those of a real run. `python bench/gpu/ahead.py` prints the results as JSON, `--all` of every
configuration for every target; `--quick` of one shape for some targets; without both those that `make targets` needs.
Knows no timing.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from twostroke.kernels.gpu import (
    activation,
    launch,
    move_tokens,
    norm,
    paged_decode,
    ragged_prefill,
    rotary_store,
    store_kv,
)
from twostroke.kernels.reference import Activation, Planes
from twostroke.kernels.reference_attention import Chunk
from twostroke.kernels.reference_kv import DigestKeys, Rotation, Seal

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TYPES = {
    torch.bfloat16: "bf16", torch.float32: "fp32", torch.uint8: "u8",
    torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
_TOKENS, _SEQUENCES, _BLOCK_TOKENS = 64, 4, 16


@dataclass(frozen=True)
class Shape:
    """A model's part of a kernel's configuration."""

    q_heads: int
    kv_heads: int
    width: int
    hidden: int
    ffn: int
    codec: str = "fp8"
    turned: int | None = None  # numbers of a head that rotate; all if None
    window: int | None = None
    softcap: float | None = None
    gemma: bool = False
    sinks: bool = False  # as gpt-oss, with its clamped gate

    @property
    def activation(self) -> Activation:
        """Of its feed-forward layers."""
        return "gelu_tanh" if self.gemma else "clamped_swiglu" if self.sinks else "silu"

    def tensor(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def planes(self, *lead: int) -> Planes:
        shape = (*lead, 256, self.kv_heads, _BLOCK_TOKENS)
        if self.codec == "bf16":
            return Planes(self.tensor(*shape, 2 * self.width, dtype=torch.uint8), None)
        payload, scales = (self.tensor(*sizes, dtype=torch.uint8) for sizes in ((*shape, self.width), shape))
        return Planes(payload, scales, {"int8": "int8", "e5m2": "e5m2"}.get(self.codec))  # type: ignore[arg-type]


SHAPES = {
    "llama-3-8b, fp8": Shape(32, 8, 128, 4096, 14336),
    "llama-3-8b, bf16": Shape(32, 8, 128, 4096, 14336, codec="bf16"),
    "llama-3-8b, int8": Shape(32, 8, 128, 4096, 14336, codec="int8"),
    "llama-3-8b, e5m2": Shape(32, 8, 128, 4096, 14336, codec="e5m2"),
    "qwen2.5-0.5b, fp8": Shape(14, 2, 64, 896, 4864),
    "phi-3-mini, fp8": Shape(32, 32, 96, 3072, 8192, turned=72, window=2047),
    "gemma-2-9b, fp8": Shape(16, 8, 256, 3584, 14336, window=4096, softcap=50.0, gemma=True),
    "gemma-2-9b, bf16": Shape(16, 8, 256, 3584, 14336, codec="bf16", window=4096, softcap=50.0, gemma=True),
    "gpt-oss-20b, fp8": Shape(64, 8, 64, 2880, 2880, window=128, sinks=True),
}
REPRESENTATIVE = "llama-3-8b, fp8"


def calls(shape: Shape) -> dict[str, Callable[[], object]]:
    """Every launch that serves a model of this shape, by name."""
    x, weight, heads = (shape.tensor(*sizes) for sizes in ((_TOKENS, shape.hidden), (shape.hidden,), (shape.width,)))
    fused = shape.tensor(_TOKENS, shape.q_heads + 2 * shape.kv_heads, shape.width)
    q, k, v = fused.split([shape.q_heads, shape.kv_heads, shape.kv_heads], dim=1)
    slots = shape.tensor(_TOKENS, dtype=torch.int64)
    planes = {"k_planes": shape.planes(), "v_planes": shape.planes()}
    half = (shape.turned or shape.width) // 2
    turn = Rotation(slots, *(shape.tensor(8192, half, dtype=torch.float32) for _ in range(2)))
    words = planes["k_planes"].payload.shape[-1] // 4
    keys = DigestKeys(*(shape.tensor(*sizes, dtype=torch.int64) for sizes in ((16, words), (16,), (2,))))
    tables, lengths = shape.tensor(_SEQUENCES, 64, dtype=torch.int32), shape.tensor(_SEQUENCES, dtype=torch.int32)
    rules: dict[str, Any] = {"scale": 0.1, "window": shape.window, "softcap": shape.softcap}
    if shape.sinks:
        rules["sinks"] = shape.tensor(shape.q_heads, dtype=torch.float32)
    queries = shape.tensor(_TOKENS, shape.q_heads, shape.width)
    chunk = Chunk(*(shape.tensor(_TOKENS, shape.kv_heads, shape.width) for _ in range(2)))
    ragged = {"query_starts": shape.tensor(_SEQUENCES + 1, dtype=torch.int32), **rules}
    args = planes["k_planes"], planes["v_planes"], tables, lengths
    store, table = shape.planes(2), shape.tensor(8, dtype=torch.int64)
    ranges = range(100), range(shape.kv_heads)
    return {
        "rms_norm": lambda: norm.rms_norm(x, weight, 1e-5, unit_offset=shape.gemma),
        "rms_norm of heads": lambda: norm.rms_norm(q, heads, 1e-5, unit_offset=shape.gemma),
        "add_rms_norm": lambda: norm.add_rms_norm(x, x, weight, 1e-5, unit_offset=shape.gemma),
        "act_mul": lambda: activation.act_mul(shape.tensor(_TOKENS, 2 * shape.ffn), shape.activation),
        "store_kv": lambda: store_kv.store_kv(k, v, slots, planes["k_planes"], planes["v_planes"]),
        "rotary_store_kv": lambda: rotary_store.rotary_store_kv(q, k, v, slots, turn, **planes, seal=Seal(keys, 3)),
        "paged_decode_attention": lambda: paged_decode.paged_decode_attention(queries[:_SEQUENCES], *args, **rules),
        "ragged_prefill_attention": lambda: ragged_prefill.ragged_prefill_attention(
            queries, *args, **ragged, chunk=chunk
        ),
        "ragged_prefill_attention, not precise": lambda: ragged_prefill.ragged_prefill_attention(
            queries, *args, **ragged, chunk=chunk, precise=False
        ),
        "ragged_prefill_attention, no scratch": lambda: ragged_prefill.ragged_prefill_attention(
            queries, *args, **ragged
        ),
        "gather_tokens": lambda: move_tokens.gather_tokens(store, table, *ranges),
        "scatter_tokens": lambda: move_tokens.scatter_tokens(
            store, table, *ranges, move_tokens.gather_tokens(store, table, *ranges)
        ),
    }


# For the tests: a launch of every kernel.
QUICK = ("add_rms_norm", "act_mul", "store_kv", "rotary_store_kv", "gather_tokens")
ATTENTION = ("paged_decode_attention", "ragged_prefill_attention")
WIDEST = "gemma-2-9b, bf16"


@dataclass(frozen=True)
class Recorded:
    """One launch: what the compiler needs of it."""

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, Any]


def record(action: Callable[[], object], arch: str) -> list[Recorded]:
    """The launches of an action, were it run on `arch`."""
    found: list[Recorded] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        found.append(_recorded(self, args, named))

    honest, architecture = JITFunction.run, launch.architecture
    JITFunction.run, launch.architecture = run, lambda device: arch
    try:
        action()
    finally:
        JITFunction.run, launch.architecture = honest, architecture
    return found


def _recorded(kernel: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Recorded:
    values = dict(zip(kernel.arg_names, args, strict=False)) | {n: v for n, v in named.items() if n in kernel.arg_names}
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, param in enumerate(kernel.params):
        value = values[param.name]
        special = not param.do_not_specialize
        if param.is_constexpr or (special and isinstance(value, int) and value == 1):
            types[param.name], constants[param.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[param.name] = "*" + _TYPES[value.dtype]
            attributes[index,] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            types[param.name] = "i32" if abs(value) < 1 << 31 else "i64"
            if special and value % 16 == 0:
                attributes[index,] = [["tt.divisibility", 16]]
        else:
            types[param.name] = "fp32"
    options = {name: value for name, value in named.items() if name not in kernel.arg_names}
    return Recorded(kernel, types, constants, attributes, options)


def compile_launch(found: Recorded, target: str) -> dict[str, Any]:
    """Machine code for a target: its size, registers, spilled bytes of a thread and shared memory of a block."""
    source = ASTSource(found.kernel, found.types, constexprs=found.constants, attrs=found.attributes)
    compiled = triton.compile(source, target=TARGETS[target], options=found.options)
    ptx = compiled.asm.get("ptx", "")
    usage = _amd_usage(compiled.asm["amdgcn"]) if "amdgcn" in compiled.asm else _nvidia_usage(compiled.asm["cubin"])
    return {
        "kernel": found.kernel.__name__,
        "target": target,
        "code_bytes": len(compiled.asm.get("cubin") or compiled.asm["hsaco"]),
        **usage,
        "shared_bytes": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "stages": compiled.metadata.num_stages,
        "fusion": compiled.metadata.enable_fp_fusion,
        "fused": "fma.rn.f32" in ptx,
    }


def _nvidia_usage(cubin: bytes) -> dict[str, int]:
    """Registers and stack (where spilled registers go) of a thread, by the cuobjdump of triton's wheel."""
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = str(bundled) if bundled.exists() else shutil.which("cuobjdump")
    if tool is None:
        raise RuntimeError("no cuobjdump: neither in triton's wheel nor on the PATH")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {text[-300:]}")
    registers, stack, local = map(int, found.groups())
    return {"registers": registers, "spilled_bytes": stack + local}


def _amd_usage(text: str) -> dict[str, int]:
    """Vector registers and spilled ones (4 bytes each) of a thread, from the assembly's own metadata."""
    counts = {name: int(value) for name, value in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text)}
    return {"registers": counts["vgpr_count"], "spilled_bytes": 4 * counts["vgpr_spill_count"]}


def compile_shape(job: tuple[str, str, tuple[str, ...]]) -> list[dict[str, Any]]:
    """Compile the named calls of one shape for one target; each kernel and set of constants once."""
    shape, target, names = job
    results, seen = [], set()
    for name, action in calls(SHAPES[shape]).items():
        if name not in names:
            continue
        for found in record(action, target):
            key = (found.kernel.__name__, *map(str, (found.types, found.constants, found.attributes, found.options)))
            if key not in seen:
                seen.add(key)
                results.append({"call": name, "shape": shape} | compile_launch(found, target))
    return results


def jobs(
    everything: bool, targets: Sequence[str] = tuple(TARGETS), quick: bool = False
) -> list[tuple[str, str, tuple[str, ...]]]:
    """What to compile. For the tests: one shape for these targets, and unless `quick` other shapes' attention."""
    if everything:
        names = dict.fromkeys(SHAPES, (*ATTENTION, "rotary_store_kv"))
        names[REPRESENTATIVE] = tuple(calls(SHAPES[REPRESENTATIVE]))
        return [(shape, target, names[shape]) for shape in SHAPES for target in TARGETS]
    found = [(REPRESENTATIVE, target, (*QUICK, *ATTENTION)) for target in targets]
    if quick:
        return found
    if "sm_90" in targets:
        found += [(shape, "sm_90", ATTENTION) for shape in SHAPES if shape != REPRESENTATIVE]
    # The widest heads are what the 99 KiB of a block could be too small for.
    return found + [(WIDEST, target, ATTENTION[1:]) for target in launch.LIMITED if target in targets]


def compile_all(
    everything: bool, targets: Sequence[str] = tuple(TARGETS), processes: int = 2, quick: bool = False
) -> list[dict[str, Any]]:
    with ProcessPoolExecutor(processes) as pool:
        return [result for results in pool.map(compile_shape, jobs(everything, targets, quick)) for result in results]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every shape for every target (minutes)")
    parser.add_argument("--quick", action="store_true", help="one shape for each target")
    parser.add_argument("targets", nargs="*", default=[*TARGETS], help="such as sm_90; without --all (default: all)")
    given = parser.parse_args()
    print(json.dumps(compile_all(given.all, given.targets, quick=given.quick)))


if __name__ == "__main__":
    main()
