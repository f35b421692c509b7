"""`python bench/gpu [--out DIR] [--interpret]`: one command for a machine that has torch and triton only.

First what the machine can do (reads, copies, products), then every kernel: held against its definition, then timed in
turn with torch's best for the same work. Then the engine (`bench/gpu/engine.py`, which writes a report of its own and
whose results stand in kernels.json under "engine"). Without a GPU, or with --interpret, tiny shapes of the kernels run
through Triton's interpreter: right or wrong, no speed; `python bench/gpu/engine.py --interpret` does that for the
engine. The kernels need no other part of the project than `kernels/`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "gpu"


def prepare(interpret: bool) -> None:
    """What must be settled before triton is imported: where twostroke is, and who runs its kernels."""
    sys.path.insert(0, str(HERE))
    sys.path.insert(0, str(HERE.parents[1] / "src"))
    if interpret:
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def tensors(answer: Any) -> list[Any]:
    """All tensors of an answer, nested tuples and lists flattened."""
    if answer is None:
        return []
    return [t for part in answer for t in tensors(part)] if isinstance(answer, tuple | list) else [answer]


def error(ours: Any, expected: Any, tolerance: float) -> float:
    """The largest difference of an answer from the definition's, relative to its largest number (0: equal bits).

    Raises:
        AssertionError: it is above the tolerance, or a number is NaN, or the shapes or dtypes differ.
    """
    worst = 0.0
    mine, theirs = tensors(ours), tensors(expected)
    assert len(mine) == len(theirs) > 0, f"{len(mine)} tensors, the definition gives {len(theirs)}"
    for a, b in zip(mine, theirs, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), f"{a.dtype} {a.shape}, must be {b.dtype} {b.shape}"
        if not a.is_floating_point() or tolerance == 0:
            assert bool((a == b).all()), "bits differ from the definition's"
            continue
        assert bool(a.isfinite().all()), "a number is not finite"
        worst = max(worst, float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)))
    assert worst <= tolerance, f"off by {worst:.2e} of the largest number; {tolerance:.2e} is allowed"
    return worst


def check(case: Any) -> float:
    """Run a case once beside its definition."""
    ours = case.ours()
    return error([ours, None if case.after is None else case.after()], case.expected(), case.tolerance)


def timed(case: Any, limits: dict[str, float]) -> dict[str, Any]:
    """Medians of a checked case and of torch's, with what share of the machine's limit ours reaches."""
    from measure import interleaved_seconds

    times = interleaved_seconds({"ours": case.ours} | case.theirs)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ours = medians.pop("ours")
    floor = max(case.moved_bytes / limits["read_bytes_per_s"], case.flops / limits["bf16_flops_per_s"])
    return {
        "seconds": ours,
        "bytes_per_s": case.moved_bytes / ours,
        "flops_per_s": case.flops / ours,
        "share_of_limit": floor / ours,
        "torch_seconds": medians,
        "speed_over_best_torch": min(medians.values()) / ours if medians else None,
    }


def run_kernels(interpret: bool, limits: dict[str, float]) -> list[dict[str, Any]]:
    """Check and, on a GPU, time every case. A wrong one is reported as such, with no speed."""
    import torch
    from cases import Sizes, cases

    results = []
    torch.manual_seed(0)
    for case in cases(Sizes.tiny() if interpret else Sizes.llama_8b()):
        found: dict[str, Any] = {"name": case.name}
        try:
            found["error"] = check(case)
            found["right"] = True
            found |= {} if interpret else timed(case, limits)
        except Exception as failure:  # one kernel's failure must not hide the others
            found |= {"right": False, "failure": f"{type(failure).__name__}: {str(failure)[:500]}"}
        results.append(found)
        print(line(found), flush=True)
    return results


def line(found: dict[str, Any]) -> str:
    if not found["right"]:
        return f"WRONG {found['name']}: {found['failure']}"
    text = f"right {found['name']:<60} error {found['error']:.1e}"
    if "seconds" not in found:
        return text
    text += f" {found['seconds'] * 1e6:>9.1f} µs {found['bytes_per_s'] / 1e9:>7.0f} GB/s"
    if found["flops_per_s"]:
        text += f" {found['flops_per_s'] / 1e12:>6.1f} TFLOP/s"
    text += f" {found['share_of_limit']:>5.0%} of the limit"
    ratio = found["speed_over_best_torch"]
    return text if ratio is None else f"{text}, {ratio:.2f} x torch's best"


def facts(interpret: bool) -> dict[str, Any]:
    import torch
    import triton

    device = "Triton's interpreter, CPU" if interpret else torch.cuda.get_device_name()
    return {
        "device": device,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def report(data: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Kernels on a GPU",
        "",
        "`python bench/gpu`",
        "",
        ", ".join(f"{k} {v}" for k, v in data["machine"].items()),
    ]
    if data["limits"]:
        read, copy, product = data["limits"].values()
        lines += [
            "",
            f"Limits measured in the same run: reads {read / 1e9:.0f} GB/s, copies {copy / 1e9:.0f} GB/s, ",
            "",
        ]
        lines[-2] += f"bf16 products {product / 1e12:.0f} TFLOP/s. Medians of interleaved rounds, L2 cold."
    lines += ["", "| kernel | right | error | µs | GB/s | TFLOP/s | of the limit | torch's best, µs | ours over it |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for found in data["kernels"]:
        cells = [found["name"], "yes" if found["right"] else "**no**"]
        cells.append(
            f"{found['error']:.1e}" if "error" in found else found["failure"].replace("|", "/").splitlines()[0]
        )
        if "seconds" in found:
            flops = f"{found['flops_per_s'] / 1e12:.1f}" if found["flops_per_s"] else ""
            cells += [f"{found['seconds'] * 1e6:.1f}", f"{found['bytes_per_s'] / 1e9:.0f}", flops]
            cells.append(f"{found['share_of_limit']:.0%}")
            if found["torch_seconds"]:
                name, best = min(found["torch_seconds"].items(), key=lambda item: item[1])
                cells += [f"{best * 1e6:.1f} ({name})", f"{found['speed_over_best_torch']:.2f} x"]
        lines.append("| " + " | ".join(cells + [""] * (9 - len(cells))) + " |")
    for name, value in data["facts"].items():
        lines += ["", f"{name}: {value}"]
    return "\n".join(lines) + "\n"


def save(directory: Path, data: dict[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "kernels.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (directory / "kernels.md").write_text(report(data), encoding="utf-8")
    print(f"written to {directory}", flush=True)


def main() -> int:
    """Return 0 where every kernel was right, and the engine."""
    parser = argparse.ArgumentParser(prog="python bench/gpu", description=__doc__)
    parser.add_argument("--interpret", action="store_true", help="check tiny shapes in Triton's interpreter, no speed")
    parser.add_argument(
        "--out", type=Path, help=f"where the results go (default {RESULTS.relative_to(HERE.parents[1])})"
    )
    arguments = parser.parse_args()
    interpret = arguments.interpret or not has_gpu()
    prepare(interpret)
    data: dict[str, Any] = {"machine": facts(interpret), "limits": {}}
    if not interpret:
        from measure import limits

        data["limits"] = limits()
        print(", ".join(f"{name} {value:.3g}" for name, value in data["limits"].items()), flush=True)
    data["kernels"] = run_kernels(interpret, data["limits"])
    data["facts"] = {}
    if not interpret:  # the interpreter multiplies with BLAS, whose bits are nobody's
        from bits import shared_bits

        data["facts"] = shared_bits("cuda")
    print("\n".join(f"{name}: {value}" for name, value in data["facts"].items()))
    out = arguments.out or (None if interpret else RESULTS)
    if out is not None:
        save(out, data)
    right = all(found["right"] for found in data["kernels"])
    if not interpret:  # `engine.py --interpret` does that, which takes longer
        engine = importlib.import_module("engine")
        data["engine"] = engine.run(out)
        save(out, data)
        right &= engine.is_right(data["engine"])
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
