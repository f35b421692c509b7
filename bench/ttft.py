"""Time to first and second token of one request, disaggregated beside one piece, term by term.

The prefill worker is a process pinned to one core and the decode worker one pinned to the other; the worker that does
both is pinned to one core alike. This process has the decode worker's core, or the one that the single worker leaves
idle. One request at a time, rounds interleaved. The reference checkpoint of 254 M parameters (bench/engine).
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy: for us and all children

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "engine"))

from report import save, spread, table
from workers import Hand, WorkerChild, timeline_of

import checkpoint
from twostroke.checkpoint.config import ModelConfig
from twostroke.core.request import Role
from twostroke.core.timeline import Instant
from twostroke.engine.config import StepConfig
from twostroke.kv.config import CacheConfig
from twostroke.kv.keys import digest_key
from twostroke.protos import worker_pb2
from twostroke.worker.settings import WorkerSettings

CHECKPOINTS = Path(__file__).resolve().parents[1] / ".bench-envs" / "checkpoint"
TOKENS = 8  # generated per request
TERMS = (
    ("promised", Instant.RECEIVED, Instant.PROMISED),
    ("asked and queued", Instant.PROMISED, Instant.STARTED),
    ("blocks bound", Instant.STARTED, Instant.BOUND),
    ("first chunk began", Instant.BOUND, Instant.PREFILL_BEGAN),
    ("prefill", Instant.PREFILL_BEGAN, Instant.PREFILLED),
    ("first token to decode", Instant.PREFILLED, Instant.FIRST_TOKEN),
)


def long_checkpoint(folder: Path, max_len: int) -> Path:
    """The reference checkpoint with room for longer prompts: the same weights, another config."""
    source = checkpoint.ensure(CHECKPOINTS)
    for path in source.iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path.resolve())
    config = json.loads((source / "config.json").read_text()) | {"max_position_embeddings": max_len}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def child(name: str, role: Role, directory: Path, core: int, given: argparse.Namespace) -> WorkerChild:
    """A worker pinned to one core: all its threads, those of gRPC and digests too."""
    cores = os.sched_getaffinity(0)
    settings = WorkerSettings(
        worker_id=name,
        role=role,
        model_directory=str(directory),
        model_name="bench",
        model=ModelConfig(path=str(directory)),
        cache=CacheConfig(tokens=2 * given.prompt_tokens + 1024, prefix_caching=False, transport=given.transport),
        step=StepConfig(max_num_batched_tokens=given.chunk_tokens),
        memory_bytes=6 << 30,
        cluster_key="a key of this measurement",
    )
    os.sched_setaffinity(0, {core})
    try:
        return WorkerChild(settings)
    finally:
        os.sched_setaffinity(0, cores)


class Timed(Hand):
    """A session that notes when each token came, in seconds since the order was sent."""

    async def timed(
        self, prompt: list[int], peer: WorkerChild | None
    ) -> tuple[list[float], list[int], worker_pb2.RequestEnd]:
        """Order one request; None: without a prefill worker."""
        came_s: list[float] = []
        ids: list[int] = []
        read, began_s = self._call.read, time.perf_counter()

        async def noting() -> object:
            message = await read()
            if isinstance(message, worker_pb2.SessionDown):
                for output in message.step.tokens:
                    came_s.extend([time.perf_counter() - began_s] * len(output.token_ids))
                    ids.extend(output.token_ids)
            return message

        self._call.read = noting
        try:
            end = await self.generate(prompt, peer, TOKENS)
        finally:
            self._call.read = read
        return came_s, ids, end


async def run(given: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Interleaved rounds; milliseconds."""
    rounds: dict[str, list[dict[str, float]]] = {"disaggregated": [], "one piece": []}
    chance = random.Random(1)
    first, second = sorted(os.sched_getaffinity(0))[:2]
    with tempfile.TemporaryDirectory(prefix="twostroke-bench-") as name:
        directory = long_checkpoint(Path(name), given.prompt_tokens + 256)
        prefill = child("prefill", Role.PREFILL, directory, first, given)
        decode = child("decode", Role.DECODE, directory, second, given)
        whole = child("whole", Role.COMBINED, directory, first, given)
        workers = (prefill, decode, whole)
        try:
            await asyncio.gather(*(worker.serving() for worker in workers))
            os.sched_setaffinity(0, {second})
            async with Timed(decode) as apart, Timed(whole) as together:
                for number in range(-1, given.rounds):
                    prompt = [chance.randrange(300, checkpoint.VOCABULARY) for _ in range(given.prompt_tokens)]
                    answers = {
                        "disaggregated": await apart.timed(prompt, prefill),
                        "one piece": await together.timed(prompt, None),
                    }
                    texts = {tuple(ids) for _, ids, _ in answers.values()}
                    if len(texts) != 1:
                        raise RuntimeError(f"the two disagree: {texts}")
                    for kind, (came_s, _, end) in answers.items():
                        if number >= 0:
                            rounds[kind].append(figures(came_s, end))
        finally:
            os.sched_setaffinity(0, {first, second})
            for worker in workers:
                worker.stop()
    return rounds


def figures(came_s: list[float], end: worker_pb2.RequestEnd) -> dict[str, float]:
    """Milliseconds of one request, and what its hand-over moved."""
    line, report = timeline_of(end), end.handover
    found = {"ttft": came_s[0] * 1e3, "second token": (came_s[1] - came_s[0]) * 1e3}
    for name, start, stop in TERMS:
        span_s = line.between_s(start, stop)
        if span_s is not None:
            found[name] = span_s * 1e3
    last_s, prefilled_s = line.at_s(Instant.LAST_FRAME), line.at_s(Instant.PREFILLED)
    first_s = line.at_s(Instant.FIRST_FRAME)
    if report.bytes_moved and last_s is not None and prefilled_s is not None and first_s is not None:
        found["first frame before prefilled"] = (prefilled_s - first_s) * 1e3
        found["last frame after prefilled"] = (last_s - prefilled_s) * 1e3
        found["MB moved"] = report.bytes_moved / 1e6
    return found


def digest_ms(prompt_tokens: int) -> float:
    """Milliseconds to digest the KV of one prompt once, on one thread, in a store of the model's shape."""
    from twostroke.kv.block import BlockId
    from twostroke.kv.section import HeldTokens
    from twostroke.kv.spec import CODEC_NAMES, HASH_BLOCK_TOKENS, attention_spec
    from twostroke.kv.store.store import KvStore

    spec = attention_spec(checkpoint.LAYERS, checkpoint.KV_HEADS, checkpoint.HEAD_DIM, CODEC_NAMES["fp8"])
    blocks = -(-prompt_tokens // HASH_BLOCK_TOKENS)
    store = KvStore(spec, blocks, HASH_BLOCK_TOKENS, digest_key=digest_key("a key of this measurement"))
    held = HeldTokens([BlockId(block) for block in range(blocks)], [1] * blocks, 0, prompt_tokens)
    store.seal(held)
    spent = []
    for _ in range(5):
        began_s = time.perf_counter()
        assert store.verify(held)
        spent.append((time.perf_counter() - began_s) * 1e3)
    return statistics.median(spent)


def page(rounds: dict[str, list[dict[str, float]]], given: argparse.Namespace, digest: float) -> str:
    """The table, and how far the goals are reached."""
    names = list(dict.fromkeys(name for found in rounds.values() for one in found for name in one))
    rows = []
    for name in names:
        cells = [[one[name] for one in found if name in one] for found in rounds.values()]
        rows.append([name, *(spread(values) if values else "" for values in cells)])
    middle = {
        kind: {name: statistics.median(one[name] for one in found) for name in found[0]}
        for kind, found in rounds.items()
    }
    apart, whole = middle["disaggregated"], middle["one piece"]
    late, computed = apart["last frame after prefilled"], apart["prefill"]
    hidden = 1 - late / max(late + apart["first frame before prefilled"], 1e-9)
    return (
        f"Milliseconds, median (range) of {given.rounds} interleaved rounds; prompts of {given.prompt_tokens} random "
        f"tokens in chunks of {given.chunk_tokens}, planes over {given.transport}; every worker pinned to one core. "
        f"Terms are differences of the request's instants; *ttft* and *second token* (after it) are the client's.\n\n"
        f"{table(['ms', *rounds], rows)}\n\n"
        f"- TTFT {apart['ttft']:.0f} ms; 1.05 x one piece + 5 ms = {1.05 * whole['ttft'] + 5:.0f} ms.\n"
        f"- Second token {apart['second token'] - whole['second token']:+.1f} ms beside one piece (goal: at most 10).\n"
        f"- Of the time in which frames travelled, {hidden:.0%} lay under the computation of {computed:.0f} ms "
        f"(goal: 90 %).\n"
        f"- Digests: {digest:.1f} ms per pass over the prompt's KV; three passes (seal, send, receive) are "
        f"{3 * digest / apart['ttft']:.1%} of TTFT (goal: 3 %).\n"
    )


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt-tokens", type=int, default=2500)
    parser.add_argument("--chunk-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--transport", choices=("auto", "grpc", "shm"), default="auto")
    given = parser.parse_args()
    rounds = asyncio.run(run(given))
    body = page(rounds, given, digest_ms(given.prompt_tokens))
    name = "ttft" if given.transport == "auto" else f"ttft_{given.transport}"
    print(body, save(name, "TTFT, disaggregated beside one piece", body, {"rounds": rounds}), sep="\n")


if __name__ == "__main__":
    main()
