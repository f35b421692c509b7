"""The door behind both doors: what one tenant may do to another, and how many calls are read at once."""

import asyncio
import threading
from dataclasses import replace

import pytest
from support.clusters.flow_cluster import cluster, collect, request, until
from support.fakes.fake_worker import MODEL, Behaviour, FakeWorker

from twostroke.core import errors
from twostroke.router.api import frontend as front_module
from twostroke.router.api.call import GenerateCall
from twostroke.router.api.frontend import Frontend
from twostroke.router.config import RouterConfig


async def test_a_tenant_cannot_abort_anothers_request():
    async with cluster() as c:
        await c.add(FakeWorker("w0", behaviour=Behaviour(stop_after=2)))
        front = Frontend(RouterConfig(), c.flow)
        running = asyncio.create_task(collect(c.flow, request("r1", isolation_domain="key-0")))
        await until(lambda: (known := front.explain_here("key-0", "r1")) and known["tokens"]["completion"] == 2)
        assert not await front.abort("r1", "key-1")
        assert not running.done()
        assert await front.abort("r1", "key-0")
        with pytest.raises(errors.Cancelled):
            await running
        assert not await front.abort("r1", "key-0")


async def test_a_name_is_a_list_and_a_request_and_stays_that_whatever_is_refused(monkeypatch):
    monkeypatch.setattr(front_module, "validate", lambda call, *_: request(call.request_id, isolation_domain="key-0"))
    async with cluster() as c:
        await c.add(FakeWorker("w0", behaviour=Behaviour(stop_after=2)))
        front = Frontend(RouterConfig(), c.flow)

        async def model(_: object) -> None:
            return None

        monkeypatch.setattr(front.models, "get", model)
        calls = [GenerateCall(model=MODEL, prompt="x", api_key="key-0")] * 3
        listed = await front.start_list("L", calls)
        with pytest.raises(errors.InvalidRequest, match="L-0"):  # its requests' names are in use
            await front.start_list("L", calls[:2])
        assert (await front.explain("L", "key-0") or {})["num_prompts"] == 3
        alone = await front.start(replace(calls[0], request_id="L"))
        assert await front.abort("L", "key-0")
        for started in (listed, alone):
            with pytest.raises(errors.Cancelled):
                async for _ in started.pieces():
                    pass
        assert not await front.abort("L", "key-0")


async def test_calls_beyond_the_bound_are_refused_before_they_are_tokenised(monkeypatch):
    hold = threading.Event()

    def slow(*_: object) -> None:
        hold.wait(5)
        raise errors.InvalidRequest("enough")

    monkeypatch.setattr(front_module, "validate", slow)
    async with cluster() as c:
        front = Frontend(RouterConfig(max_running=2), c.flow)

        async def model(_: object) -> None:
            return None

        monkeypatch.setattr(front.models, "get", model)
        reading = [asyncio.create_task(front.admit(GenerateCall(model=MODEL, prompt="x"))) for _ in range(2)]
        await asyncio.sleep(0.05)
        with pytest.raises(errors.Overloaded) as caught:
            await front.admit(GenerateCall(model=MODEL, prompt="x"))
        assert caught.value.retry_after_s
        hold.set()
        for outcome in await asyncio.gather(*reading, return_exceptions=True):
            assert isinstance(outcome, errors.InvalidRequest)
        with pytest.raises(errors.InvalidRequest):  # and there is room again
            await front.admit(GenerateCall(model=MODEL, prompt="x"))


@pytest.mark.parametrize("code", ["overloaded", "unavailable", "worker_lost"])
def test_a_peers_error_that_means_later_always_says_when(code):
    assert errors.from_code(code, "no").retry_after_s
    assert errors.from_code(code, "no", retry_after_s=7.0).retry_after_s == 7.0


async def test_every_prompt_of_a_list_counts_and_no_more_when_its_model_is_not_there(monkeypatch):
    async with cluster() as c:
        front = Frontend(RouterConfig(max_running=2), c.flow)

        async def nobody(_: object) -> None:
            raise errors.Unavailable("nobody", retry_after_s=1.0)

        monkeypatch.setattr(front.models, "get", nobody)
        calls = [GenerateCall(model=MODEL, prompt="x")] * 3
        with pytest.raises(errors.Overloaded):
            await front.start_list("L", calls)
        for _ in range(3):
            with pytest.raises(errors.Unavailable):
                await front.start_list("L", calls[:2])
        hold = asyncio.Event()

        async def slow(_: object) -> None:
            await hold.wait()
            raise errors.Unavailable("nobody", retry_after_s=1.0)

        monkeypatch.setattr(front.models, "get", slow)
        reading = asyncio.create_task(front.start_list("L", calls[:2]))
        await asyncio.sleep(0)
        with pytest.raises(errors.Overloaded):
            await asyncio.wait_for(front.start_list("L", calls[:1]), 60)
        hold.set()
        with pytest.raises(errors.Unavailable):
            await reading
