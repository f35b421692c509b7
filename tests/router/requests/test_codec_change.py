"""Requests whose only worker changes its cache's codec: they wait for it, others go elsewhere, and no KV is mixed."""

from dataclasses import replace

import pytest
from support.fakes.list_router import Router

from twostroke.core.errors import Unavailable
from twostroke.core.request import Role
from twostroke.kv.keys import identity_class
from twostroke.router.requests.state import Stage
from twostroke.router.routing.facts import LoadFacts, WorkerKey, WorkerState
from twostroke.router.routing.views import views_of


def change(router: Router, name: str = "a") -> None:
    """The worker announces that it drains and comes back."""
    facts = router.roster.fleet.get(name).facts
    router.roster.announced(replace(facts, changes_codec_to="bfloat16"), router.now_s)


def pass_s(router: Router, seconds: int) -> None:
    for _ in range(seconds):
        router.pass_s(1.0)
        for worker in router.roster.fleet:
            router.roster.beat(worker.facts.key, None, router.now_s)
        router.roster.tick(router.now_s, 100)


def come_back(router: Router, name: str = "a") -> None:
    facts = router.roster.fleet.get(name).facts
    model = replace(facts.model, cache_codec="bfloat16", fell_back_from="int8")
    again = replace(facts, incarnation=2, changes_codec_to="", model=model)
    router.roster.announced(again, router.now_s)
    router.up.add(again.key)
    router.roster.session_up(again.key, again, router.now_s)


def test_a_request_waits_for_the_only_worker_while_it_changes() -> None:
    router = Router("a", return_s=30.0)
    change(router)
    fleet = router.roster.fleet
    assert fleet.get("a").state is WorkerState.DRAINING  # at once, before its next load report
    fleet.loaded(WorkerKey("a", 1), LoadFacts(draining=False), Role.COMBINED, router.now_s)
    assert fleet.get("a").state is WorkerState.DRAINING
    run = router.ask(timeout_s=60.0)
    pass_s(router, 20)
    assert run.stage is Stage.ROUTING
    come_back(router)
    router.pass_s(0.1)
    assert run.dispatches[-1].decode == WorkerKey("a", 2)
    assert fleet.num_lost == 0


def test_a_request_waits_also_where_its_streams_end_before_it_is_announced_again() -> None:
    router = Router("a", return_s=30.0)
    change(router)
    key = WorkerKey("a", 1)
    router.roster.announce_ended(key, router.now_s)
    router.roster.session_down(key, "ended", router.now_s)
    assert router.roster.fleet.get("a") is None
    run = router.ask(timeout_s=60.0)
    pass_s(router, 20)
    assert run.stage is Stage.ROUTING
    router.join("a", incarnation=2)
    router.pass_s(0.1)
    assert run.dispatches[-1].decode == WorkerKey("a", 2)


def test_nobody_waits_for_a_worker_that_leaves_while_it_changes() -> None:
    router = Router("a", return_s=30.0)
    change(router)
    router.roster.leaving(WorkerKey("a", 1))
    router.roster.session_down(WorkerKey("a", 1), "ended", router.now_s)
    with pytest.raises(Unavailable, match="no worker"):
        router.ask(timeout_s=60.0)


def test_a_worker_that_does_not_change_after_all_serves_again() -> None:
    router = Router("a")
    facts = router.roster.fleet.get("a").facts
    change(router)
    router.roster.announced(facts, router.now_s)
    router.roster.fleet.loaded(facts.key, LoadFacts(), Role.COMBINED, router.now_s)
    assert router.roster.fleet.get("a").state is WorkerState.LIVE


def test_blocks_of_a_worker_that_fell_back_have_names_of_their_own_and_it_pairs_with_its_like() -> None:
    router = Router("a", "b")
    model = replace(router.roster.fleet.get("a").facts.model, deterministic=False)
    fallen = replace(model, fell_back_from="int8")
    assert identity_class(model) == b""
    assert identity_class(fallen)
    assert identity_class(replace(fallen, deterministic=True)) == fallen.numerics_class  # which has the codec in it
    for name, each in (("a", model), ("b", fallen)):
        worker = router.roster.fleet.get(name)
        worker.facts = replace(worker.facts, model=each)
    plain, other = views_of(router.roster.fleet)
    assert plain.numerics != other.numerics
