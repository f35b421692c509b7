"""Members in this process: one that ends by its own fault is told of, like any other."""

import asyncio
import socket

import pytest

from twostroke.cluster.config import load_config
from twostroke.cluster.last_words import End
from twostroke.cluster.launch import Site
from twostroke.cluster.launch_inprocess import InProcessLauncher
from twostroke.cluster.placement import Member
from twostroke.core.errors import ConfigError
from twostroke.core.request import Role
from twostroke.model import link


@pytest.fixture
async def launcher(tiny_checkpoint):
    flags = {"cache.tokens": 1024, "step.num_threads": 1, "model.max_model_len": 256, "router.port": 0}
    config = load_config(flags=flags | {"router.grpc_port": 0})
    made = InProcessLauncher(Site(config, str(tiny_checkpoint), "tiny", 0))
    yield made
    await made.close()


async def test_a_worker_whose_engine_ends_is_told_of_once_and_can_be_started_again(launcher):
    ends: list[str] = []
    told = asyncio.Event()

    def ended(name: str, end: End) -> None:
        ends.append(end.cause)
        told.set()

    member = Member("w", "worker", Role.COMBINED, 1, 1 << 30)
    await launcher.start(member, ended)
    worker, _ = launcher._running["w"]
    worker._room.link.send(link.Stop())
    await asyncio.wait_for(told.wait(), 10)
    assert len(ends) == 1
    assert "own fault" in ends[0]
    told.clear()
    await launcher.start(member, ended)
    await launcher.stop("w", 0.0)
    await asyncio.sleep(0.05)
    assert ends[1:] == ["stopped"]


async def test_a_router_that_cannot_start_lets_its_ports_go(launcher):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        free = _free_port()
        update = {"port": free, "grpc_port": taken.getsockname()[1]}
        config = launcher._site.config
        router = config.router.model_copy(update=update)
        launcher._site = Site(config.model_copy(update={"router": router}), "", "", 0)
        before = asyncio.all_tasks()
        with pytest.raises(ConfigError, match=r"is in use; choose another with --grpc-port"):
            await launcher.start(Member("router-0", "router"), lambda *_: None)
    assert asyncio.all_tasks() <= before
    with socket.socket() as again:
        again.bind(("127.0.0.1", free))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
