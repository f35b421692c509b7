"""Orders of new requests name decode workers whose blocks the prefill worker fetches before it computes."""

from __future__ import annotations

from support.fakes.list_router import Router

from twostroke.core.request import Role, SamplingParams
from twostroke.kv.block import BlockIdentity
from twostroke.protos import worker_pb2
from twostroke.router.requests.explain import explain_decisions, explain_run
from twostroke.router.routing.candidates import PolicyLimits
from twostroke.router.routing.facts import WorkerKey
from twostroke.router.routing.returns import RETURNS

BLOCKS = [BlockIdentity(bytes([n] * 16)) for n in range(6)]
PROMPT = tuple(range(100))  # six blocks and a few tokens


def cluster(held: dict[str, int]) -> Router:
    """Decode workers d, e and prefill worker p, each holding so many blocks of the prompt."""
    router = Router(policy=PolicyLimits(local_prefill=False))
    router.identities = lambda *_: BLOCKS  # type: ignore[method-assign]
    for name, role in (("d", Role.DECODE), ("e", Role.DECODE), ("p", Role.PREFILL)):
        router.join(name, role=role, capabilities=(RETURNS,))
        router.roster.watching(WorkerKey(name, 1))
        event = worker_pb2.WatchEvent(incarnation=1, sequence=1)
        event.snapshot.identities, event.snapshot.last = b"".join(BLOCKS[: held.get(name, 0)]), True
        assert router.roster.take_event(WorkerKey(name, 1), event, 0.0)
    return router


def asked_from(router: Router) -> list[tuple[str, int, str, int]]:
    """Ask for the prompt; returns whom its prefill worker is to fetch from."""
    router.ask(prompt_ids=PROMPT, sampling=SamplingParams(max_tokens=5))
    order = router.orders[-1]
    assert not order.block_sources, "a new request has nothing to fetch for its decode worker"
    (peer,) = order.prefill_peers
    return [(s.worker_id, s.incarnation, s.address, s.num_blocks) for s in peer.block_sources]


def test_the_decode_worker_with_the_earlier_turns_is_named() -> None:
    assert asked_from(cluster({"d": 5, "p": 2})) == [("d", 1, "d:1", 5)]
    assert [name for name, *_ in asked_from(cluster({"d": 5, "e": 4, "p": 0}))] == ["d", "e"]


def test_nobody_is_named_who_has_no_more_than_the_prefill_worker() -> None:
    assert asked_from(cluster({"d": 5, "p": 5})) == []
    assert [name for name, *_ in asked_from(cluster({"d": 5, "e": 2, "p": 2}))] == ["d"]


def test_a_worker_that_cannot_answer_is_not_named() -> None:
    router = cluster({"e": 5})
    worker = router.roster.fleet.get("e")
    assert worker is not None
    worker.silent = True
    assert asked_from(router) == []


def test_explain_says_whom_it_fetches_from() -> None:
    router = cluster({"d": 5})
    run = router.ask(prompt_ids=PROMPT, sampling=SamplingParams(max_tokens=5))
    told = explain_run(run, "running")
    winner = told["choice"]["winner"]
    assert (winner["prefill_fetched_from"], winner["prefill_held_tokens"]) == (["d"], 80)
    assert winner["fetch_ms"] > 0
    assert told["dispatches"][0]["return_sources"] == ["d"]
    assert explain_decisions(run)
