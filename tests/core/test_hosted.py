"""A hosted server's end: asked for, or its own. Whoever waits in `run` hears of both."""

import asyncio
import gc
import inspect
from concurrent.futures import ThreadPoolExecutor

import pytest

from twostroke.core.errors import DeviceCordoned, DeviceFault
from twostroke.core.hosted import Hosted
from twostroke.decode_worker.actor import DecodeWorker
from twostroke.prefill_worker.actor import PrefillWorker
from twostroke.router.actor import Router


class Quiet:
    """Serves nobody; notes with which grace it was stopped."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self.fault: DeviceFault | None = None
        self.graces_s: list[float] = []

    async def start(self) -> None:
        self.loop = asyncio.get_running_loop()

    async def stop(self, grace_s: float) -> None:
        self.graces_s.append(grace_s)
        self.ended.set()


@pytest.fixture
def hosted():
    gc.unfreeze()  # another test of this process may have run an actor
    server = Quiet()
    hosted = Hosted(lambda: server, 3.0)
    with ThreadPoolExecutor(1) as pool:
        yield hosted, server, pool.submit(hosted.run)
        hosted.stop()
    gc.unfreeze()


def test_a_wanted_end_drains(hosted):
    host, server, running = hosted
    assert not running.done()
    host.stop()
    assert running.result(10) == "stopped"
    assert server.graces_s == [3.0]
    assert gc.get_freeze_count() > 0  # what the start left behind is not collected again


def test_a_server_that_breaks_ends_its_process_without_a_drain(hosted):
    _, server, running = hosted
    server.loop.call_soon_threadsafe(server.ended.set)
    assert running.result(10).startswith("ended by its own fault")
    assert server.graces_s == [0.0]


def test_a_fault_of_the_device_is_raised_to_whoever_waits(hosted):
    _, server, running = hosted
    server.fault = DeviceCordoned("GPU-a is cordoned: XID 79")
    server.loop.call_soon_threadsafe(server.ended.set)
    with pytest.raises(DeviceCordoned, match="XID 79"):
        running.result(10)
    assert server.graces_s == [0.0]


@pytest.mark.parametrize("kind", [Hosted, DecodeWorker, PrefillWorker, Router])
def test_no_method_is_a_coroutine_for_ray_gives_async_actors_no_signals(kind: type[Hosted]):
    assert inspect.getmembers(kind, inspect.iscoroutinefunction) == []
