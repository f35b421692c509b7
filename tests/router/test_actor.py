"""The actor that hosts a router: on which loop it runs."""

import asyncio
import gc
import signal
import sys

import pytest

from twostroke.router.actor import Router
from twostroke.router.api.http.selector import TieredLoop, running_tiers


class LoopNoted:
    """A server that notes the loop that it runs on."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self.fault = None
        self.loop = asyncio.get_running_loop()
        self.tiers = running_tiers()

    async def start(self) -> None:
        pass

    async def stop(self, grace_s: float) -> None:
        self.ended.set()


@pytest.fixture
def _this_process_stays_as_it_is(monkeypatch: pytest.MonkeyPatch):
    interval_s, handler = sys.getswitchinterval(), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("twostroke.router.process.give_large_memory_back", lambda: None)
    yield
    sys.setswitchinterval(interval_s)
    signal.signal(signal.SIGTERM, handler)
    gc.unfreeze()


@pytest.mark.usefixtures("_this_process_stays_as_it_is")
def test_a_router_in_an_actor_runs_on_the_loop_of_a_router_process():
    made: list[LoopNoted] = []

    def build() -> LoopNoted:
        made.append(LoopNoted())
        return made[-1]

    actor = Router(build, 0.0)
    actor.stop()
    assert actor.run() == "stopped"
    assert isinstance(made[0].loop, TieredLoop)
    assert made[0].tiers is made[0].loop.tiers is not None
