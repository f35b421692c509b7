"""Calls that are ended together are looked for together."""

import asyncio

import grpc
from grpc_health.v1 import health_pb2

from twostroke.core import call_reaper, probes
from twostroke.core.call_reaper import CallReaper
from twostroke.core.probes import Probes


async def test_the_tasks_of_a_server_are_looked_at_once_for_all_calls_that_stall(monkeypatch):
    looked_at = 0
    holds = call_reaper._holds

    def counted(task, ids):
        nonlocal looked_at
        looked_at += 1
        return holds(task, ids)

    monkeypatch.setattr(call_reaper, "_holds", counted)
    calls = [asyncio.create_task(asyncio.sleep(60)) for _ in range(300)]
    others = [asyncio.create_task(asyncio.sleep(60)) for _ in range(3)]
    ending = CallReaper()
    for call in calls:
        ending.end(call)
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(outcome, asyncio.CancelledError)
    assert ending._sweep is not None
    await ending._sweep
    assert len(others) <= looked_at <= len(calls) + len(others) + 3
    before, late = looked_at, asyncio.create_task(asyncio.sleep(60))
    ending.end(late)
    async with asyncio.timeout(60):
        while looked_at == before:  # a call that stalls later is looked for, too
            await asyncio.sleep(0.01)
    await asyncio.wait([late], timeout=30)
    assert late.cancelled()
    assert not any(other.done() for other in others)
    for other in others:
        other.cancel()


class TakesNothing:
    """A call's context whose client sends a message and takes no answer."""

    async def read(self):
        return b""

    async def write(self, _):
        await asyncio.sleep(60)


async def test_a_probe_whose_answer_is_not_taken_is_ended(monkeypatch):
    monkeypatch.setattr(probes, "PROBE_TIMEOUT_S", 0.05)

    async def check(*_):
        return health_pb2.HealthCheckResponse()

    parse, serialize = health_pb2.HealthCheckRequest.FromString, health_pb2.HealthCheckResponse.SerializeToString
    handler = Probes().handler(grpc.unary_unary_rpc_method_handler(check, parse, serialize))
    call = asyncio.create_task(handler.stream_stream(None, TakesNothing()))
    await asyncio.wait([call], timeout=30)
    assert call.cancelled()
