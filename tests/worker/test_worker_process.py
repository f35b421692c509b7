"""A worker as a process of its own: it drains on SIGTERM, and nothing of it outlives its parent."""

import asyncio
import os
import signal
import sys
import textwrap

import grpc.aio
import pytest
from support.engines.worker_main import MAIN, settings_for

from twostroke.checkpoint.layout import weight_bytes
from twostroke.core.errors import ConfigError, DoesNotFit
from twostroke.core.process_settings import SWITCH_S
from twostroke.core.request import Role
from twostroke.kv.config import CacheConfig
from twostroke.worker.automatic import PROCESS_BYTES
from twostroke.worker.process import WorkerProcess

OBJECTS_OF_TORCH = 100_000


async def spawn(checkpoint, *arguments, stderr=None):
    """The process and its address."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", MAIN, settings_for(checkpoint).model_dump_json(), *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=stderr,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    async with asyncio.timeout(240):
        while b"serves at" not in (line := await process.stdout.readline()):
            assert line, "it died before it served"
    return process, line.split()[-1].decode()


async def test_sigterm_lets_the_running_end_and_exits_with_zero(tiny_checkpoint, hand_to, make_prompt, tmp_path):
    with (tmp_path / "stderr").open("wb") as stderr:
        process, address = await spawn(tiny_checkpoint, stderr=stderr)
    try:
        hand = await hand_to(address)
        answer = await hand.submit("r", make_prompt(20), sampling={"max_tokens": 200, "ignore_eos": True})
        await answer.until(lambda a: len(a.token_ids) > 2)
        process.send_signal(signal.SIGTERM)
        await answer.ended()
        assert len(answer.token_ids) == 200
        assert await asyncio.wait_for(process.wait(), 60) == 0
        said = (await process.stdout.read()).decode()
        assert f"threads switch after {SWITCH_S}" in said
        kept = said.split("never scanned again: ")[1]
        assert int(kept) > OBJECTS_OF_TORCH, "a collection scans them all, and holds every stream meanwhile"
        assert f"is ready with tiny at {address}; it takes work" in (tmp_path / "stderr").read_text()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.campaign
async def test_a_worker_does_not_outlive_its_parent(tiny_checkpoint):
    process, address = await spawn(tiny_checkpoint, "0")  # nobody is process 0
    try:
        assert await asyncio.wait_for(process.wait(), 60) == 0
        async with grpc.aio.insecure_channel(address) as channel:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(channel.channel_ready(), 0.3)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


PARENT = textwrap.dedent("""
    import os, subprocess, sys
    subprocess.run([sys.executable, "-c", sys.argv[1], sys.argv[2], str(os.getpid())])
""")


LOADS_FOR_EVER = """
import time, twostroke.worker.process
twostroke.worker.process.build_engine = lambda *_: print("it loads", flush=True) or time.sleep(1000)
"""


@pytest.mark.parametrize(
    ("before", "until"), [(LOADS_FOR_EVER, "it loads"), pytest.param("", "serves at", marks=pytest.mark.campaign)]
)
async def test_a_worker_does_not_outlive_a_killed_parent_while_it_loads_or_serves(tiny_checkpoint, before, until):
    main = before + MAIN
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PARENT, main, settings_for(tiny_checkpoint).model_dump_json()),
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    async with asyncio.timeout(240):
        while until.encode() not in (line := await parent.stdout.readline()):
            assert line, "it died before that"
        parent.kill()
        await parent.wait()
        await parent.stdout.read()  # to its end: the worker is gone too


async def test_a_pool_that_does_not_fit_is_refused_with_the_arithmetic(tiny_checkpoint):
    worker = WorkerProcess(settings_for(tiny_checkpoint, memory_bytes=10_000))
    with pytest.raises(DoesNotFit, match=r"memory .* weights .* = 0 blocks"):
        await worker.start()
    await worker.stop(0.0)


async def test_the_pool_is_the_smaller_of_tokens_and_memory(start_worker):
    by_tokens = await start_worker(Role.COMBINED, cache=CacheConfig(tokens=1024))
    per_block = 16 * 2 * 2 * 2 * (16 + 1)  # tokens, k and v, layers, heads, fp8 row and its scale
    weights = weight_bytes(by_tokens.room.engine.runner.spec, "float32")
    memory = PROCESS_BYTES + weights + 10 * per_block * 2
    by_memory = await start_worker(
        Role.COMBINED, cache=CacheConfig(tokens=1024, memory_fraction=0.5, ring_bytes=0), memory_bytes=memory
    )
    assert by_tokens.info().num_kv_blocks == 64
    assert by_memory.info().num_kv_blocks == 10
    assert [worker.info().model.max_model_len for worker in (by_tokens, by_memory)] == [1024, 160]


@pytest.mark.parametrize("model", [{}, {"kernels": "torch"}, {"kernels": "torch", "quantization": "int8"}])
async def test_says_with_which_kernels_it_computes_and_does(start_worker, caplog, model):
    caplog.set_level("INFO", "twostroke")
    worker = await start_worker(Role.COMBINED, model=model)
    ops = worker.room.engine.runner.ops
    assert ops.description in worker.info().model.numerics_description
    assert f"computes with {worker.info().model.numerics_description}" in caplog.text
    if "kernels" in model:
        assert ops.description.startswith("torch")
    assert ("int8 weights" in ops.description) == ("quantization" in model)


async def test_a_taken_port_is_an_error_that_names_it(start_worker, tiny_checkpoint):
    first = await start_worker(Role.COMBINED)
    port = int(first.address.split(":")[1])
    second = WorkerProcess(settings_for(tiny_checkpoint, port=port))
    with pytest.raises(ConfigError, match=str(port)):
        await second.start()
    await second.stop(0.0)


async def test_no_device_but_the_cpu_is_promised(tiny_checkpoint):
    worker = WorkerProcess(settings_for(tiny_checkpoint, model={"device": "cuda"}))
    with pytest.raises(ConfigError, match=r"model\.device"):
        await worker.start()
    await worker.stop(0.0)


async def test_a_broken_engine_ends_its_requests_and_says_so(start_worker, router_of, make_prompt):
    worker = await start_worker(Role.COMBINED)
    hand = await router_of(worker)
    engine = worker.room.engine

    def fail(plan):
        raise RuntimeError("the device is gone")

    engine.runner.run = fail
    for place in range(4):
        answer = await (await hand.submit(f"r{place}", make_prompt(20))).ended()
        assert answer.end.error.code in ("internal_error", "unavailable")
    await asyncio.wait_for(worker.ended.wait(), 60)
    assert not worker.health.is_serving()
