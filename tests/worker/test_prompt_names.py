"""A router, a decode worker and a prefill worker give the blocks of one prompt the same names, by every field of it."""

import asyncio
from dataclasses import fields, replace

import pytest
from support.clusters.real_cluster import real_cluster

from twostroke.core.request import CacheScope, Request, Role, SamplingParams
from twostroke.engine import cache_manager
from twostroke.engine.adapters import AdapterTable
from twostroke.kv import keys
from twostroke.kv.config import CacheConfig
from twostroke.kv.keys import PromptHasher
from twostroke.router.routing.facts import WorkerFacts
from twostroke.router.workers.wire import worker_from_wire

SCOPES = {
    "tenant": {"isolation_domain": "tenant"},
    "other tenant": {"isolation_domain": "other"},
    "salt": {"isolation_domain": "tenant/salt-1"},
    "adapter": {"isolation_domain": "tenant", "adapter": b"a" * 16},
    "other adapter": {"isolation_domain": "tenant", "adapter": b"b" * 16},
}
CLASSES = {
    "deterministic": {},
    "of no class": {"model": {"deterministic": False}},
    "of another class": {"cache": CacheConfig(tokens=8192, frame_bytes=8192, dtype="float32")},
}


def request(name, prompt_ids, **changes):
    sampling = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    return Request(name, "tiny", tuple(prompt_ids), sampling, 1, timeout_s=60.0, **changes)


async def num_held(worker, identities, scope):
    """How many leading blocks of a prompt a worker has, by the router's names and its own root of the scope."""
    return (await worker.dispatcher.fetch(identities, 0, worker._room.facts.namer.root(scope))).num_blocks


def test_the_scopes_here_differ_in_every_field():
    plain = SCOPES["tenant"]
    changed = {name for scope in SCOPES.values() for name, value in scope.items() if value != plain.get(name)}
    assert changed == {field.name for field in fields(CacheScope)}


async def test_the_router_names_a_prompt_as_both_workers_do(start_worker, make_prompt, all_free, monkeypatch):
    monkeypatch.setattr(AdapterTable, "hold", lambda *_: 0)  # as if both adapters were loaded
    monkeypatch.setattr(AdapterTable, "release", lambda *_: None)
    monkeypatch.setattr(WorkerFacts, "holds", lambda *_: True)
    ids, seen = make_prompt(100), set()
    for kind, changes in CLASSES.items():
        async with real_cluster(start_worker, local_prefill=False) as cluster:
            prefill, decode = [await cluster.add(role, **changes) for role in (Role.PREFILL, Role.DECODE)]
            model = worker_from_wire(decode.info()).model
            requests = {name: request(name, ids, **scope) for name, scope in SCOPES.items()}
            names = {name: cluster.identities(asked, model) for name, asked in requests.items()}
            for name, asked in requests.items():
                for worker in (prefill, decode):
                    assert await num_held(worker, names[name], asked.cache_scope) == 0, f"{name}, {kind}: too early"
                await cluster.generate(asked)
                await all_free(prefill, decode)
                assert len(names[name]) == 6
                for worker in (prefill, decode):
                    assert await num_held(worker, names[name], asked.cache_scope) == 6, f"{name}, {kind}"
                    for other in requests.values():
                        if other is not asked:
                            assert await num_held(worker, names[name], other.cache_scope) == 0
            assert not seen & {identity for chain in names.values() for identity in chain}
            seen |= {identity for chain in names.values() for identity in chain}
    assert len(seen) == 6 * len(SCOPES) * len(CLASSES)


class Hashing:
    """Which prompts were hashed by whose hasher, and what engines hashed behind them. Everything runs as ever."""

    def __init__(self, monkeypatch):
        self.hashers = []  # of each prompt
        self.num_prompt_blocks = 0
        self.engine_links = []  # before each run of blocks that an engine hashed
        self.num_engine_blocks = 0
        self.on_prompt = lambda hasher: None
        name, chain = PromptHasher.name, keys.chain

        def counted_name(hasher, *given):
            self.hashers.append(hasher)
            self.on_prompt(hasher)
            return name(hasher, *given)

        def counted_prompt(*given):
            identities = chain(*given)
            self.num_prompt_blocks += len(identities)
            return identities

        def counted_behind(key, link, token_ids):
            self.engine_links.append(link)
            identities = chain(key, link, token_ids)
            self.num_engine_blocks += len(identities)
            return identities

        monkeypatch.setattr(PromptHasher, "name", counted_name)
        monkeypatch.setattr(keys, "chain", counted_prompt)
        monkeypatch.setattr(cache_manager, "chain", counted_behind)

    def by(self, worker):
        """How many prompts a worker hashed."""
        return sum(hasher is worker._room.facts.namer for hasher in self.hashers)


@pytest.mark.parametrize("heir", ["itself", "another"])
async def test_a_process_hashes_a_prompt_once_whatever_its_choices_and_dispatches(
    start_worker, make_prompt, all_free, monkeypatch, heir
):
    async with real_cluster(start_worker, local_prefill=False) as cluster:
        prefill = await cluster.add(Role.PREFILL)
        decoders = [await cluster.add(Role.DECODE) for _ in range(1 if heir == "itself" else 2)]
        hashing = Hashing(monkeypatch)

        def lose_first(hasher):
            for worker in decoders:
                if hasher is worker._room.facts.namer:
                    hashing.on_prompt = lambda hasher: None
                    asyncio.get_running_loop().call_soon(cluster.lose, worker, heir == "itself")  # before any token

        hashing.on_prompt = lose_first
        sampling = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
        asked = replace(request("r", make_prompt(100), isolation_domain="t"), num_choices=2, sampling=sampling)
        tokens = await cluster.generate(asked)
        await all_free(prefill, *decoders)
        assert tokens[:40] == tokens[40:]
        dispatches = cluster.flow.explain("t", "r")["dispatches"]
        assert len(dispatches) == 2
        assert len({dispatch["decode_worker"] for dispatch in dispatches}) == len(decoders)
        assert [hashing.by(worker) for worker in (prefill, *decoders)] == [1] * (1 + len(decoders))
        assert len(hashing.hashers) == 2 + len(decoders)  # and the router's
        assert hashing.num_prompt_blocks == 6 * len(hashing.hashers)
        # Two blocks of each choice end behind the prompt's six: an engine hashes these and no other.
        assert hashing.num_engine_blocks == 2 * 2
        assert decoders[0]._room.facts.namer.root(asked.cache_scope) not in hashing.engine_links
