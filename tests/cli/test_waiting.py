"""What `serve` says while it waits for its members."""

import asyncio

import pytest

from twostroke.cli.serve import Progress
from twostroke.cluster.config import load_config
from twostroke.cluster.launch.ray_session import RaySession
from twostroke.cluster.model_facts import model_facts
from twostroke.cluster.placement import place
from twostroke.cluster.supervisor import Supervisor
from twostroke.core.ports import free_ports
from twostroke.worker.machine import MachineFacts


def test_a_log_tells_a_wait_early_and_then_from_time_to_time(capfd: pytest.CaptureFixture[str]):
    with Progress() as progress:
        progress.show("starting 3 processes")
        for waited_s in range(1, 30):
            progress.wait("starting 3 processes", "decode-0", waited_s, 120.0)
    lines = [line.partition("] ")[2] for line in capfd.readouterr().err.splitlines()]
    told = [f"waiting for decode-0: {waited_s} s of at most 120 s" for waited_s in (3, 13, 23)]
    assert lines == ["starting 3 processes", *told]


async def test_a_start_awaits_its_members_and_names_the_first_of_many():
    ports = dict(zip(("router.port", "router.grpc_port"), free_ports("127.0.0.1", 2), strict=True))
    flags = {**ports, "cluster.launcher": "process", "cluster.prefill": 2, "cluster.decode": 4, "cache.tokens": 4096}
    config = load_config(flags=flags)
    plan = place(config, MachineFacts(8, 64 << 30), model_facts(config))
    supervisor = Supervisor(config, plan)
    starting = asyncio.create_task(supervisor.start())
    try:
        await asyncio.sleep(0)
        assert supervisor.awaited == "router-0, prefill-0, prefill-1, decode-0, 3 more"
    finally:
        starting.cancel()
        await supervisor.abort()


@pytest.mark.parametrize(
    ("address", "named"), [("10.0.0.1:6379", "10.0.0.1:6379"), (None, "--launcher process"), ("local", "this machine")]
)
def test_a_ray_is_awaited_by_its_address_or_with_the_way_around_it(address: str | None, named: str):
    session = RaySession(address)
    try:
        assert named in session.description
    finally:
        session.close()
