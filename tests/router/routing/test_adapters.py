"""Which workers a request with an adapter may go to, and under which names adapters are served."""

from dataclasses import replace

import pytest

from twostroke.core.errors import ModelNotFound
from twostroke.core.request import Request, Role, SamplingParams
from twostroke.router.routing.facts import AdapterFacts, ModelFacts, WorkerFacts
from twostroke.router.routing.fleet import Fleet
from twostroke.router.routing.views import model_of

MODEL = ModelFacts("m", b"f" * 16, b"n", "", 4096, 1000, True, "", 1000)
A, B = AdapterFacts("x", b"a" * 16, "/a"), AdapterFacts("x", b"b" * 16, "/b")


def fleet(**adapters):
    made = Fleet()
    for number, (name, held) in enumerate(adapters.items(), 1):
        role = Role.PREFILL if name.startswith("p") else Role.DECODE
        facts = WorkerFacts(name, number, role, f"h:{number}", MODEL, 100, 16, 8, 64, adapters=tuple(held))
        made.announced(facts, 0.0)
        made.session_up(facts.key, facts, 0.0)
    return made


def names(workers):
    return [worker.facts.worker_id for worker in workers]


def request(adapter):
    sampling = SamplingParams(max_tokens=2)
    return Request("r", "x", (1, 2), sampling, 1, "t", timeout_s=1.0, adapter=adapter, base_model="m")


def test_only_workers_that_hold_the_adapter_serve_it():
    made = fleet(d1=[A], d2=[B], d3=[], p1=[A], p2=[])
    assert names(made.serving("m")) == ["d1", "d2", "d3", "p1", "p2"]
    assert names(made.serving("m", A.digest)) == ["d1", "p1"]
    assert names(made.serving("m", b"other")) == []
    assert made.may_serve_soon("m", A.digest)
    assert not made.may_serve_soon("m", b"other")
    assert not fleet(d1=[], p1=[A]).may_serve_soon("m", A.digest)  # a prefill worker decodes nothing


def test_an_adapter_is_a_model_with_a_base():
    served = fleet(d1=[A], p1=[replace(A, name="of prefill alone")]).adapters()
    assert list(served) == ["x"]
    assert (served["x"].name, served["x"].base, served["x"].adapter) == ("x", "m", A)


def test_a_name_is_the_adapter_that_most_workers_have_while_they_differ():
    assert fleet(d1=[A], d2=[A], d3=[B]).adapters()["x"].adapter == A
    assert fleet(d1=[A], d2=[B], d3=[B]).adapters()["x"].adapter == B


def test_a_lost_worker_keeps_its_adapters_known_until_it_may_not_come_back():
    made = fleet(d1=[A])
    key = made.get("d1").facts.key
    made.announce_ended(key, 1.0)
    made.session_down(key, 1.0, "lost")
    assert made.get("d1") is None
    assert list(made.adapters()) == ["x"]
    assert model_of(made, request(A.digest)) == MODEL
    made.tick(1e6)
    assert made.adapters() == {}


def test_an_adapter_that_nobody_has_is_not_found():
    with pytest.raises(ModelNotFound, match="no worker serves 'x'"):
        model_of(fleet(d1=[A], p1=[B]), request(B.digest))
    assert model_of(fleet(p1=[]), request(b"")) == MODEL  # without one it waits for a decode worker


def test_a_worker_that_announces_other_adapters_is_believed():
    made = fleet(d1=[A])
    facts = made.get("d1").facts
    made.announced(replace(facts, adapters=(B,)), 1.0)
    assert names(made.serving("m", A.digest)) == []
    assert names(made.serving("m", B.digest)) == ["d1"]
