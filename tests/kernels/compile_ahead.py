"""Compiles every kernel for every target, without a GPU, and prints what came out. Run by test_ahead_of_time.py."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# One configuration of each kernel: 32 query heads over 8 KV heads of 128, blocks of 16 tokens. Arguments not named are
# int32 scalars or, where their name ends in _ptr, pointers to the type in `pointers`.
CONFIGS: dict[str, dict[str, Any]] = {
    "_store_kv_kernel": {
        "pointers": {"slots_ptr": "i64", "non_finite_ptr": "i32", "k_ptr": "bf16", "v_ptr": "bf16"}
        | {"k_scratch_ptr": "bf16", "v_scratch_ptr": "bf16"},
        "constants": {"HEADS": 8, "WIDTH": 128, "BLOCK_TOKENS": 16, "HEADS_PADDED": 8, "WIDTH_PADDED": 128},
        "num_warps": 4,
    },
    "_attend_split_kernel": {
        "pointers": {"q_ptr": "bf16", "tables_ptr": "i32", "contexts_ptr": "i32"}
        | {"out_ptr": "fp32", "top_ptr": "fp32", "total_ptr": "fp32"},
        "scalars": {"score_scale": "fp32"},
        "constants": {"KV_HEADS": 8, "GROUP": 4, "WIDTH": 128, "BLOCK_TOKENS": 16, "GROUP_PADDED": 16}
        | {"WIDTH_PADDED": 128, "SPLIT": 256, "TILE": 64, "INTERPRETED": False},
        "num_warps": 4,
    },
    "_combine_splits_kernel": {
        "pointers": {"parts_ptr": "fp32", "top_ptr": "fp32", "total_ptr": "fp32"}
        | {"contexts_ptr": "i32", "out_ptr": "bf16"},
        "constants": {"Q_HEADS": 32, "WIDTH": 128, "WIDTH_PADDED": 128, "SPLIT": 256},
        "num_warps": 1,
    },
}  # fmt: skip


def kernels_of(module: ModuleType) -> dict[str, Any]:
    """What the module launches: its own jitted functions named *_kernel."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, triton.runtime.JITFunction) and name.endswith("_kernel")
    }


def compile_kernel(kernel: Any, config: dict[str, Any], target: GPUTarget) -> dict[str, Any]:
    """Artefacts and metadata; options as the wrappers launch them."""
    types = {}
    for name in kernel.arg_names:
        if name in config["constants"]:
            types[name] = "constexpr"
        elif name.endswith("_ptr"):
            types[name] = "*" + config["pointers"].get(name, "u8")
        else:
            types[name] = config.get("scalars", {}).get(name, "i32")
    options = {"num_warps": config["num_warps"], "enable_fp_fusion": False}
    compiled = triton.compile(ASTSource(kernel, types, constexprs=config["constants"]), target=target, options=options)
    ptx = compiled.asm.get("ptx", "")
    return {
        "artefacts": {name: len(code) for name, code in compiled.asm.items() if name in ("cubin", "hsaco")},
        "shared_bytes": compiled.metadata.shared,
        "fp_fusion": compiled.metadata.enable_fp_fusion,
        "fused": "fma.rn.f32" in ptx,
    }


def main() -> None:
    """Print {kernel: {target: result}}; a kernel without a configuration fails."""
    results: dict[str, dict[str, Any]] = {}
    for path in sorted(Path(sys.argv[1]).glob("*.py")):
        for name, kernel in kernels_of(importlib.import_module(f"twostroke.kernels.{path.stem}")).items():
            results[name] = {arch: compile_kernel(kernel, CONFIGS[name], target) for arch, target in TARGETS.items()}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
