"""The planner acts on real processes: a worker comes with the load and goes with it, and no stream notices."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest
from support.clusters.asking import Asking
from support.clusters.supervised import BUSY_MACHINE_S, supervised
from typer.testing import CliRunner

from twostroke.cli.main import app
from twostroke.client.async_client import AsyncClient
from twostroke.cluster.operations.scaler import Scaler
from twostroke.cluster.planner.observation import Observation, Prompts, WorkerReport
from twostroke.cluster.supervisor import Supervisor
from twostroke.core.clock import MonotonicClock
from twostroke.core.request import Role
from twostroke.worker.machine import machine_facts

pytestmark = pytest.mark.timeout(600)
SEATS = 10
PLANNER = {
    "planner.enabled": True,
    "planner.interval_s": 0.1,
    "planner.max_workers": 3,
    "planner.start_up_s": 0.5,
    "planner.shrink_cooldown_s": 1.0,
    "planner.role_cooldown_s": 0.2,
    "planner.rate_window_s": 0.2,
    "planner.trend_window_s": 0.4,
    "planner.stale_after_s": 600.0,
}


class Loads:
    """What the planner is told: the real workers, with loads that do not depend on how fast this machine is."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor, self._clock = supervisor, MonotonicClock()
        self.decoding = 1  # sequences of all decode workers together
        self.queued = 0  # prompt tokens of all prefill workers together

    def __call__(self) -> Observation | None:
        real = self._supervisor.changes.observation()
        if real is None:
            return None
        share = self.decoding / max(1, len(real.live(Role.DECODE)))
        queued = self.queued // max(1, len(real.live(Role.PREFILL)))
        workers = tuple(self._told(worker, round(share), queued) for worker in real.workers)
        return replace(real, at_s=self._clock.now_s(), workers=workers, prompts=Prompts())

    def _told(self, worker: WorkerReport, running: int, queued: int) -> WorkerReport:
        told = replace(worker, max_num_seqs=SEATS, prefill_ms_per_token=1.0, prefill_ms_per_token_pair=0.0)
        if not worker.is_live:
            return told
        if worker.role is Role.PREFILL:
            return replace(told, queued_prompt_tokens=queued)
        return replace(told, running=running, waiting=0, kv_tokens=0, decode_step_ms=1.0)


@asynccontextmanager
async def planned(tiny_checkpoint, **more: Any) -> AsyncIterator[tuple[Supervisor, Loads, AsyncClient]]:
    async with supervised(tiny_checkpoint, **(PLANNER | more)) as supervisor:
        loads = Loads(supervisor)
        scaler: Scaler | None = supervisor.scaler
        assert scaler is not None
        scaler.observe = loads
        async with AsyncClient(supervisor.grpc_address, timeout_s=BUSY_MACHINE_S) as client:
            yield supervisor, loads, client


async def until_workers(client: AsyncClient, expected: dict[str, str]) -> None:
    async with asyncio.timeout(BUSY_MACHINE_S):
        while {
            w["worker_id"]: w["role"] for w in (await client.cluster())["workers"] if w["state"] == "live"
        } != expected:
            await asyncio.sleep(0.05)


@pytest.mark.campaign
async def test_a_decode_worker_comes_with_the_load_and_goes_with_it(tiny_checkpoint):
    async with planned(tiny_checkpoint) as (supervisor, loads, client):
        two = {"prefill-0": "prefill", "decode-0": "decode"}
        async with Asking(client, 2) as asking:
            loads.decoding = 15  # of 9 per worker
            await until_workers(client, two | {"decode-1": "decode"})
            await asking.more(4)
            loads.decoding = 1
            async with asyncio.timeout(BUSY_MACHINE_S):
                while len(supervisor.members) != 3:
                    await asyncio.sleep(0.05)
            await asking.more(4)
        cluster = await client.cluster()
        assert len([w for w in cluster["workers"] if w["state"] == "live"]) == 2
        told = cluster["supervisor"]
        assert told["desired"] == {"prefill": 1, "decode": 1}
        assert told["actual"] == {"prefill": 1, "decode": 1}
        assert told["reason"]
        assert told["decision"]["terms"]["have_decode"] >= 1
        assert [line.split(":")[1].strip() for line in told["events"]] == ["start", "drain", "stop"]
        assert supervisor.room.num_free == 1
        shown = await asyncio.to_thread(CliRunner().invoke, app, ["status", "--grpc", supervisor.grpc_address])
        assert "planner: 1 of 1 prefill, 1 of 1 decode; hold: 1 prefill and 1 decode workers are needed" in " ".join(
            shown.output.split()
        )
        metrics = (await asyncio.to_thread(httpx.get, f"{supervisor.http_url}/metrics")).text
        assert 'twostroke_planner_workers{kind="desired",role="decode"} 1.0' in metrics
        assert 'twostroke_planner_last_action{action="hold"} 1.0' in metrics


async def test_a_role_changes_where_prompts_wait_and_decode_can_spare_a_worker(tiny_checkpoint):
    flags = {"cluster.launcher": "inprocess", "cluster.decode": 2, "planner.max_workers": None}
    async with planned(tiny_checkpoint, **flags) as (supervisor, loads, client):
        async with Asking(client, 2) as asking:
            loads.queued = 3000  # 3 s of one worker, of 1.6 s that may be waited
            async with asyncio.timeout(BUSY_MACHINE_S):
                while sorted(m.role.value for m in supervisor.members.values() if m.role) != [
                    "decode",
                    "prefill",
                    "prefill",
                ]:
                    await asyncio.sleep(0.05)
            await asking.more(4)
        assert any("change_role" in event for event in supervisor.scaler.events)


async def test_without_a_place_the_refusal_is_an_event_and_nothing_else_happens(tiny_checkpoint, monkeypatch):
    flags = {"cluster.launcher": "inprocess"}
    async with planned(tiny_checkpoint, **flags) as (supervisor, loads, client):
        nothing = replace(machine_facts(), memory_bytes=100 << 20)
        monkeypatch.setattr("twostroke.cluster.operations.changes.machine_facts", lambda: nothing)
        loads.decoding = 15
        async with asyncio.timeout(BUSY_MACHINE_S):
            while not any("the machine has 100 MiB free" in event for event in supervisor.scaler.events):
                await asyncio.sleep(0.05)
            while "no more come: the machine has 100 MiB free" not in (supervisor.scaler.last.reason or ""):
                await asyncio.sleep(0.05)
        assert len(supervisor.members) == 3
        assert (await client.generate("hello", max_tokens=3, ignore_eos=True)).usage.completion_tokens == 3


async def test_a_worker_that_does_not_serve_in_time_is_taken_back(tiny_checkpoint, monkeypatch):
    flags = {"cluster.launcher": "inprocess", "planner.start_timeout_s": 0.5}
    async with planned(tiny_checkpoint, **flags) as (supervisor, loads, _):

        async def never(*_: object) -> None:
            """A process that exists and never serves."""

        monkeypatch.setattr(supervisor._launcher, "start", never)
        loads.decoding = 15
        async with asyncio.timeout(BUSY_MACHINE_S):
            while not any("did not serve within 0.5 s; it is taken back" in e for e in supervisor.scaler.events):
                await asyncio.sleep(0.05)
        assert supervisor.room.num_free + len(supervisor.members) == 4  # the place is free again, or taken anew
