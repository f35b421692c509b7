"""A session beside a router that sends and does not read: over a stream that stands still when it is told to."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from twostroke.decode_worker.outbox import Outbox
from twostroke.decode_worker.router_session import RouterSession, SessionTiming
from twostroke.protos import common_pb2, worker_pb2

NUM_ORDERS = 50
PATIENT = SessionTiming(hello_s=60.0, silence_s=60.0, stall_s=60.0)
HELLO = worker_pb2.SessionUp(hello=worker_pb2.SessionHello(router_id="r"))


class Stream:
    """A router's end: its messages, in order, then nothing; what is written to it waits for `reads`."""

    def __init__(self, *messages: worker_pb2.SessionUp) -> None:
        self._messages = list(messages)
        self.reads = asyncio.Event()
        self.written: list[worker_pb2.SessionDown] = []
        self._is_writing = False

    async def read(self) -> worker_pb2.SessionUp:
        if not self._messages:
            await asyncio.Event().wait()
        return self._messages.pop(0)

    async def write(self, message: worker_pb2.SessionDown) -> None:
        assert not self._is_writing, "gRPC takes one message at a time"
        self._is_writing = True
        try:
            if not message.HasField("welcome"):
                await self.reads.wait()
            self.written.append(message)
        finally:
            self._is_writing = False


class Refuser:
    """Ends every order at once."""

    def __init__(self) -> None:
        self.num_orders = 0
        self.all_came = asyncio.Event()
        self.has_suspect = False  # of another router

    def submit(self, session: RouterSession, message: worker_pb2.Submit) -> None:
        self.num_orders += 1
        session.outbox.add_end(worker_pb2.RequestEnd(request_id=message.request_id))
        if self.num_orders == NUM_ORDERS:
            self.all_came.set()

    def has_others_suspect(self, session: RouterSession) -> bool:
        return self.has_suspect


async def test_no_more_orders_are_read_from_a_router_that_does_not_read_their_ends() -> None:
    orders = [worker_pb2.SessionUp(submit=worker_pb2.Submit(request_id=str(n))) for n in range(NUM_ORDERS)]
    stream, owner = Stream(HELLO, *orders), Refuser()
    session = RouterSession(owner, PATIENT, lambda: None)  # type: ignore[arg-type]
    session.outbox = Outbox(max_ends=2)
    context: Any = stream
    running = asyncio.create_task(session.run(context, common_pb2.WorkerInfo()))
    for _ in range(20 * NUM_ORDERS):
        await asyncio.sleep(0)
    assert 0 < owner.num_orders <= 4  # two in the message that stands still, two behind it
    stream.reads.set()
    async with asyncio.timeout(30):
        await owner.all_came.wait()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_router_that_reads_nothing_for_too_long_is_lost() -> None:
    order = worker_pb2.SessionUp(submit=worker_pb2.Submit(request_id="one"))
    session = RouterSession(Refuser(), replace(PATIENT, stall_s=0.02), lambda: None)  # type: ignore[arg-type]
    context: Any = Stream(HELLO, order)
    async with asyncio.timeout(30):
        await session.run(context, common_pb2.WorkerInfo())


async def test_an_order_of_a_suspect_is_given_to_nobody_before_its_confirmation_has_left() -> None:
    order = worker_pb2.Submit(request_id="suspect", choice=1, epoch=worker_pb2.Epoch(incarnation=3, counter=7))
    orders = [worker_pb2.SessionUp(submit=worker_pb2.Submit(request_id="other")), worker_pb2.SessionUp(submit=order)]
    orders[1].submit.confirm = 4
    stream, owner = Stream(HELLO, *orders), Refuser()
    session = RouterSession(owner, PATIENT, lambda: None)  # type: ignore[arg-type]
    context: Any = stream
    running = asyncio.create_task(session.run(context, common_pb2.WorkerInfo()))
    for _ in range(50):
        await asyncio.sleep(0)
    assert owner.num_orders == 1
    stream.reads.set()
    async with asyncio.timeout(30):
        while owner.num_orders < 2 or len(stream.written) < 4:
            await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    said = [message.step for message in stream.written[1:]]
    assert [[taken.request_id for taken in step.taken] for step in said if step.taken] == [["suspect"]]
    assert [[end.request_id for end in step.ends] for step in said if step.ends] == [["other"], ["suspect"]]
    (taken,) = [step.taken[0] for step in said if step.taken]
    assert (taken.choice, taken.epoch, taken.HasField("peer")) == (1, order.epoch, False)
    assert [message.sequence for message in stream.written] == [1, 2, 3, 4]


async def test_the_session_of_a_router_that_does_not_read_a_confirmation_is_over() -> None:
    order = worker_pb2.SessionUp(submit=worker_pb2.Submit(request_id="one", confirm=4))
    owner = Refuser()
    session = RouterSession(owner, replace(PATIENT, stall_s=0.02), lambda: None)  # type: ignore[arg-type]
    context: Any = Stream(HELLO, order)
    async with asyncio.timeout(30):
        await session.run(context, common_pb2.WorkerInfo())
    assert owner.num_orders == 0


def test_an_order_that_will_be_refused_is_not_confirmed() -> None:
    owner, message = Refuser(), worker_pb2.SessionUp(submit=worker_pb2.Submit(request_id="one", confirm=4))
    session = RouterSession(owner, PATIENT, lambda: None)  # type: ignore[arg-type]
    assert session.before(message) is not None
    owner.has_suspect = True
    assert session.before(message) is None
