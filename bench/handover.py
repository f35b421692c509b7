"""The hand-over between two worker processes over both plane channels, beside bare transports, in GB/s.

A random model that caches much and computes little is served by two decode workers per cache codec (one takes planes
over gRPC, one through shared memory) and one prefill
worker per codec and frame size. The prefill workers hold the prompt in their prefix cache, the decode workers keep
none: so every request moves the prompt's whole KV, and computes its last block only. Everything else is production:
store, seals, digests on both sides, envelopes, credits, gRPC, session.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy: for us and all children

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loopback import Loopback
from report import save, spread, table
from workers import CacheShape, Hand, WorkerChild, timeline_of, write_checkpoint

from twostroke.checkpoint.config import ModelConfig
from twostroke.core.request import Epoch, Role
from twostroke.core.timeline import Instant
from twostroke.engine.config import StepConfig
from twostroke.kv.block import BlockId
from twostroke.kv.config import CacheConfig
from twostroke.kv.handover.damage import verify_frame
from twostroke.kv.handover.frames import Frame, FrameLabel, decode_envelope, encode_frame
from twostroke.kv.handover.machine import Label
from twostroke.kv.section import HeldTokens
from twostroke.kv.spec import CODEC_NAMES, HASH_BLOCK_TOKENS, KvSpec, attention_spec
from twostroke.kv.store.store import KvStore
from twostroke.worker.settings import WorkerSettings

TRANSPORTS = ("grpc", "shm")
SHAPE = CacheShape(layers=16, kv_heads=8, head_dim=64)
VOCABULARY = 4000
KEY = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class Case:
    """One codec and one frame size; `frame_tokens` are the whole hash blocks nearest to the wanted bytes."""

    codec: str
    frame_tokens: int

    @classmethod
    def near(cls, codec: str, frame_bytes: int) -> Case:
        """Frames of about `frame_bytes`."""
        blocks = round(frame_bytes / spec_of(codec).bytes_per_token / HASH_BLOCK_TOKENS)
        return cls(codec, max(1, blocks) * HASH_BLOCK_TOKENS)

    @property
    def frame_bytes(self) -> int:
        """Planes of one frame."""
        return self.frame_tokens * spec_of(self.codec).bytes_per_token


@dataclass
class Rounds:
    """GB/s (1e9 bytes) of each round of one case."""

    handover: list[float] = field(default_factory=list)  # over gRPC: planes ready → last frame stored
    whole: list[float] = field(default_factory=list)  # bound → last frame stored: with the last block's step
    grpc: list[float] = field(default_factory=list)
    tcp: list[float] = field(default_factory=list)
    shared: list[float] = field(default_factory=list)  # as `handover` and `whole`, through shared memory
    shared_whole: list[float] = field(default_factory=list)
    copy: list[float] = field(default_factory=list)  # into shared memory by one process, out of it by another


def spec_of(codec: str) -> KvSpec:
    """The cache of the random model."""
    return attention_spec(SHAPE.layers, SHAPE.kv_heads, SHAPE.head_dim, CODEC_NAMES[codec])


# ------------------------------------------------------------------ between processes


class Cluster:
    """The workers of all cases, started together."""

    def __init__(self, directory: Path, cases: list[Case], prompt_tokens: int) -> None:
        self._directory = directory
        self._pool_tokens = prompt_tokens + prompt_tokens // 4 + 256
        self._prefill_by_case = {case: self._child(Role.PREFILL, case, "auto") for case in cases}
        largest = {case.codec: case for case in sorted(cases, key=lambda case: case.frame_bytes)}
        self._decode_by_channel = {
            (codec, transport): self._child(Role.DECODE, case, transport)
            for codec, case in largest.items()  # a decode worker takes frames of any size
            for transport in TRANSPORTS
        }
        self._hands: dict[tuple[str, str], Hand] = {}

    def _child(self, role: Role, case: Case, transport: str) -> WorkerChild:
        cache = CacheConfig(
            dtype=case.codec,  # type: ignore[arg-type]
            tokens=self._pool_tokens,
            prefix_caching=role is Role.PREFILL,
            frame_bytes=case.frame_bytes,
            transport=transport,  # type: ignore[arg-type]
        )
        settings = WorkerSettings(
            worker_id=f"{role.value}-{case.codec}-{case.frame_tokens}-{transport}",
            role=role,
            model_directory=str(self._directory),
            model_name="bench",
            model=ModelConfig(path=str(self._directory)),
            cache=cache,
            step=StepConfig(max_num_batched_tokens=1024),
            memory_bytes=4 << 30,
            cluster_key="a key of this measurement",
        )
        return WorkerChild(settings)

    async def __aenter__(self) -> Cluster:
        await asyncio.gather(*(child.serving() for child in self._children()))
        for channel, child in self._decode_by_channel.items():
            self._hands[channel] = await Hand(child).__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(hand.__aexit__() for hand in self._hands.values()), return_exceptions=True)

    def stop(self) -> None:
        """End all children."""
        for child in self._children():
            child.stop()

    async def move(self, case: Case, transport: str, prompt: list[int], *, is_warm: bool) -> tuple[int, float, float]:
        """One hand-over: bytes moved, and seconds from when the planes were ready and from bound to the last frame.

        Raises:
            RuntimeError: `is_warm`, and not all of the prompt travelled so, or some of it was computed.
        """
        end = await self._hands[case.codec, transport].generate(prompt, self._prefill_by_case[case], max_tokens=2)
        report, line = end.handover, timeline_of(end)
        computed = len(prompt) - report.prefill_cached_tokens
        is_whole = report.transport == transport and report.tokens_moved == len(prompt)
        if is_warm and (not is_whole or computed > HASH_BLOCK_TOKENS):
            raise RuntimeError(f"not a hand-over from the prefix cache: {report}")
        bound_s, first_s, last_s = (line.at_s(i) for i in (Instant.BOUND, Instant.FIRST_FRAME, Instant.LAST_FRAME))
        assert bound_s is not None and first_s is not None and last_s is not None, "a hand-over took place"  # noqa: PT018
        ready_s = line.at_s(Instant.PREFILLED)
        if ready_s is None or ready_s > first_s:
            ready_s = bound_s  # frames did not wait for the last block's step
        return report.bytes_moved, last_s - max(ready_s, bound_s), last_s - bound_s

    async def fill(self, prompt: list[int]) -> None:
        """Have every prefill worker compute the prompt once; codecs side by side."""

        async def fill_codec(codec: str) -> None:
            for case in self._prefill_by_case:
                if case.codec == codec:
                    await self.move(case, TRANSPORTS[0], prompt, is_warm=False)

        await asyncio.gather(*map(fill_codec, {case.codec for case in self._prefill_by_case}))

    def _children(self) -> list[WorkerChild]:
        return [*self._prefill_by_case.values(), *self._decode_by_channel.values()]


async def run(cases: list[Case], prompt_tokens: int, num_rounds: int) -> dict[Case, Rounds]:
    """All cases, interleaved: hand-over, gRPC and TCP of one case after the other, round by round."""
    chance = random.Random(1)
    prompt = [chance.randrange(300, VOCABULARY) for _ in range(prompt_tokens)]
    results = {case: Rounds() for case in cases}
    with tempfile.TemporaryDirectory(prefix="twostroke-bench-") as folder, Loopback() as loopback:
        write_checkpoint(Path(folder), SHAPE, 2 * prompt_tokens)
        cluster = Cluster(Path(folder), cases, prompt_tokens)
        try:
            async with cluster:
                await cluster.fill(prompt)
                for number in range(-1, num_rounds):  # round -1 warms channels and caches up and is not counted
                    for case in cases:
                        moved, ready_s, bound_s = await cluster.move(case, "grpc", prompt, is_warm=True)
                        _, shared_s, shared_bound_s = await cluster.move(case, "shm", prompt, is_warm=True)
                        count = -(-moved // case.frame_bytes)
                        total = count * case.frame_bytes
                        grpc_s = await loopback.grpc_s(case.frame_bytes, count)
                        tcp_s = loopback.tcp_s(case.frame_bytes, count)
                        copy_s = loopback.copy_s(case.frame_bytes, count)
                        if number >= 0:
                            rounds = results[case]
                            rounds.handover.append(moved / ready_s / 1e9)
                            rounds.whole.append(moved / bound_s / 1e9)
                            rounds.grpc.append(total / grpc_s / 1e9)
                            rounds.tcp.append(total / tcp_s / 1e9)
                            rounds.shared.append(moved / shared_s / 1e9)
                            rounds.shared_whole.append(moved / shared_bound_s / 1e9)
                            rounds.copy.append(total / copy_s / 1e9)
        finally:
            cluster.stop()
    return results


# ------------------------------------------------------------------ where the time goes


def stages(case: Case, num_rounds: int) -> dict[str, list[float]]:
    """GB/s of each stage of a hand-over alone: in this process, on one thread, frame by frame."""
    import torch

    from twostroke.kernels.reference import store_kv

    torch.set_num_threads(1)
    spec, frames = spec_of(case.codec), 4
    num_blocks = frames * case.frame_tokens // HASH_BLOCK_TOKENS
    source, target = (KvStore(spec, num_blocks, HASH_BLOCK_TOKENS, digest_key=KEY) for _ in range(2))
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).tolist()
    table_of, generations = [BlockId(b) for b in order], [1] * num_blocks
    rows = torch.randn(num_blocks * HASH_BLOCK_TOKENS, SHAPE.kv_heads, SHAPE.head_dim)
    for layer in range(SHAPE.layers):
        store_kv(rows, rows.flip(0), torch.arange(len(rows)), *source.planes(layer))
    source.seal(HeldTokens(table_of, generations, 0, len(rows)))
    label = Label("stages", 0, Epoch(1, 1))
    measured: dict[str, list[float]] = {}

    def timed(name: str, act: Callable[[], Any]) -> Any:
        began_s = time.perf_counter()
        result = act()
        measured.setdefault(name, []).append(case.frame_bytes / (time.perf_counter() - began_s) / 1e9)
        return result

    for number in range(num_rounds * frames):
        start = number % frames * case.frame_tokens
        held = HeldTokens(table_of, generations, start, case.frame_tokens)
        sections = timed("store: read", lambda held=held: source.read_tokens(held))
        frame_label = FrameLabel(label, number + 1, bytes(16), start, case.frame_tokens)
        envelope = timed("frame: encode", lambda a=frame_label, s=sections: encode_frame(a, s, is_last=False))
        frame = timed("frame: decode", lambda e=envelope: decode_envelope(e))
        assert isinstance(frame, Frame)
        assert timed("digests: verify (each side)", lambda f=frame: verify_frame(f, KEY, spec))
        timed("store: write", lambda held=held, f=frame: target.write_tokens(held, f.sections))
    return measured


# ------------------------------------------------------------------ the page


def page(results: dict[Case, Rounds], parts: dict[Case, dict[str, list[float]]], prompt_tokens: int) -> str:
    """Both tables, with what they mean."""
    rows = []
    for case, r in results.items():
        middle, shared = statistics.median(r.handover), statistics.median(r.shared)
        rows.append(
            [
                case.codec,
                f"{case.frame_bytes / 2**20:.2f} MiB",
                spread(r.handover),
                spread(r.whole),
                spread(r.grpc),
                spread(r.tcp),
                f"{middle / statistics.median(r.grpc):.0%}",
                spread(r.shared),
                spread(r.shared_whole),
                spread(r.copy),
                f"{shared / statistics.median(r.copy):.0%}",
            ]
        )
    headings = ["cache", "frame", "gRPC", "from bound", "bare gRPC", "bare TCP", "of bare gRPC"]
    headings += ["shared memory", "from bound", "bare copy", "of copy"]
    names = list(next(iter(parts.values())))
    stage_rows = [
        [case.codec, f"{case.frame_bytes / 2**20:.2f} MiB", *(spread(p[n]) for n in names)] for case, p in parts.items()
    ]
    return (
        f"GB/s (1e9 bytes), median (range) of {len(next(iter(results.values())).tcp)} interleaved rounds. Two worker "
        f"processes; a prompt of {prompt_tokens} tokens whose KV the prefill worker holds; {SHAPE.layers} layers of "
        f"{SHAPE.kv_heads} KV heads of {SHAPE.head_dim}. *gRPC* and *shared memory*: a hand-over, from "
        "when the planes are ready on the prefill worker until the last frame is verified and stored on the decode "
        "worker. *from bound*: from when decode has "
        "bound blocks; the step over the prompt's last block comes before the frames and counts. The bare streams move "
        "the same messages between two processes, and do nothing with them; *bare copy*: one process copies them into "
        "shared memory while another copies them out.\n\n"
        f"{table(headings, rows)}\n\n"
        "Each stage alone, in one process on one thread. A worker's stages run in its engine (store), its loop "
        "(frames) and a pool of threads (digests), side by side where cores allow.\n\n"
        f"{table(['cache', 'frame', *names], stage_rows)}"
    )


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt-tokens", type=int, default=3072)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--frames-kib", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--codecs", choices=tuple(CODEC_NAMES), nargs="+", default=["fp8", "bfloat16"])
    given = parser.parse_args()
    cases = [Case.near(codec, kib << 10) for codec in given.codecs for kib in given.frames_kib]
    results = asyncio.run(run(cases, given.prompt_tokens, given.rounds))
    parts = {case: stages(case, given.rounds) for case in cases}
    body = page(results, parts, given.prompt_tokens)
    data = {
        "prompt_tokens": given.prompt_tokens,
        "cases": [
            {"codec": c.codec, "frame_bytes": c.frame_bytes, "stages": parts[c]}
            | {name: getattr(r, name) for name in Rounds.__dataclass_fields__}
            for c, r in results.items()
        ],
    }
    print(body, save("handover", "The hand-over beside bare streams", body, data), sep="\n")


if __name__ == "__main__":
    main()
