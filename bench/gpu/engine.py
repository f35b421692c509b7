"""`python bench/gpu/engine.py [--out DIR] [--interpret]`: the engine end to end on a Llama-3-8B shape, random weights.

Steps as the worker runs them: plan in, kernels, graphs, greedy tokens out, seals. Times are the host's, from plan to
tokens, so that everything counts. Beside them stand the limits of the machine, measured in the same run: a decode step
reads weights and KV at the speed of reads, a prefill multiplies at the speed of a large product. Needs torch, triton,
numpy and safetensors.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent

if TYPE_CHECKING:
    from llama import Engine, Shape

CACHES = ("fp8", "bfloat16")


def run(directory: Path | None, *, interpret: bool = False) -> dict[str, Any]:
    """Measure everything and write engine.json and engine.md to a directory. Interpreted: right or wrong, no speed."""
    from llama import Shape, random_weights

    from twostroke.model.ops.triton_ops import TritonOps

    shape = Shape.tiny() if interpret else Shape.llama_8b()
    data: dict[str, Any] = {"shape": vars(shape), "limits": {}, "caches": {}}
    if not interpret:
        from measure import limits

        data["limits"] = limits()
    import torch

    ops = TritonOps(torch.bfloat16, shape.device)
    data["arithmetic"] = ops.description
    weights = random_weights(shape, ops)
    for cache in CACHES:
        if not interpret:  # what came before holds no memory that a batch would be left out for
            gc.collect()
            torch.cuda.empty_cache()
        data["caches"][cache] = run_cache(shape, ops, weights, cache, data["limits"])
        save(directory, data)  # what is measured stays, whatever comes after
    return data


def run_cache(shape: Shape, ops: Any, weights: Any, cache: str, limits: dict[str, float]) -> dict[str, Any]:
    """Prefill, decode and hand-over with one codec of the cache."""
    from llama import Engine

    batches = [n for n in shape.batches if fits(shape, cache, n)]
    if not batches:
        return {"skipped": f"no room for {shape.batches[0]} contexts beside the weights"}
    began_s = time.perf_counter()
    engine = Engine(shape, ops, weights, cache, batches)
    engine.eager.warm_up()
    warm_s = time.perf_counter() - began_s
    engine.graphs.warm_up()
    found: dict[str, Any] = {"kv_bytes_per_token": engine.store.spec.bytes_per_token}
    found["skipped_batches"] = [n for n in shape.batches if n not in batches]
    if limits:
        found["eager_warm_up_s"] = warm_s
        found["graphs_warm_up_s"] = time.perf_counter() - began_s - warm_s
    found["prefill"] = [prefill(engine, sequences, tokens, limits) for sequences, tokens in shape.prefills]
    tokens = fill(engine, max(batches))
    found["decode"] = [decode(engine, tokens[:n], limits) for n in batches]
    found["padded_tokens_equal"] = (
        generate(engine, engine.eager, tokens[: shape.uneven_batch])[0]
        == (generate(engine, engine.graphs, tokens[: shape.uneven_batch])[0])
    )
    found["hand_over"] = hand_over(engine, limits)
    for line in lines(cache, found):
        print(line, flush=True)
    return found


def fits(shape: Shape, cache: str, batch: int) -> bool:
    """Whether the device has room for that many contexts, and a little more for the step."""
    import torch
    from llama import BLOCK_TOKENS

    if shape.device == "cpu":
        return True
    tokens = max(batch, *(sequences for sequences, _ in shape.prefills)) * (shape.max_len + BLOCK_TOKENS)
    need = tokens * shape.spec.kv_spec(cache).bytes_per_token
    return need + (6 << 30) < torch.cuda.mem_get_info()[0]


def prefill(engine: Engine, sequences: int, tokens: int, limits: dict[str, float]) -> dict[str, Any]:
    """Prompts in one step, several times."""
    seconds = timed(lambda: engine.prefill(0, sequences, tokens), 5 if limits else 1)
    found: dict[str, Any] = {"sequences": sequences, "tokens": tokens}
    if limits:
        limit_s = engine.shape.prefill_flops(sequences, tokens) / limits["bf16_flops_per_s"]
        found |= {"tokens_per_s": sequences * tokens / seconds, "share_of_limit": limit_s / seconds}
    return found


def fill(engine: Engine, num_seqs: int) -> list[int]:
    """Prefill the contexts that decode reads; their first tokens."""
    at_once = max(1, 8192 // engine.shape.context)
    tokens: list[int] = []
    while len(tokens) < num_seqs:
        tokens += engine.prefill(len(tokens), min(at_once, num_seqs - len(tokens)), engine.shape.context)
    return tokens


def generate(engine: Engine, runner: Any, tokens: Sequence[int]) -> tuple[list[list[int]], float]:
    """Tokens of `steps` decode steps from the contexts' ends on, and the median seconds of a step."""
    texts, seconds = [list(tokens)], []
    for i in range(engine.shape.steps):
        began_s = time.perf_counter()
        texts.append(engine.decode(runner, engine.shape.context + i, texts[-1]))
        seconds.append(time.perf_counter() - began_s)
    return texts, statistics.median(seconds[len(seconds) // 4 :])


def decode(engine: Engine, tokens: Sequence[int], limits: dict[str, float]) -> dict[str, Any]:
    """One batch, eagerly and by graphs, from the same state."""
    by_eager, eager_s = generate(engine, engine.eager, tokens)
    by_graphs, graphs_s = generate(engine, engine.graphs, tokens)
    found: dict[str, Any] = {"batch": len(tokens), "tokens_equal": by_eager == by_graphs}
    if limits:
        moved = engine.shape.decode_bytes(len(tokens), engine.store.spec.bytes_per_token)
        limit_s = moved / limits["read_bytes_per_s"]
        for name, seconds in (("eager", eager_s), ("graphs", graphs_s)):
            found[name] = {"tokens_per_s": len(tokens) / seconds, "step_ms": seconds * 1e3}
            found[name]["share_of_limit"] = limit_s / seconds
    return found


def hand_over(engine: Engine, limits: dict[str, float]) -> dict[str, Any]:
    """One context out to pinned host memory, into another store, and from store to store on the device."""
    import torch
    from llama import BLOCK_TOKENS, KEY

    from twostroke.kernels.gpu.move_tokens import gather_tokens, scatter_tokens
    from twostroke.kernels.reference import Planes
    from twostroke.kv.block import BlockId
    from twostroke.kv.section import HeldTokens
    from twostroke.kv.store.store import KvStore

    shape, source, count = engine.shape, engine.store, engine.shape.context
    engine.prefill(0, 1, count)
    num_blocks = -(-count // BLOCK_TOKENS)
    target = KvStore(source.spec, num_blocks, BLOCK_TOKENS, shape.device, KEY, by_kernels=True)
    table = engine.tables[0][:num_blocks]
    mine = HeldTokens(table, (1,) * num_blocks, 0, count)
    theirs = HeldTokens([BlockId(i) for i in reversed(range(num_blocks))], (7,) * num_blocks, 0, count)
    sections = source.read_tokens(mine)
    rounds = 10 if limits else 1
    out_s = timed(lambda: source.read_tokens(mine), rounds)
    in_s = timed(lambda: target.write_tokens(theirs, sections), rounds)
    found: dict[str, Any] = {"tokens": count, "arrived": target.verify(theirs)}
    tables = [torch.tensor(t, device=shape.device) for t in (table, theirs.block_table)]

    def across() -> None:
        for a, b in zip(source._components, target._components, strict=True):
            heads = range(a.component.heads)
            rows = gather_tokens(Planes(a.payload, a.scales), tables[0], range(count), heads)
            scatter_tokens(Planes(b.payload, b.scales), tables[1], range(count), heads, rows)
        if shape.device != "cpu":
            torch.cuda.synchronize()

    for component in target._components:
        component.payload.zero_()
    across_s = timed(across, rounds)
    found["arrived_across"] = target.verify(theirs)
    if limits:
        size = count * source.spec.bytes_per_token
        found |= {
            "to_host_bytes_per_s": size / out_s,
            "from_host_bytes_per_s": size / in_s,
            "device_to_device_bytes_per_s": size / across_s,
        }
    return found


def timed(action: Callable[[], object], rounds: int) -> float:
    """Median host seconds, after a first time."""
    seconds = []
    for _ in range(rounds + 1):
        began_s = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began_s)
    return statistics.median(seconds[1:])


def is_right(data: dict[str, Any]) -> bool:
    """Whether everything that must be equal was."""
    return all(
        found["hand_over"]["arrived"]
        and found["hand_over"]["arrived_across"]
        and all(each["tokens_equal"] for each in found["decode"])
        for found in data["caches"].values()
        if "skipped" not in found
    )


def lines(cache: str, found: dict[str, Any]) -> list[str]:
    """One cache's results, for people."""
    if "skipped" in found:
        return [f"{cache} cache: {found['skipped']}"]
    text = []
    for each in found["prefill"]:
        line = f"{cache} cache, prefill {each['sequences']} x {each['tokens']}"
        if "tokens_per_s" in each:
            line += f": {each['tokens_per_s']:,.0f} tokens/s, {each['share_of_limit']:.0%} of the limit"
        text.append(line)
    for each in found["decode"]:
        line = f"{cache} cache, decode at batch {each['batch']}: tokens equal {each['tokens_equal']}"
        for name in ("eager", "graphs"):
            if name in each:
                speed = each[name]
                line += f"; {name} {speed['tokens_per_s']:,.0f} tokens/s ({speed['step_ms']:.2f} ms a step, "
                line += f"{speed['share_of_limit']:.0%} of the limit)"
        text.append(line)
    text.append(f"{cache} cache, tokens of an uneven batch equal when padded: {found['padded_tokens_equal']}")
    moved = found["hand_over"]
    line = f"{cache} cache, hand-over of {moved['tokens']} tokens: arrived {moved['arrived']}"
    for name in ("to_host", "from_host", "device_to_device"):
        if f"{name}_bytes_per_s" in moved:
            line += f"; {name.replace('_', ' ')} {moved[f'{name}_bytes_per_s'] / 1e9:.1f} GB/s"
    return [*text, line]


def save(directory: Path | None, data: dict[str, Any]) -> None:
    if directory is None:
        return
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "engine.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    text = ["# The engine on a GPU", "", "`python bench/gpu/engine.py`", "", f"{data['arithmetic']}."]
    if data["limits"]:
        read, copy, product = data["limits"].values()
        text += ["", f"Limits of the same run: reads {read / 1e9:.0f} GB/s, copies {copy / 1e9:.0f} GB/s, "]
        text[-1] += f"bf16 products {product / 1e12:.0f} TFLOP/s."
    text += ["", *(f"- {line}" for cache, found in data["caches"].items() for line in lines(cache, found))]
    (directory / "engine.md").write_text("\n".join(text) + "\n", encoding="utf-8")


def main() -> int:
    """Return 0 where every token and byte was right."""
    import importlib.util

    parser = argparse.ArgumentParser(prog="python bench/gpu/engine.py", description=__doc__)
    parser.add_argument("--interpret", action="store_true", help="a tiny shape in Triton's interpreter, no speed")
    parser.add_argument("--out", type=Path, help="where the results go")
    arguments = parser.parse_args()
    spec = importlib.util.spec_from_file_location("bench_gpu", HERE / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    interpret = arguments.interpret or not command.has_gpu()
    command.prepare(interpret)
    return 0 if is_right(run(arguments.out, interpret=interpret)) else 1


if __name__ == "__main__":
    sys.exit(main())
