"""A worker whose cache's codec is too coarse: it serves new requests with a bfloat16 cache, and says so."""

import asyncio
import gc
import json
import shutil
import weakref
from contextlib import aclosing
from dataclasses import replace

import pytest
from support.checkpoints.heads import worker_with_heads
from support.clusters.real_cluster import real_cluster

from twostroke.cli.status import guards_of
from twostroke.core.request import Request, Role, SamplingParams
from twostroke.core.timeline import Timeline
from twostroke.engine.speculation.pace import DraftPace
from twostroke.kv.codec import Codec
from twostroke.kv.config import CacheConfig
from twostroke.worker import speculation
from twostroke.worker.codec import fallback as driver

SIZES = {"tokens": 8192, "frame_bytes": 8192}
COARSE = CacheConfig(**SIZES, dtype="int8", guard_bound=0.02, guard_share=1.0)
WATCHED = CacheConfig(**SIZES, dtype="int8", guard_bound=50.0)  # the verdict is told by the test
LORA = {"enable_lora": True}
SIDES = {"A": (4, 64), "B": (64, 4)}
TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def outliers(tiny_checkpoint, tmp_path_factory):
    """The tiny model with keys 64 times larger in one channel of each head, and queries as much smaller there.

    Attention is the same, and so is the model; only integers with one scale per token lose the other channels.
    """
    from safetensors.torch import load_file, save_file

    directory = tmp_path_factory.mktemp("outliers") / "model"
    shutil.copytree(tiny_checkpoint, directory)
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("k_proj.weight", "q_proj.weight")):
            pairs = tensor.view(-1, 2, 8, 64)  # rotary embedding turns channels i and i + 8
            pairs[:, :, 7] *= 64.0 if "k_proj" in name else 1 / 64.0
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter of one module, as PEFT saves it."""
    import torch
    from safetensors.torch import save_file

    directory, random = tmp_path_factory.mktemp("adapter"), torch.Generator().manual_seed(3)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["o_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.layers.0.self_attn.o_proj.lora_{}.weight"
    sides = {name.format(side): torch.randn(shape, generator=random) for side, shape in SIDES.items()}
    save_file(sides, directory / "adapter_model.safetensors")
    return directory


def request(cluster, name, prompt_ids, max_tokens=16, model="tiny"):
    facts = next(facts for facts in cluster.flow.models() if facts.name == model)
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    adapter = facts.adapter.digest if facts.adapter else b""
    return Request(
        name, model, tuple(prompt_ids), sampling, 1, "tenant", timeout_s=TIMEOUT_S, adapter=adapter,
        base_model=facts.base,
    )  # fmt: skip


async def until(holds):
    async with asyncio.timeout(TIMEOUT_S):
        while not holds():
            await asyncio.sleep(0.01)


def told(cluster, name="w"):
    """What the router tells of a worker; empty: it does not know it."""
    return next((worker for worker in cluster.flow.cluster()["workers"] if worker["worker_id"] == name), {})


def exceed(worker):
    """The guard's verdict, as the engine tells it."""
    load = worker.dispatcher.last_load
    worker.fallback.hear(replace(load, counters=(*load.counters, ("kv_guard_exceeded", 1))))


async def test_past_the_bound_requests_are_answered_as_by_a_bfloat16_cache(
    start_worker, make_prompt, outliers, adapter
):
    asked = [(prompt, model) for prompt in (make_prompt(60, salt) for salt in range(4)) for model in ("tiny", "x")]
    answers = {}
    for codec, cache in (("bfloat16", CacheConfig(**SIZES, dtype="bfloat16")), ("int8", COARSE)):
        async with real_cluster(start_worker) as cluster:
            worker = await cluster.add(
                Role.COMBINED, worker_id="w", model_directory=str(outliers), cache=cache, model=LORA
            )
            await cluster.flow.adapters.load("x", str(adapter))

            async def answered(of, cluster=cluster):
                calls = [request(cluster, f"{of}-{i}", prompt, model=model) for i, (prompt, model) in enumerate(asked)]
                return await asyncio.gather(*map(cluster.generate, calls))

            if codec == "int8":
                planes = [weakref.ref(each) for each in worker.room.loaded.runner.store.components]
                address, incarnation, size = worker.address, worker.incarnation, worker.room.pool_size
                numerics = worker.room.facts.model.numerics_class
            answers[codec] = await answered("first")
            if codec == "int8":
                await until(lambda: told(cluster).get("changes_codec_to") == "bfloat16")
                assert "w drains and comes back with a cache in bfloat16" in guards_of(cluster.flow.cluster())[0]
                answers["meanwhile"] = await answered("meanwhile")  # they wait for it
                answers["after"] = await answered("after")
                assert told(cluster)["fell_back_from"] == "int8"
                assert "w has fallen back to a cache in bfloat16" in guards_of(cluster.flow.cluster())[0]
                assert (worker.address, worker.readiness.count(address)) == (address, 1)
                assert worker.incarnation > incarnation
                assert worker.room.facts.model.numerics_class != numerics
                assert worker.room.pool_size.pool_bytes <= size.pool_bytes
                assert size.num_blocks // 2 <= worker.room.pool_size.num_blocks < size.num_blocks
                assert worker._metrics.render(None, "")[0].count(b'cache_dtype="bfloat16"') == 1
                await until(lambda worker=worker: worker.dispatcher.last_load is not None)
                assert b"twostroke_kv_cache_fell_back{" in worker._metrics.render(worker.dispatcher.last_load, "")[0]
                gc.collect()
                assert [plane() for plane in planes] == [None] * len(planes)
    assert answers["int8"] != answers["bfloat16"]
    assert answers["meanwhile"] == answers["after"] == answers["bfloat16"]


@pytest.fixture(params=["medusa", "eagle3"])
def heads(tiny_checkpoint, tmp_path, monkeypatch, request):
    """Settings of a worker with heads that always guess: whether guessing pays, measured step times say."""
    monkeypatch.setattr(DraftPace, "begins", lambda *_: True)
    monkeypatch.setattr(DraftPace, "is_on", lambda *_: True)
    return worker_with_heads(request.param, tiny_checkpoint, tmp_path)


async def test_heads_guess_on_over_the_wider_cache_and_are_not_read_again(
    start_worker, make_prompt, heads, monkeypatch
):
    method = heads["speculation"].method
    async with real_cluster(start_worker) as cluster:
        await cluster.add(
            Role.COMBINED,
            worker_id="w",
            model_directory=heads["model_directory"],
            cache=CacheConfig(**SIZES, dtype="bfloat16"),
        )
        plain = await cluster.generate(request(cluster, "plain", make_prompt(60)))
    async with real_cluster(start_worker) as cluster:
        worker = await cluster.add(Role.COMBINED, worker_id="w", cache=WATCHED, **heads)
        before, size = worker.room.loaded, worker.room.pool_size
        stores = [before.runner.store, *([before.drafter.store] if method == "eagle3" else [])]
        planes = [weakref.ref(each) for store in stores for each in store.components]
        for loads in ("load_medusa_weights", "load_eagle3_head"):
            monkeypatch.delattr(speculation, loads)
        await cluster.generate(request(cluster, "first", make_prompt(60)))
        exceed(worker)
        await until(lambda: told(cluster).get("changes_codec_to"))
        assert await cluster.generate(request(cluster, "later", make_prompt(60))) == plain
        guessed = cluster.flow.explain("tenant", "later")["speculation"]
        assert (told(cluster)["cache_codec"], guessed["proposers"]) == ("bfloat16", [method])
        assert guessed["draft_tokens"] > 0
        after = worker.room.loaded
        layers = [after.runner.store.spec.main]
        if method == "eagle3":
            assert after.drafter.head is before.drafter.head
            assert after.drafter.store.num_blocks == after.runner.store.num_blocks
            layers.append(after.drafter.store.spec.main)
        assert {component.codec for layer in layers for component in layer.components} == {Codec.BF16}
        per_token = sum(layer.bytes_per_token for layer in layers)
        assert worker.room.pool_size.num_blocks == size.pool_bytes // (per_token * size.block_tokens)
        assert worker.room.pool_size.pool_bytes == worker.room.pool_size.num_blocks * per_token * size.block_tokens
        gc.collect()
        assert [plane() for plane in planes] == [None] * len(planes)


async def test_a_running_stream_ends_on_its_codec_and_later_ones_find_none_of_its_blocks(start_worker, make_prompt):
    async with real_cluster(start_worker) as cluster:
        worker = await cluster.add(Role.COMBINED, worker_id="w", cache=WATCHED, drain_timeout_s=TIMEOUT_S)
        alone = await cluster.generate(request(cluster, "alone", make_prompt(40), 100))
        running = asyncio.create_task(cluster.generate(request(cluster, "running", make_prompt(40), 100)))
        await until(lambda: worker.faces.decode.num_running)
        exceed(worker)
        await until(lambda: told(cluster).get("changes_codec_to"))
        later = asyncio.create_task(cluster.generate(request(cluster, "later", make_prompt(40), 8)))
        assert await running == alone
        assert len(cluster.flow.explain("tenant", "running")["dispatches"]) == 1
        assert len(await later) == 8
        assert told(cluster)["cache_codec"] == "bfloat16"
        assert cluster.flow.explain("tenant", "later")["tokens"]["cached"] == 0


async def test_a_stream_that_outlasts_the_drain_goes_on_with_its_tokens(start_worker, make_prompt):
    async with real_cluster(start_worker) as cluster:
        worker = await cluster.add(Role.COMBINED, worker_id="w", cache=WATCHED, drain_timeout_s=0.0)
        pieces = cluster.flow.generate(request(cluster, "long", make_prompt(50), 1900), Timeline())
        num_tokens = 0
        async with aclosing(pieces):
            async for piece in pieces:
                if not num_tokens:
                    exceed(worker)
                num_tokens += len(piece.token_ids)
                handed_back = len(cluster.flow.explain("tenant", "long")["dispatches"]) > 1
                if handed_back and worker.room.facts.model.cache_codec == "bfloat16":
                    break
        assert handed_back
        assert 0 < num_tokens < 1900


async def test_others_serve_meanwhile_and_do_not_pair_with_it_later(start_worker, make_prompt):
    free = {"deterministic": False}
    async with real_cluster(start_worker) as cluster:
        await cluster.add(Role.PREFILL, worker_id="p", cache=WATCHED, model=free)
        worker = await cluster.add(Role.DECODE, worker_id="w", cache=WATCHED, model=free)
        await cluster.add(Role.DECODE, worker_id="other", cache=WATCHED, model=free)
        exceed(worker)
        await until(lambda: told(cluster).get("changes_codec_to"))
        await worker.drain(0.0)  # by order: it outlasts the change
        await cluster.generate(request(cluster, "elsewhere", make_prompt(60)))
        assert cluster.flow.explain("tenant", "elsewhere")["decode_worker"] == "other"
        await until(lambda: told(cluster).get("fell_back_from") and told(cluster)["state"] == "draining")
        worker.undrain()
        await until(lambda: told(cluster)["state"] == "live")
        cluster.flow.members.roster.leaving(cluster.flow.members.fleet.get("other").facts.key)
        await cluster.generate(request(cluster, "here", make_prompt(61)))
        explained = cluster.flow.explain("tenant", "here")
        assert explained["decode_worker"] == "w"
        assert explained["kv_bytes_moved"] == 0  # what "p" has rounded is of no use to it


async def test_where_the_wider_pool_cannot_be_made_the_old_codec_goes_on(start_worker, make_prompt, monkeypatch):
    rebuild = driver.rebuild_engine

    def full(settings, clock, loaded, wanted, before):
        if wanted.codec == "bfloat16":
            raise MemoryError("no room for the pool")
        return rebuild(settings, clock, loaded, wanted, before)

    monkeypatch.setattr(driver, "rebuild_engine", full)
    async with real_cluster(start_worker) as cluster:
        worker = await cluster.add(Role.COMBINED, worker_id="w", cache=WATCHED)
        before = await cluster.generate(request(cluster, "before", make_prompt(40)))
        exceed(worker)
        await until(lambda: told(cluster).get("changes_codec_to"))
        assert await cluster.generate(request(cluster, "later", make_prompt(40))) == before
        assert told(cluster)["cache_codec"] == "int8"
        await until(lambda: told(cluster)["counters"].get("kv_guard_exceeded"))
        assert "restart it with another --kv-cache-dtype" in guards_of(cluster.flow.cluster())[0]


async def test_what_is_asked_of_a_worker_while_it_changes_its_new_engine_does(start_worker, monkeypatch, adapter):
    rebuild, loop = driver.rebuild_engine, asyncio.get_running_loop()
    async with real_cluster(start_worker) as cluster:
        worker = await cluster.add(Role.DECODE, worker_id="w", cache=WATCHED, model=LORA)
        loading = []

        async def ask():
            worker.set_role(Role.PREFILL)
            loading.append(asyncio.create_task(worker.adapters.load("x", str(adapter))))
            await asyncio.sleep(0)

        def late(settings, *rest):
            asyncio.run_coroutine_threadsafe(ask(), loop).result(TIMEOUT_S)
            return rebuild(settings, *rest)

        monkeypatch.setattr(driver, "rebuild_engine", late)
        exceed(worker)
        await until(lambda: told(cluster).get("fell_back_from"))
        await until(lambda: worker.room.engine.core.policy == worker.room.engine.core._roles[Role.PREFILL])
        assert told(cluster)["role"] == "prefill"
        async with asyncio.timeout(TIMEOUT_S):
            await loading[0]
        assert [served.name for served in worker.adapters.table.served] == ["x"]


async def test_a_worker_that_ends_while_it_changes_ends(start_worker):
    worker = await start_worker(Role.COMBINED, cache=WATCHED)
    exceed(worker)
    await asyncio.sleep(0)
    await worker.stop(0.0)
    assert worker.ended.is_set() or worker._room is None
