"""A recorded decision has all that it was made from: it comes back equal, and gives the same choice."""

import json
from dataclasses import replace

import pytest

from twostroke.core.errors import InvalidRequest
from twostroke.core.request import Role
from twostroke.kv.spec import attention_spec, mla_spec
from twostroke.router.routing.candidates import PolicyLimits, RequestFacts, WorkerView
from twostroke.router.routing.coefficients import Coefficients
from twostroke.router.routing.facts import WorkerKey
from twostroke.router.routing.policy import choose
from twostroke.router.routing.recorded import asked_from_json, asked_to_json

VIEW = WorkerView(
    key=WorkerKey("p0", 2**63 + 1),
    address="h:1",
    role=Role.PREFILL,
    numerics=b"\x00x",
    capabilities=("handover.grpc.1", "kv.read.fp8"),
    kv_spec=attention_spec(2, 4, 16, 1),
    num_ranks=2,
    coefficients=Coefficients(0.1 + 0.2, 1e-5 / 3, 17.3, 4e9),
    kv_bytes_per_token=1000,
    queued_prefill_tokens=700,
    queued_prefill_pairs=1234.5,
    num_decoding=3,
    max_num_seqs=64,
    free_kv_tokens=10_000,
    in_flight=4,
    slowdown=1.5,
)
WORKERS = [
    VIEW,
    replace(VIEW, key=WorkerKey("d0", 1), role=Role.DECODE, slowdown=1.0),
    replace(VIEW, key=WorkerKey("d1", 1), role=Role.DECODE, numerics=b"y", kv_spec=mla_spec(2, 64, 16, 1), num_ranks=1),
    replace(VIEW, key=WorkerKey("c0", 1), role=Role.COMBINED, kv_spec=None, capabilities=()),
]


def test_it_comes_back_equal_through_json():
    limits = PolicyLimits(overlap=0.7, local_prefill=False)
    choice = choose(RequestFacts("r", 1601, 100, 2), WORKERS, {"p0": 7, "d1": 100}, limits)
    assert choice is not None
    assert choice.asked is not None
    again = asked_from_json(json.loads(json.dumps(asked_to_json(choice.asked))))
    assert again == choice.asked
    assert choose(again.request, again.workers, again.held, again.limits) == choice
    assert len(asked_to_json(choice.asked)["sides"]) == 3, "two workers announced the same"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda told: told.pop("limits"), "'limits' is missing"),
        (lambda told: told["workers"][0].pop("in_flight"), "'in_flight' is missing"),
        (lambda told: told["workers"][0].update(role="cook"), "'cook' is not a valid Role"),
        (lambda told: told["workers"][0].update(side=9), "list index out of range"),
        (lambda told: told["request"].update(colour="red"), "unexpected keyword argument 'colour'"),
        (lambda told: told["sides"][0].update(numerics="zz"), "non-hexadecimal"),
    ],
)
def test_another_form_is_refused_with_its_fault(change, said: str):
    choice = choose(RequestFacts("r", 1601, 100, 2), WORKERS, {}, PolicyLimits())
    assert choice is not None
    assert choice.asked is not None
    told = asked_to_json(choice.asked)
    change(told)
    with pytest.raises(InvalidRequest) as caught:
        asked_from_json(told)
    assert str(caught.value).startswith("no recorded decision of this release: ")
    assert said in str(caught.value)
