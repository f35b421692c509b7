"""A flow and workers that speak the real protocol, and what tests ask of its streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from support.fakes.fake_worker import MODEL, PROOF_KEY, FakeWorker, token_at

from twostroke.core.request import Request, SamplingParams
from twostroke.core.timeline import Timeline
from twostroke.router.config import RouterConfig
from twostroke.router.requests.flow import Flow
from twostroke.router.requests.pieces import OutputDelta

KEY = b"cluster key of the tests"
PROMPT = tuple(range(100))


class Cluster:
    def __init__(self, flow: Flow, internal: str) -> None:
        self.flow = flow
        self.internal = internal
        self.workers: list[FakeWorker] = []

    async def add(self, *workers: FakeWorker) -> FakeWorker:
        for worker in workers:
            await worker.start(self.internal)
            self.workers.append(worker)
            await until(lambda w=worker: self.state(w.worker_id) == "live" and w.watchers)
        return workers[-1]

    def state(self, worker_id: str) -> str | None:
        return {w["worker_id"]: w["state"] for w in self.flow.cluster()["workers"]}.get(worker_id)


async def until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    loop = asyncio.get_running_loop()
    end_s = loop.time() + timeout_s
    while not condition():
        assert loop.time() < end_s, "it did not become true in time"
        await asyncio.sleep(0.005)


@asynccontextmanager
async def cluster(**settings: object) -> AsyncIterator[Cluster]:
    flow = Flow(
        RouterConfig(**{"worker_patience_s": 0.5, "worker_return_s": 0.0, **settings}), KEY, proof_key=PROOF_KEY
    )
    server = flow.internal_server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await flow.start()
    there = Cluster(flow, f"127.0.0.1:{port}")
    try:
        yield there
    finally:
        await flow.close()
        await asyncio.gather(*(worker.die() for worker in there.workers))
        await server.stop(None)


def request(name: str = "r1", **fields: object) -> Request:
    sampling = SamplingParams(max_tokens=fields.pop("max_tokens", 5))  # type: ignore[arg-type]
    values = {"prompt_ids": PROMPT, "num_choices": 1, "isolation_domain": "tenant", "timeout_s": 20.0, **fields}
    return Request(request_id=name, model=MODEL, sampling=sampling, **values)  # type: ignore[arg-type]


async def collect(flow: Flow, asked: Request) -> list[OutputDelta]:
    return [piece async for piece in flow.generate(asked, Timeline())]


async def collect_into(got: list[OutputDelta], stream: AsyncIterator[OutputDelta]) -> None:
    async for piece in stream:
        got.append(piece)


def tokens_of(pieces: list[OutputDelta], choice: int = 0) -> list[int]:
    tokens: list[int] = []
    for piece in pieces:
        if piece.choice == choice:
            assert piece.first_index == len(tokens), "the stream has a gap"
            tokens += piece.token_ids
    return tokens


def expected(count: int, choice: int = 0, prompt: tuple[int, ...] = PROMPT) -> list[int]:
    return [token_at(list(prompt), choice, index) for index in range(count)]


def dropped(flow: Flow, reason: str) -> float:
    return flow.metrics.registry.get_sample_value("twostroke_tokens_dropped_total", {"reason": reason}) or 0.0
