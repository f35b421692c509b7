"""Each compared policy on states that were worked out by hand."""

import random

import pytest

from twostroke.core.request import Role, SequenceKey
from twostroke.router.routing.candidates import RequestFacts
from twostroke.router.routing.facts import LoadFacts, ModelFacts, WorkerFacts
from twostroke.router.routing.known_worker import Dispatched, Worker
from twostroke.sim.replay.peers import DynamoKv, LlmdWeighted, SglangCacheAware
from twostroke.sim.replay.policies import LeastLoaded, PowerOfTwo, PrefixOnly, Query, Question, RoundRobin, Stage

MODEL = ModelFacts("m", b"", b"", "", 1 << 20, 1000, False, "/", 1000)
REQUEST = RequestFacts("r", 1600, 1024)


def worker(name: str, under_way: int = 0, role: Role = Role.COMBINED, **load: int) -> Worker:
    facts = WorkerFacts(name, 1, role, "h:1", MODEL, 1000, 16, 64, 2048)
    found = Worker(
        facts, 0.0, 0.0, role=role, load=LoadFacts(total_blocks=1000, **{"free_blocks": 1000, **load}), load_s=1.0
    )
    for number in range(under_way):
        found.in_flight[SequenceKey(f"{name}-{number}", 0)] = Dispatched(0.5, 0, 100 + 1024)
    return found


def ask(workers: list[Worker], stage: Stage = Stage.WHOLE, **held: int) -> Question:
    return Question(REQUEST, stage, workers, held)


def name_of(chosen: Worker) -> str:
    return chosen.facts.worker_id


CHANCE = random.Random(1)


def test_round_robin_goes_on_where_it_was():
    policy, workers = RoundRobin(), [worker("a"), worker("b"), worker("c")]
    assert [name_of(policy.pick(ask(workers))) for _ in range(4)] == ["a", "b", "c", "a"]


def test_the_least_loaded_worker_has_the_fewest_requests():
    assert name_of(LeastLoaded(CHANCE).pick(ask([worker("a", 3), worker("b", 1), worker("c", 2)], a=1600))) == "b"


def test_power_of_two_never_takes_the_most_loaded_of_three():
    workers = [worker("a", 3), worker("b", 1), worker("c", 2)]
    policy = PowerOfTwo(random.Random(2))
    assert {name_of(policy.pick(ask(workers))) for _ in range(60)} == {"b", "c"}


def test_prefix_only_ignores_the_load():
    assert name_of(PrefixOnly(CHANCE).pick(ask([worker("a", 500), worker("b"), worker("c")], a=32, b=16))) == "a"


# SGLang: match rate > 0.3, unless max - min > 64 and max > 1.5 * min.
@pytest.mark.parametrize(
    ("loads", "held", "chosen"),
    [
        ((70, 6), 481, "a"),  # 481 of 1600 > 0.3; 70 - 6 is not more than 64
        ((70, 6), 480, "b"),  # exactly 0.3 is not enough
        ((71, 6), 1600, "b"),  # 65 > 64 and 71 > 9: imbalanced
        ((200, 134), 1600, "a"),  # 66 > 64, but 200 is not more than 201
        ((202, 134), 1600, "b"),  # 202 > 201
    ],
)
def test_sglang(loads: tuple[int, int], held: int, chosen: str):
    workers = [worker("a", loads[0]), worker("b", loads[1])]
    assert name_of(SglangCacheAware(CHANCE).pick(ask(workers, a=held))) == chosen


def test_sglang_decodes_on_the_least_loaded_worker():
    workers = [worker("a", 3), worker("b", 2)]
    assert name_of(SglangCacheAware(CHANCE).pick(ask(workers, Stage.DECODE, a=1600))) == "b"
    assert name_of(SglangCacheAware(CHANCE).pick(ask(workers, Stage.PREFILL, a=1600))) == "a"


def test_dynamo_adds_the_blocks_to_compute_and_those_under_way():
    busy = worker("a", running_context_tokens=3200)
    busy.in_flight[SequenceKey("x", 0)] = Dispatched(0.5, 320, 320 + 1024)  # 320 tokens to compute, reported since
    policy = DynamoKv(CHANCE)
    # (320 + 1600) / 16 - 800 / 16 = 70 to compute; (1600 + 3200) / 16 = 300 to decode
    assert policy.cost(ask([busy], a=800), busy) == 370
    assert policy.cost(ask([busy], Stage.PREFILL, a=800), busy) == 70
    assert policy.cost(ask([busy], Stage.DECODE, a=800), busy) == 300
    # Held tokens never make the part below zero.
    assert policy.cost(ask([worker("b")], Stage.PREFILL, b=1600), worker("b")) == 0
    # What was sent after the last report counts: 160 tokens, without the answer.
    busy.in_flight[SequenceKey("y", 0)] = Dispatched(1.5, 0, 160 + 1024)
    assert policy.cost(ask([busy], Stage.DECODE), busy) == 310
    idle = worker("c")
    assert name_of(policy.pick(ask([busy, idle], a=1600))) == "c", "100 + 100 against 20 + 310"


def test_llm_d_sums_prefix_queue_and_kv():
    a, b = worker("a", waiting=4, free_blocks=500), worker("b", waiting=0, free_blocks=250)
    policy, question = LlmdWeighted(CHANCE), ask([a, b], a=1200)
    assert policy.score(question, a) == pytest.approx(3 * 0.75 + 2 * 0.0 + 2 * 0.5)
    assert policy.score(question, b) == pytest.approx(3 * 0.0 + 2 * 1.0 + 2 * 0.25)
    assert name_of(policy.pick(question)) == "a"
    assert policy.score(ask([a], a=1200), a) == pytest.approx(3 * 0.75 + 2 * 1.0 + 2 * 0.5), "equal queues score 1"


def test_a_disaggregated_cluster_is_asked_twice():
    workers = [worker("d0", 2, Role.DECODE), worker("d1", 1, Role.DECODE), worker("p0", 5, Role.PREFILL)]
    route = LeastLoaded(CHANCE).route(Query(REQUEST, workers, {}))
    assert (name_of(route.decode), route.prefill and name_of(route.prefill)) == ("d1", "p0")
    combined = LeastLoaded(CHANCE).route(Query(REQUEST, [worker("c0", 2), worker("c1")], {}))
    assert (name_of(combined.decode), combined.prefill) == ("c1", None)
