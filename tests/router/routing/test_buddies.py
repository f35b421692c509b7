"""Who keeps a copy of a stream's KV."""

from dataclasses import replace

from twostroke.core.request import Role
from twostroke.router.routing.buddies import KEEPS, buddy_of
from twostroke.router.routing.candidates import PolicyLimits, RequestFacts, WorkerView
from twostroke.router.routing.coefficients import Coefficients
from twostroke.router.routing.facts import WorkerKey
from twostroke.router.routing.policy import choose

VIEW = WorkerView(
    key=WorkerKey("d0", 1),
    address="h:1",
    role=Role.DECODE,
    numerics=b"x",
    capabilities=(KEEPS,),
    kv_spec=None,
    num_ranks=1,
    coefficients=Coefficients(),
    kv_bytes_per_token=1000,
    queued_prefill_tokens=0,
    queued_prefill_pairs=0.0,
    num_decoding=0,
    max_num_seqs=64,
    free_kv_tokens=1000,
    in_flight=0,
)


def named(name: str, **changes) -> WorkerView:
    return replace(VIEW, key=WorkerKey(name, 1), **changes)


def buddy(workers, held=None, chosen="d0", limits=None):
    choice = choose(RequestFacts("r", 200, 100), workers, {chosen: 1}, limits or PolicyLimits())
    assert choice is not None
    choice = replace(choice, winner=next(c for c in choice.candidates if c.decode.worker_id == chosen))
    found = buddy_of(choice, workers, held or {})
    return None if found is None else found.worker_id


def test_the_prefill_worker_of_the_prompt_has_most_of_it():
    workers = [VIEW, named("p0", role=Role.PREFILL), named("d1", free_kv_tokens=9000)]
    assert buddy(workers, {"d1": 5}, limits=PolicyLimits(local_prefill=False)) == "p0"


def test_else_who_holds_most_of_it_then_who_has_most_room():
    workers = [VIEW, named("d1", free_kv_tokens=9000), named("d2"), named("d3")]
    assert buddy(workers, {"d0": 99, "d2": 5}) == "d2"
    assert buddy(workers) == "d1"


def test_nobody_keeps_its_own_copy_nor_one_that_it_cannot_read_or_does_not_know():
    assert buddy([VIEW]) is None
    assert buddy([VIEW, named("d1", numerics=b"y"), named("d2", capabilities=("handover.grpc.1",))]) is None
