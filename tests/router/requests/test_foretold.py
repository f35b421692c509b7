"""What routing expected in prefix caches is compared with what the workers found."""

from __future__ import annotations

import pytest
from support.fakes.list_router import Router

from twostroke.core.request import Role, SamplingParams
from twostroke.kv.block import BlockIdentity
from twostroke.protos import worker_pb2
from twostroke.router.requests.foretold import Foretold, foretold
from twostroke.router.routing.candidates import PolicyLimits
from twostroke.router.routing.facts import WorkerKey

BLOCKS = [BlockIdentity(bytes([n] * 16)) for n in range(3)]


def cluster() -> Router:
    """A decode worker that holds three blocks of every prompt, and a prefill worker that holds two."""
    router = Router(policy=PolicyLimits(local_prefill=False))
    router.identities = lambda *_: BLOCKS  # type: ignore[method-assign]
    for name, role, count in (("d", Role.DECODE, 3), ("p", Role.PREFILL, 2)):
        router.join(name, role=role)
        router.roster.watching(WorkerKey(name, 1))
        event = worker_pb2.WatchEvent(incarnation=1, sequence=1)
        event.snapshot.identities, event.snapshot.last = b"".join(BLOCKS[:count]), True
        assert router.roster.take_event(WorkerKey(name, 1), event, 0.0)
    return router


def told(num_tokens: int = 70, prefill_worker: str = "p", **end: object) -> list[Foretold]:
    router = cluster()
    run = router.ask(prompt_ids=tuple(range(num_tokens)), sampling=SamplingParams(max_tokens=1))
    router.tokens(run)
    report = worker_pb2.HandoverReport(prefill_worker=prefill_worker, tokens_held=16, prefill_cached_tokens=48)
    router.end(run, handover=report, **end)  # type: ignore[arg-type]
    return list(foretold(run))


def test_both_workers_of_a_pair_are_compared() -> None:
    assert told() == [Foretold("decode", 48, 16), Foretold("prefill", 32, 48)]
    assert told(prefill_worker="") == [Foretold("decode", 48, 16)], "it was computed elsewhere"


def test_the_last_token_is_never_expected_to_be_cached() -> None:
    assert told(48, "")[0].expected == 32


def test_a_request_that_failed_tells_nothing() -> None:
    assert told(code="internal_error") == []


@pytest.mark.parametrize(
    ("expected", "found", "outcomes"), [(48, 16, (16, 32, 0)), (16, 48, (16, 0, 32)), (16, 16, (16, 0, 0))]
)
def test_outcomes_add_up(expected: int, found: int, outcomes: tuple[int, int, int]) -> None:
    assert tuple(Foretold("decode", expected, found).outcomes.values()) == outcomes
