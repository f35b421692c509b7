"""Adapters at real workers: loaded at the start and while they serve, routed to their holders, never sharing KV."""

import asyncio
import shutil
import threading
from contextlib import aclosing

import pytest
from support.checkpoints.adapters import peft_oracle, save_adapter
from support.clusters.real_cluster import real_cluster

from twostroke.core.errors import InvalidRequest, ModelNotFound, Overloaded, Unavailable
from twostroke.core.request import Request, Role, SamplingParams
from twostroke.core.timeline import Timeline
from twostroke.kv.config import CacheConfig
from twostroke.model.adapters.loading import AdapterLoader

EXACT = CacheConfig(tokens=8192, frame_bytes=8192, dtype="float32")
NUM_TOKENS = 6


@pytest.fixture(scope="module")
def saved(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: save_adapter(tiny_checkpoint, folder / name, seed=seed, r=rank)
        for seed, (name, rank) in enumerate({"a": 8, "b": 16, "c": 64}.items(), 1)
    }


def request(flow, name, prompt_ids, model="tiny", max_tokens=NUM_TOKENS):
    """A request as the validator makes it: for the model of that name."""
    facts = next(facts for facts in flow.models() if facts.name == model)
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    adapter = facts.adapter.digest if facts.adapter else b""
    return Request(
        name, model, tuple(prompt_ids), sampling, 1, "tenant", timeout_s=60.0, adapter=adapter, base_model=facts.base
    )


def modules(saved, *names):
    return {"lora_modules": [{"name": name, "path": str(saved[name])} for name in names]}


def greedy(oracle, prompt_ids):
    ids = list(prompt_ids)
    for _ in range(NUM_TOKENS):
        ids.append(int(oracle(ids)[-1].argmax()))
    return ids[len(prompt_ids) :]


async def held(worker, flow, asked):
    model = next(facts for facts in flow.models() if facts.name == "tiny")
    names = flow.members.identities(asked, model)
    found = await worker.dispatcher.fetch(names, 0, worker._room.facts.namer.root(asked.cache_scope))
    return found.num_blocks


async def test_adapters_answer_as_peft_does_across_a_hand_over_and_share_no_kv(
    start_worker, make_prompt, saved, tiny_checkpoint
):
    from support.checkpoints.logits_oracle import oracle

    expected = {"tiny": oracle(tiny_checkpoint), **{name: peft_oracle(tiny_checkpoint, saved[name]) for name in "ab"}}
    prompt = make_prompt(70)
    async with real_cluster(start_worker, local_prefill=False) as cluster:
        settings = {"cache": EXACT, "model": modules(saved, "a", "b")}
        prefill, decode = [await cluster.add(role, **settings) for role in (Role.PREFILL, Role.DECODE)]
        flow = cluster.flow
        assert [facts.name for facts in flow.models()] == ["a", "b", "tiny"]
        requests = {name: request(flow, name, prompt, name) for name in ("tiny", "a", "b")}
        answers = dict(
            zip(requests, await asyncio.gather(*map(cluster.generate, requests.values())), strict=True)
        )  # all in the same batches
        assert len({tuple(answer) for answer in answers.values()}) == 3
        for name, answer in answers.items():
            assert answer == greedy(expected[name], prompt), name
            for worker in (prefill, decode):
                assert await held(worker, flow, requests[name]) == 4
        again = request(flow, "again", prompt, "a")
        assert await cluster.generate(again) == answers["a"]
        told = flow.explain("tenant", "again")
        assert told["tokens"]["cached"] == 64
        assert told["adapter"] == again.adapter.hex()
        assert told["kv_bytes_moved"] == 0  # decode had the prefix of this adapter itself


async def test_requests_go_to_workers_that_hold_their_adapter(start_worker, make_prompt, saved):
    async with real_cluster(start_worker, local_prefill=True) as cluster:
        await cluster.add(Role.PREFILL, worker_id="p", model={"enable_lora": True})
        await cluster.add(Role.DECODE, worker_id="d-a", model=modules(saved, "a"))
        await cluster.add(Role.DECODE, worker_id="d-b", model=modules(saved, "b"))
        for number in range(3):
            for name, holder in (("a", "d-a"), ("b", "d-b")):
                asked = request(cluster.flow, f"{name}{number}", make_prompt(40), name)
                await cluster.generate(asked)
                told = cluster.flow.explain("tenant", asked.request_id)
                assert told["decode_worker"] == holder
                assert told["prefill_worker"] is None  # "p" does not hold it, and so was not asked


async def test_adapters_come_and_go_while_a_stream_runs(start_worker, make_prompt, saved):
    async with real_cluster(start_worker, local_prefill=False) as cluster:
        flow, settings = cluster.flow, {"model": {"enable_lora": True}}
        workers = [await cluster.add(role, **settings) for role in (Role.PREFILL, Role.DECODE)]
        await flow.adapters.load("x", str(saved["a"]))
        first = request(flow, "first", make_prompt(40), "x", max_tokens=200)
        pieces = flow.generate(first, Timeline())
        async with aclosing(pieces):
            await anext(pieces)
            with pytest.raises(InvalidRequest, match="loaded already"):
                await flow.adapters.load("x", str(saved["b"]))
            await flow.adapters.load("x", str(saved["b"]), replace=True)  # another adapter under the same name
            second = request(flow, "second", make_prompt(40), "x")
            assert second.adapter != first.adapter
            await cluster.generate(second)
            assert flow.explain("tenant", "second")["tokens"]["cached"] == 0
            await flow.adapters.unload("x")
            assert [facts.name for facts in flow.models()] == ["tiny"]
            with pytest.raises(ModelNotFound):
                await cluster.generate(second)
            num_tokens = sum([len(piece.token_ids) async for piece in pieces])
        assert num_tokens >= 190  # the first request kept the adapter that it began with
        for worker in workers:
            async with asyncio.timeout(60):
                while worker.adapters.table.num_bytes or worker.room.engine.runner._adapters:  # then it is forgotten
                    await asyncio.sleep(0.01)
        with pytest.raises(ModelNotFound):
            await flow.adapters.unload("x")


@pytest.mark.parametrize("name", ["a\nb", "\x00", "a\u202eb"])
async def test_a_name_that_cannot_be_shown_is_refused(start_worker, saved, name):
    worker = await start_worker(Role.COMBINED, cache=EXACT, model=modules(saved, "a"))
    with pytest.raises(InvalidRequest, match="characters that cannot be shown"):
        await worker.adapters.load(name, str(saved["b"]))


async def test_all_workers_load_an_adapter_or_none(start_worker, saved, tmp_path):
    async with real_cluster(start_worker) as cluster:
        await cluster.add(Role.DECODE, model={"enable_lora": True})
        small = await cluster.add(Role.PREFILL, model={"enable_lora": True, "max_loras": 1})
        await cluster.flow.adapters.load("a", str(saved["a"]))
        with pytest.raises(Overloaded, match="1 adapters are loaded"):
            await cluster.flow.adapters.load("b", str(saved["b"]))
        assert [facts.name for facts in cluster.flow.models()] == ["a", "tiny"]
        with pytest.raises(InvalidRequest, match="adapter_config"):
            await cluster.flow.adapters.load("none", str(tmp_path))
        with pytest.raises(InvalidRequest, match="absolute"):
            await cluster.flow.adapters.load("none", "somewhere")
        with pytest.raises(InvalidRequest, match="name of a model"):
            await cluster.flow.adapters.load("tiny", str(saved["b"]))
        assert [served.name for served in small.adapters.table.served] == ["a"]
        await cluster.flow.adapters.load("alias", str(saved["a"]))  # the same numbers: nothing is loaded again
        assert [served.name for served in small.adapters.table.served] == ["a", "alias"]


async def test_a_worker_that_comes_later_gets_what_the_others_got(start_worker, make_prompt, saved):
    async with real_cluster(start_worker) as cluster:
        await cluster.add(Role.PREFILL, model={"enable_lora": True})
        first = await cluster.add(Role.DECODE, model={"enable_lora": True})
        await cluster.flow.adapters.load("a", str(saved["a"]))
        asked = request(cluster.flow, "r", make_prompt(40), "a")
        answer = await cluster.generate(asked)
        second = await cluster.add(Role.DECODE, model={"enable_lora": True})
        async with asyncio.timeout(60):
            while not second.adapters.table.served:
                await asyncio.sleep(0.01)
        cluster.lose(first, may_return=False)
        async with asyncio.timeout(60):
            while not cluster.flow.members.fleet.get(second.settings.worker_id).facts.holds(asked.adapter):
                await asyncio.sleep(0.01)
        later = request(cluster.flow, "later", make_prompt(40), "a")
        assert await cluster.generate(later) == answer
        assert cluster.flow.explain("tenant", "later")["decode_worker"] == second.settings.worker_id


async def test_what_was_loaded_through_one_router_is_given_by_another_to_a_worker_that_comes(start_worker, saved):
    async with real_cluster(start_worker) as first, real_cluster(start_worker) as second:
        routers, lora = (first.address, second.address), {"enable_lora": True}
        await start_worker(Role.DECODE, routers=routers, model=lora)
        async with asyncio.timeout(30):
            while not all(cluster.flow.models() for cluster in (first, second)):
                await asyncio.sleep(0.01)
        await first.flow.adapters.load("a", str(saved["a"]))
        newcomer = await second.add(Role.PREFILL, model=lora)
        async with asyncio.timeout(30):
            while [served.name for served in newcomer.adapters.table.served] != ["a"]:
                await asyncio.sleep(0.01)
        await second.flow.adapters.unload("a")
        another = await second.add(Role.PREFILL, worker_id="another", model=lora)
        assert not another.adapters.table.served


async def test_a_worker_that_comes_while_the_others_load_gets_it_too(start_worker, saved, monkeypatch):
    may_end, load = threading.Event(), AdapterLoader._held

    def slow(loader, command):
        assert may_end.wait(60)
        return load(loader, command)

    async with real_cluster(start_worker) as cluster:
        await cluster.add(Role.DECODE, model={"enable_lora": True})
        monkeypatch.setattr(AdapterLoader, "_held", slow)
        loading = asyncio.create_task(cluster.flow.adapters.load("a", str(saved["a"])))
        try:
            await asyncio.sleep(0.2)  # the workers to ask are chosen
            newcomer = await cluster.add(Role.PREFILL, model={"enable_lora": True})
        finally:
            may_end.set()
        await loading
        async with asyncio.timeout(30):
            while [served.name for served in newcomer.adapters.table.served] != ["a"]:
                await asyncio.sleep(0.01)


async def test_steps_go_on_while_an_adapter_is_loaded(start_worker, make_prompt, saved, monkeypatch):
    may_end, load = threading.Event(), AdapterLoader._held

    def slow(loader, command):
        assert may_end.wait(60)
        return load(loader, command)

    async with real_cluster(start_worker) as cluster:
        await cluster.add(Role.DECODE, model={"enable_lora": True})
        monkeypatch.setattr(AdapterLoader, "_held", slow)
        loading = asyncio.create_task(cluster.flow.adapters.load("a", str(saved["a"])))
        try:
            for number in range(3):
                assert len(await cluster.generate(request(cluster.flow, str(number), make_prompt(40)))) == NUM_TOKENS
            assert not loading.done()
            assert [facts.name for facts in cluster.flow.models()] == ["tiny"]  # not before it is there
        finally:
            may_end.set()
        await loading
        assert [facts.name for facts in cluster.flow.models()] == ["a", "tiny"]


async def test_a_worker_that_lacks_an_adapter_refuses_instead_of_answering_without_it(start_worker, make_prompt, saved):
    async with real_cluster(start_worker, worker_patience_s=0.2) as cluster:
        worker = await cluster.add(Role.DECODE, model=modules(saved, "a"))
        asked = request(cluster.flow, "r", make_prompt(40), "a")
        worker.adapters.table.remove("a")  # the router does not know yet
        with pytest.raises(Unavailable, match="is not loaded by this worker"):
            await cluster.generate(asked)
        assert len(await cluster.generate(request(cluster.flow, "r2", make_prompt(40)))) == NUM_TOKENS


async def test_an_adapter_that_cannot_be_replaced_everywhere_goes_on_serving(
    start_worker, make_prompt, saved, tmp_path, monkeypatch
):
    async with real_cluster(start_worker) as cluster:
        flow, place = cluster.flow, tmp_path / "place"
        workers = [await cluster.add(role, model={"enable_lora": True}) for role in (Role.DECODE, Role.PREFILL)]
        shutil.copytree(saved["a"], place)
        await flow.adapters.load("x", str(place))
        before = request(flow, "before", make_prompt(40), "x")
        answer = await cluster.generate(before)
        shutil.rmtree(place)
        shutil.copytree(saved["b"], place)  # in place: the old files are gone
        whole = (place / "adapter_model.safetensors").read_bytes()
        (place / "adapter_model.safetensors").write_bytes(whole[:-64])
        with pytest.raises(InvalidRequest, match=r"place/adapter_model\.safetensors"):
            await flow.adapters.load("x", str(place), replace=True)
        (place / "adapter_model.safetensors").write_bytes(whole)
        load = AdapterLoader._held

        def full(loader, command):  # the second worker has no memory for it
            if loader is workers[1].room.engine._adapters:
                raise MemoryError
            return load(loader, command)

        monkeypatch.setattr(AdapterLoader, "_held", full)
        with pytest.raises(Overloaded, match=r"place: not enough memory .*unload one"):
            await flow.adapters.load("x", str(place), replace=True)
        assert [facts.name for facts in flow.models()] == ["tiny", "x"]
        for worker in workers:
            assert [(held.name, held.digest) for held in worker.adapters.table.served] == [("x", before.adapter)]
        assert await cluster.generate(request(flow, "between", make_prompt(40), "x")) == answer
        monkeypatch.setattr(AdapterLoader, "_held", load)
        await flow.adapters.load("x", str(place), replace=True)
        assert [facts.name for facts in flow.models()] == ["tiny", "x"]
        assert request(flow, "after", make_prompt(40), "x").adapter != before.adapter
        assert await cluster.generate(request(flow, "after", make_prompt(40), "x")) != answer
