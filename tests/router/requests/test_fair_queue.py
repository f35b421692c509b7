"""The queue of waiting requests: priorities, fair shares by cost, and who gives way."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from twostroke.router.requests.admission.fair_queue import FairQueue, Ticket


def filled(*tickets: Ticket) -> FairQueue:
    queue = FairQueue()
    for ticket in tickets:
        queue.add(ticket)
    return queue


def drained(queue: FairQueue) -> list[str]:
    return [ticket.name for ticket in iter(queue.take, None)]


def line(tenant: str, count: int, cost: int = 10, **fields: object) -> list[Ticket]:
    return [Ticket(f"{tenant}{number}", tenant, cost, **fields) for number in range(count)]  # type: ignore[arg-type]


def test_tenants_take_turns_and_each_tenant_in_order_of_arrival() -> None:
    assert drained(filled(*line("a", 3), *line("b", 2))) == ["a0", "b0", "a1", "b1", "a2"]


def test_cost_counts_and_not_the_number_of_requests() -> None:
    order = drained(filled(*line("big", 2, cost=100), *line("small", 20)))
    assert order.index("big1") == 11, "ten small ones cost as much as a big one"


def test_a_share_of_two_gets_twice_as_much() -> None:
    order = drained(filled(*line("a", 30, share=2.0), *line("b", 30)))
    assert Counter(name[0] for name in order[:30]) == {"a": 20, "b": 10}


def test_a_tenant_that_did_not_ask_saved_nothing_up() -> None:
    queue = filled(*line("a", 50))
    for _ in range(40):
        queue.take()
    for ticket in line("late", 10):
        queue.add(ticket)
    assert Counter(name[0] for name in drained(queue)[:10]) == {"a": 5, "l": 5}


def test_who_comes_back_after_being_served_does_not_pass_those_that_wait() -> None:
    queue = filled(*line("a", 10))
    queue.add(Ticket("b0", "b", 1000))
    assert [queue.take().name, queue.take().name] == ["a0", "b0"]  # type: ignore[union-attr]
    queue.add(Ticket("b1", "b", 10))
    assert drained(queue)[-1] == "b1", "its first one cost as much as a hundred of the other's"


def test_a_higher_priority_goes_first_whatever_its_tenant_had() -> None:
    queue = filled(*line("a", 3), Ticket("urgent", "a", 10, priority=-1), Ticket("later", "b", 10, priority=5))
    assert drained(queue) == ["urgent", "a0", "a1", "a2", "later"]


def test_one_that_leaves_without_service_costs_its_tenant_nothing() -> None:
    queue = filled(Ticket("gone", "a", 1000), *line("a", 1), *line("b", 5))
    assert queue.remove("gone")
    assert not queue.remove("gone")
    assert drained(queue)[0] == "a0"


def test_an_empty_queue_remembers_no_tenant() -> None:
    queue = filled(*line("a", 3), *line("b", 3))
    drained(queue)
    assert (len(queue), queue.cost, queue._starts, queue._lines, queue._virtual) == (0, 0, {}, {}, 0.0)


def test_the_cost_before_a_newcomer_is_its_own_and_fair_parts_of_others() -> None:
    queue = filled(*line("a", 100), *line("b", 2), Ticket("urgent", "c", 7, priority=-1))
    assert queue.cost_before(Ticket("x", "b", 10)) == 20 + 30 + 7, "of a's 1,000 only as much as b has with it"
    assert queue.cost_before(Ticket("x", "a", 10)) == 1000 + 20 + 7
    assert queue.cost_before(Ticket("x", "new", 10, priority=-2)) == 0


def test_who_has_most_waiting_gives_way_to_who_has_least() -> None:
    queue = filled(*line("a", 9), *line("b", 2))
    assert [t.name for t in queue.displaced_by(Ticket("x", "new", 10), 1, 0) or ()] == ["a8"]
    assert [t.name for t in queue.displaced_by(Ticket("x", "b", 25), 0, 25) or ()] == ["a8", "a7", "a6"]
    assert queue.displaced_by(Ticket("x", "a", 10), 1, 0) is None, "its own tenant fills the queue"
    assert queue.displaced_by(Ticket("x", "b", 200), 0, 200) is None, "too little gives way"
    assert queue.displaced_by(Ticket("x", "b", 10, priority=1), 1, 0) is None
    assert len(queue) == 11, "nobody has left yet"


def test_lower_priorities_give_way_first_also_within_a_tenant() -> None:
    queue = filled(*line("a", 5), Ticket("batch", "b", 10, priority=9))
    assert [t.name for t in queue.displaced_by(Ticket("x", "a", 10), 1, 0) or ()] == ["batch"]


def test_a_tenant_gives_no_place_up_to_one_that_would_have_as_much_with_it() -> None:
    queue = filled(*line("a", 3))
    assert queue.displaced_by(Ticket("b0", "b", 30), 1, 0) is None
    assert [ticket.name for ticket in queue.displaced_by(Ticket("b0", "b", 29), 1, 0) or ()] == ["a2"]


tickets = st.tuples(st.sampled_from("abcd"), st.integers(1, 50), st.integers(0, 2), st.sampled_from([0.5, 1.0, 2.0]))


@given(st.lists(st.one_of(tickets, st.just("take"), st.integers(0, 30)), max_size=60))
@settings(max_examples=300, deadline=None)
def test_nothing_is_lost_or_doubled_and_counts_agree(acts: list[object]) -> None:
    queue, inside, share_of = FairQueue(), {}, {}
    for number, act in enumerate(acts):
        if isinstance(act, tuple):
            tenant, cost, priority, share = act
            ticket = Ticket(f"r{number}", tenant, cost, priority, share_of.setdefault(tenant, share))
            queue.add(ticket)
            inside[ticket.name] = ticket
        elif act == "take":
            best = min((ticket.priority for ticket in inside.values()), default=None)
            taken = queue.take()
            assert (taken and taken.priority) == best
            if taken is not None:
                assert inside.pop(taken.name) == taken
        else:
            assert queue.remove(f"r{act}") == (inside.pop(f"r{act}", None) is not None)
        assert (len(queue), queue.cost) == (len(inside), sum(ticket.cost for ticket in inside.values()))
    assert sorted(drained(queue)) == sorted(inside)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 40)), min_size=30, max_size=120))
@settings(max_examples=200, deadline=None)
def test_while_two_wait_they_get_the_same_but_for_one_request_of_each(asked: list[tuple[str, int]]) -> None:
    queue = filled(*(Ticket(f"r{n}", tenant, cost) for n, (tenant, cost) in enumerate(asked)))
    waiting = Counter(tenant for tenant, _ in asked)
    dearest = {tenant: max(cost for t, cost in asked if t == tenant) for tenant in waiting}
    served: Counter[str] = Counter()
    while (ticket := queue.take()) is not None:
        served[ticket.tenant] += ticket.cost
        waiting[ticket.tenant] -= 1
        backlogged = [tenant for tenant in waiting if waiting[tenant]]
        for one in backlogged:
            for other in backlogged:
                assert served[one] - served[other] <= dearest[one] + dearest[other]
