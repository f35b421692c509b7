"""A router, a decode worker and a prefill worker give the blocks of one prompt the same names, by every field of it."""

from dataclasses import fields

from support.real_cluster import real_cluster
from support.workers import CLUSTER_KEY

from twostroke.core.request import CacheScope, Request, Role, SamplingParams
from twostroke.kv.config import CacheConfig
from twostroke.kv.handover.frames import decode_envelope
from twostroke.kv.handover.transports.grpc import Channels
from twostroke.kv.keys import proof_key
from twostroke.kv.messages import scope_to_wire
from twostroke.protos import handover_pb2
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


async def fetched(worker, identities, scope):
    """Which of these blocks a worker has under a scope."""
    wanted = handover_pb2.FetchRequest(identities=identities, **scope_to_wire(scope)).SerializeToString()
    channels = Channels(proof_key(CLUSTER_KEY))
    frames = [decode_envelope(e) async for e in channels.fetch(worker.address, wanted, 5.0)]
    return tuple(identity for frame in frames for identity in frame.header.identities)


def test_the_scopes_here_differ_in_every_field():
    plain = SCOPES["tenant"]
    changed = {name for scope in SCOPES.values() for name, value in scope.items() if value != plain.get(name)}
    assert changed == {field.name for field in fields(CacheScope)}


async def test_the_router_names_a_prompt_as_both_workers_do(start_worker, make_prompt, all_free):
    ids, seen = make_prompt(100), set()
    for kind, changes in CLASSES.items():
        async with real_cluster(start_worker, local_prefill=False) as cluster:
            prefill, decode = [await cluster.add(role, **changes) for role in (Role.PREFILL, Role.DECODE)]
            model = worker_from_wire(decode.info()).model
            requests = {name: request(name, ids, **scope) for name, scope in SCOPES.items()}
            names = {name: cluster.identities(asked, model) for name, asked in requests.items()}
            for name, asked in requests.items():
                for worker in (prefill, decode):
                    assert await fetched(worker, names[name], asked.cache_scope) == (), f"{name}, {kind}: too early"
                await cluster.generate(asked)
                await all_free(prefill, decode)
                assert len(names[name]) == 6
                for worker in (prefill, decode):
                    assert await fetched(worker, names[name], asked.cache_scope) == names[name], f"{name}, {kind}"
                    for other in requests.values():
                        if other is not asked:
                            assert await fetched(worker, names[name], other.cache_scope) == ()
            assert not seen & {identity for chain in names.values() for identity in chain}
            seen |= {identity for chain in names.values() for identity in chain}
    assert len(seen) == 6 * len(SCOPES) * len(CLASSES)
