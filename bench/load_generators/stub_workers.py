"""Workers without a model, with a fixed step curve, that speak the cluster's protocol: a router's load can be measured.

    TWOSTROKE__CLUSTER__KEY=... python bench/load_generators/stub_workers.py 127.0.0.1:8002 [--workers 2] [--seats 8]

A step takes `--step-ms` and `--seq-ms` more for each sequence in it, and a prompt token `--token-ms`; a worker runs at
most `--seats` sequences and lets others wait, in order. So the capacity of the cluster is known exactly.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from support.fakes.fake_worker import FakeWorker  # noqa: E402

from twostroke.kv.keys import proof_key  # noqa: E402
from twostroke.protos import common_pb2, worker_pb2  # noqa: E402

REPORT_S = 0.1


@dataclass(frozen=True)
class Curve:
    """Time of a step, and how many sequences it may have."""

    step_ms: float = 20.0
    seq_ms: float = 0.5
    token_ms: float = 0.01  # per prompt token
    seats: int = 8

    def step_s(self, num_seqs: int, prompt_tokens: int) -> float:
        """Seconds of one step."""
        return (self.step_ms + self.seq_ms * num_seqs + self.token_ms * prompt_tokens) / 1e3

    def capacity_per_s(self, prompt_tokens: int, output_tokens: int) -> float:
        """Requests per second of one worker whose seats are all taken."""
        seconds = output_tokens * self.step_s(self.seats, 0) + self.seats * prompt_tokens * self.token_ms / 1e3
        return self.seats / seconds


@dataclass(slots=True)
class _Running:
    order: worker_pb2.Submit
    num_tokens: int = 0


@dataclass
class StubWorker(FakeWorker):
    """One worker; `start` it, then `run` its steps."""

    curve: Curve = field(default_factory=Curve)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._waiting: deque[_Running] = deque()
        self._seated: list[_Running] = []
        self._new = asyncio.Event()
        self._steps = 0

    def info(self) -> common_pb2.WorkerInfo:
        """What it announces."""
        message = super().info()
        message.max_num_seqs = self.curve.seats
        message.model.path = str(ROOT / "model" / "bundled")
        message.model.vocab_size = 4096
        return message

    def take(self, order: worker_pb2.Submit) -> None:
        """Take an order."""
        self._waiting.append(_Running(order))
        self._new.set()

    def cancel(self, order: worker_pb2.CancelRequest) -> None:
        """End all choices of a request."""
        self._waiting = deque(one for one in self._waiting if one.order.request_id != order.request_id)
        self._seated = [one for one in self._seated if one.order.request_id != order.request_id]

    def report(self) -> worker_pb2.LoadReport:
        """Its load and its measured speed."""
        message = super().report()
        message.running, message.waiting = len(self._seated), len(self._waiting)
        message.queued_prefill_tokens = sum(len(one.order.prompt_ids) for one in self._waiting)
        message.decode_step_ms = self.curve.step_s(max(1, len(self._seated)), 0) * 1e3
        message.prefill_ms_per_token = self.curve.token_ms
        message.steps = self._steps
        return message

    async def run(self) -> None:
        """Step for ever, at exact times: a step that was late makes the next one begin late, and not take longer."""
        loop = asyncio.get_running_loop()
        reported_s = ends_s = loop.time()
        while True:
            if not (self._seated or self._waiting):
                self._new.clear()
                self.push_load()
                await self._new.wait()
                ends_s = loop.time()
            prompts = 0
            while self._waiting and len(self._seated) < self.curve.seats:
                one = self._waiting.popleft()
                prompts += len(one.order.prompt_ids)
                self._seated.append(one)
            ends_s += self.curve.step_s(len(self._seated), prompts)
            await asyncio.sleep(max(0.0, ends_s - loop.time()))
            self._step()
            if loop.time() - reported_s > REPORT_S:
                reported_s = loop.time()
                self.push_load()

    def _step(self) -> None:
        self._steps += 1
        message = worker_pb2.SessionDown()
        for one in list(self._seated):
            order = one.order
            message.step.tokens.add(
                request_id=order.request_id,
                choice=order.choice,
                epoch=order.epoch,
                first_index=order.emitted_tokens + one.num_tokens,
                token_ids=[300 + one.num_tokens % 1000],
                text="word ",
            )
            one.num_tokens += 1
            if order.emitted_tokens + one.num_tokens >= order.sampling.max_tokens:
                self._seated.remove(one)
                usage = common_pb2.Usage(
                    prompt_tokens=len(order.prompt_ids) - order.emitted_tokens,
                    completion_tokens=order.emitted_tokens + one.num_tokens,
                )
                message.step.ends.add(
                    request_id=order.request_id,
                    choice=order.choice,
                    epoch=order.epoch,
                    reason=common_pb2.FINISH_REASON_LENGTH,
                    usage=usage,
                )
        if message.step.tokens:
            self.say(message)


async def serve(address: str, num_workers: int, curve: Curve, key: bytes) -> None:
    """Run workers that announce themselves at `address`, for ever."""
    workers = [
        StubWorker(f"stub-{number}", proof_key=key, curve=curve, kv_blocks=100_000) for number in range(num_workers)
    ]
    for worker in workers:
        await worker.start(address)
    await asyncio.gather(*(worker.run() for worker in workers))


def main() -> None:
    """Run stub workers until the process is ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="where the router takes announcements (router.internal_port)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seats", type=int, default=Curve.seats)
    parser.add_argument("--step-ms", type=float, default=Curve.step_ms)
    parser.add_argument("--seq-ms", type=float, default=Curve.seq_ms)
    parser.add_argument("--token-ms", type=float, default=Curve.token_ms)
    given = parser.parse_args()
    curve = Curve(given.step_ms, given.seq_ms, given.token_ms, given.seats)
    key = proof_key(os.environ["TWOSTROKE__CLUSTER__KEY"])
    asyncio.run(serve(given.address, given.workers, curve, key))


if __name__ == "__main__":
    main()
