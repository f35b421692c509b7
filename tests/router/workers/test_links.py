"""A link to one worker: however its session ends, its owner hears of it at once."""

from __future__ import annotations

import asyncio

import grpc.aio
from support.clusters.flow_cluster import cluster, collect, request, until
from support.fakes.fake_worker import FakeWorker
from support.fakes.list_router import MODEL

from twostroke.core.request import Role
from twostroke.protos import worker_pb2
from twostroke.router.routing.facts import WorkerFacts, WorkerKey
from twostroke.router.workers import links as sessions


async def test_a_session_whose_orders_cannot_be_written_is_lost_at_once(monkeypatch) -> None:
    async with cluster(worker_patience_s=0.1) as c:
        worker = FakeWorker("a")
        await c.add(worker)
        downs: list[str] = []
        link = next(iter(c.flow.members.links.values()))
        original = link._handlers.down
        handlers = sessions.LinkHandlers(
            *(getattr(link._handlers, name) for name in sessions.LinkHandlers.__dataclass_fields__)
        )
        object.__setattr__(handlers, "down", lambda key, reason: (downs.append(reason), original(key, reason)))
        link._handlers = handlers

        class Unwritable:
            def __init__(self, call: grpc.aio.StreamStreamCall) -> None:
                self._call = call

            async def write(self, message: object) -> None:
                raise grpc.aio.UsageError("the stream is gone")

        write = link._write_for_ever
        monkeypatch.setattr(link, "_write_for_ever", lambda call: write(Unwritable(call)))
        link.reset()  # the next session's orders cannot be written
        await until(lambda: any("cannot be written: the stream is gone" in reason for reason in downs), 60.0)
        await until(lambda: c.state("a") == "suspect", 60.0)
        monkeypatch.undo()
        await until(lambda: c.state("a") == "live", 60.0)
        assert len(await collect(c.flow, request())) > 0


async def test_orders_that_waited_when_a_session_broke_are_not_sent_in_the_next() -> None:
    async with cluster() as c:
        worker = FakeWorker("a")
        await c.add(worker)
        link = next(iter(c.flow.members.links.values()))
        for number in range(500):
            assert link.send(worker_pb2.SessionUp(submit=worker_pb2.Submit(request_id=f"r{number}")))
        link.reset()
        await until(lambda: c.state("a") == "suspect")
        assert not link.send(worker_pb2.SessionUp(submit=worker_pb2.Submit(request_id="too early")))
        await until(lambda: c.state("a") == "live")
        assert link.send(worker_pb2.SessionUp(submit=worker_pb2.Submit(request_id="last")))
        await until(lambda: worker.submits and worker.submits[-1].request_id == "last")
        assert len(worker.submits) < 400


async def test_no_order_is_taken_by_a_session_that_is_being_reported_as_broken() -> None:
    """It would wait for the next session, and be stale there."""

    def down(key: WorkerKey, reason: str) -> None:
        taken.append(link.send(worker_pb2.SessionUp(cancel=worker_pb2.CancelRequest(request_id="r"))))

    def nothing(*_: object) -> bool:
        return True

    taken: list[bool] = []
    facts = WorkerFacts("w", 1, Role.DECODE, "127.0.0.1:1", MODEL, 64, 16, 8, 64)
    handlers = sessions.LinkHandlers(nothing, down, nothing, nothing, nothing, nothing)
    link = sessions.WorkerLink(facts, worker_pb2.SessionHello(), handlers, b"p" * 32)
    link._is_up = True
    link._mark_down("broke")
    await link.close()
    assert taken == [False]


async def test_a_link_closes_although_a_cancelled_call_raised_its_own_error() -> None:
    cancels: list[None] = []

    async def fails_when_cancelled() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancels.append(None)
            if len(cancels) > 1:
                raise
            raise grpc.aio.UsageError("it failed at the same moment") from None

    async with cluster() as c:
        await c.add(FakeWorker("a"))
        link = next(iter(c.flow.members.links.values()))
        link._keepers.append(asyncio.create_task(link._keep(fails_when_cancelled, is_session=False)))
        await asyncio.sleep(0)
        async with asyncio.timeout(60):
            await link.close()
