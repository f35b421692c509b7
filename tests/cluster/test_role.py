"""Roles change while requests run: `twostroke role` over real processes, and no request notices."""

import asyncio
import json
import os
import signal

import pytest
from typer.testing import CliRunner

from twostroke.cli.main import app
from twostroke.cli.plans import settings_remarks
from twostroke.cli.role import _address
from twostroke.client.async_client import AsyncClient
from twostroke.cluster.config import Config, load_config
from twostroke.cluster.model_facts import model_facts
from twostroke.cluster.placement import place
from twostroke.cluster.supervisor import Supervisor
from twostroke.core.errors import ConfigError
from twostroke.core.request import Role
from twostroke.worker.machine import machine_facts

pytestmark = pytest.mark.timeout(600)  # four processes start
PROMPT = "the same question again and again, and long enough for several blocks of sixteen bytes "
BUSY_MACHINE_S = 120


def configured(tiny_checkpoint, **more) -> Config:
    flags = {
        "model.path": str(tiny_checkpoint),
        "model.max_model_len": 256,
        "model.kernels": "torch",
        "cache.tokens": 4096,
        "step.num_threads": 1,
        "router.port": 0,
        "router.grpc_port": 0,
        "cluster.key": "a key of this test",
        "cluster.drain_timeout_s": 1.0,
    }
    return load_config(flags=flags | more)


async def said(supervisor: Supervisor, *words: str) -> tuple[int, str]:
    """`twostroke role`, as somebody with the cluster's key calls it."""
    environment = {"TWOSTROKE__CLUSTER__KEY": supervisor.config.cluster.key}
    words = ("role", *words, "--grpc", supervisor.grpc_address)
    result = await asyncio.to_thread(CliRunner().invoke, app, words, env=environment)
    return result.exit_code, result.output + str(result.exception or "")


async def roles_are(client: AsyncClient, expected: dict[str, str]) -> None:
    async with asyncio.timeout(BUSY_MACHINE_S):
        while {w["worker_id"]: w["role"] for w in (await client.cluster())["workers"]} != expected:
            await asyncio.sleep(0.05)


async def test_roles_change_under_load_and_no_request_fails(tiny_checkpoint):
    config = configured(tiny_checkpoint, **{"cluster.launcher": "process", "cluster.prefill": 1, "cluster.decode": 2})
    supervisor = Supervisor(config, place(config, machine_facts(), model_facts(config)), say=lambda _: None)
    try:
        await supervisor.start()
        async with AsyncClient(supervisor.grpc_address, timeout_s=BUSY_MACHINE_S) as client:
            expected = {}
            for number in range(6):
                answer = await client.generate(f"{PROMPT}{number}", max_tokens=24, temperature=0, ignore_eos=True)
                expected[number] = answer.text
            is_over, num_answers = asyncio.Event(), 0

            async def ask(number: int) -> None:
                nonlocal num_answers
                while not is_over.is_set():
                    text = ""
                    async for piece in client.generate_stream(
                        f"{PROMPT}{number}", max_tokens=24, temperature=0, ignore_eos=True
                    ):
                        text += piece.text
                    assert text == expected[number]
                    num_answers += 1

            asking = asyncio.gather(*(ask(number) for number in expected))
            for worker, role in [
                ("decode-1", "prefill"),
                ("prefill-0", "decode"),
                ("decode-0", "combined"),
                ("decode-1", "decode"),
                ("prefill-0", "prefill"),
                ("decode-0", "decode"),
            ]:
                assert await said(supervisor, worker, role) == (0, f"{worker} is {role}\n")
                await roles_are(client, _now(await _roles(client), worker, role))
                before = num_answers
                async with asyncio.timeout(BUSY_MACHINE_S):
                    while num_answers < before + 12 and not asking.done():
                        await asyncio.sleep(0.02)
            is_over.set()
            await asking
            assert await _roles(client) == {"prefill-0": "prefill", "decode-0": "decode", "decode-1": "decode"}
    finally:
        await supervisor.stop()


@pytest.mark.campaign
async def test_a_worker_that_is_killed_comes_back_with_the_role_that_it_was_given(tiny_checkpoint):
    config = configured(tiny_checkpoint, **{"cluster.launcher": "process", "cluster.prefill": 1, "cluster.decode": 1})
    supervisor = Supervisor(config, place(config, machine_facts(), model_facts(config)), say=lambda _: None)
    try:
        await supervisor.start()
        async with AsyncClient(supervisor.grpc_address, timeout_s=BUSY_MACHINE_S) as client:
            assert await said(supervisor, "prefill-0", "combined") == (0, "prefill-0 is combined\n")
            async with asyncio.timeout(BUSY_MACHINE_S):
                while supervisor.members["prefill-0"].role is not Role.COMBINED:
                    await asyncio.sleep(0.05)
                first = await _pid(client, "prefill-0")
                os.kill(first, signal.SIGKILL)
                while await _pid(client, "prefill-0") in (None, first):
                    await asyncio.sleep(0.05)
            assert await _roles(client) == {"prefill-0": "combined", "decode-0": "decode"}
    finally:
        await supervisor.stop()


async def _pid(client: AsyncClient, worker: str) -> int | None:
    return {w["worker_id"]: w["pid"] for w in (await client.cluster())["workers"]}.get(worker)


async def _roles(client: AsyncClient) -> dict[str, str]:
    return {worker["worker_id"]: worker["role"] for worker in (await client.cluster())["workers"]}


def _now(roles: dict[str, str], worker: str, role: str) -> dict[str, str]:
    return roles | {worker: role}


async def test_what_is_no_worker_or_would_leave_nobody_to_decode_is_refused(tiny_checkpoint):
    config = configured(tiny_checkpoint, **{"cluster.launcher": "inprocess", "cluster.prefill": 0, "cluster.decode": 1})
    supervisor = Supervisor(config, place(config, machine_facts(), model_facts(config)), say=lambda _: None)
    try:
        await supervisor.start()
        code, text = await said(supervisor, "decode-7", "prefill")
        assert code != 0
        assert "no worker is called 'decode-7'; there are: combined-0" in text
        code, text = await said(supervisor, "combined-0", "prefill")
        assert code != 0
        assert "would leave nobody to answer" in text
        code, text = await said(supervisor, "combined-0", "quick")
        assert code == 2
        assert await said(supervisor, "combined-0", "decode") == (0, "combined-0 is decode\n")
        async with AsyncClient(supervisor.grpc_address) as client:
            await roles_are(client, {"combined-0": "decode"})
            assert (await client.generate("hello", max_tokens=3, ignore_eos=True)).usage.completion_tokens == 3
            assert json.dumps(await client.cluster())
    finally:
        await supervisor.stop()


@pytest.mark.parametrize("words", [["role", "decode-0", "prefill"], ["drain", "decode-0", "--grpc", "127.0.0.1:1"]])
def test_without_the_clusters_key_a_command_says_that_the_start_must_have_had_one(words: list[str]) -> None:
    result = CliRunner(env={"TWOSTROKE__CLUSTER__KEY": None}).invoke(app, words)
    assert result.exit_code != 0
    assert "A cluster that was started without one has made its own" in str(result.exception)
    assert "start it again with TWOSTROKE__CLUSTER__KEY set" in str(result.exception)


def test_a_start_without_a_key_says_once_what_needs_one() -> None:
    (remark,) = settings_remarks(load_config())
    assert "`twostroke role`" in remark
    assert "TWOSTROKE__CLUSTER__KEY" in remark
    assert settings_remarks(load_config(environment={"TWOSTROKE__CLUSTER__KEY": "k" * 16})) == []


@pytest.mark.parametrize("state", ["joining", "suspect", "draining", "live"])
def test_only_a_live_worker_counts_as_one_that_decodes(state: str) -> None:
    last = {"worker_id": "decode-0", "model": "m", "role": "decode", "state": "live", "address": "127.0.0.1:1"}
    workers = [last, {**last, "worker_id": "decode-1", "state": state}, {**last, "worker_id": "other", "model": "o"}]
    if state == "live":
        assert _address(workers, "decode-0", Role.PREFILL, force=False) == "127.0.0.1:1"
    else:
        with pytest.raises(ConfigError, match="decode-0 alone decodes m"):
            _address(workers, "decode-0", Role.PREFILL, force=False)
    assert _address(workers, "decode-0", Role.PREFILL, force=True) == "127.0.0.1:1"
