"""What is asked of the API server next, and what is known meanwhile."""

from support.deploy.kube.slices import endpoint, endpoint_slice

from twostroke.cluster.discovery.outage import AGAIN_S, PATIENCE_S, Outage
from twostroke.cluster.discovery.slices import Slice, Wanted, slice_of
from twostroke.cluster.discovery.watching import List, Waits, Watch, Watching

MIDDLE = 0.5  # a draw that leaves a wait as it is


def routers(name: str, *hosts: str) -> Slice:
    return slice_of(endpoint_slice(name, "routers", [endpoint(f"pod-{host}", host) for host in hosts]))


def watching(**waits: float) -> Watching:
    return Watching(Wanted(8002), Waits(**waits))


def test_a_list_takes_the_place_of_what_was_known_and_a_watch_follows_from_its_version():
    machine = watching()
    assert machine.listed([routers("a", "10.0.0.1"), routers("b", "10.0.0.2")], "7") == Watch("7")
    assert machine.addresses == {"10.0.0.1:8002", "10.0.0.2:8002"}
    machine.listed([routers("b", "10.0.0.3")], "9")
    assert machine.addresses == {"10.0.0.3:8002"}


def test_events_change_one_slice_and_the_next_watch_begins_at_the_last_version():
    machine = watching()
    machine.listed([routers("a", "10.0.0.1"), routers("b", "10.0.0.2")], "7")
    machine.changed(routers("a", "10.0.0.1", "10.0.0.4"), "8")
    assert machine.addresses == {"10.0.0.1:8002", "10.0.0.2:8002", "10.0.0.4:8002"}
    machine.deleted("b", "9")
    assert machine.addresses == {"10.0.0.1:8002", "10.0.0.4:8002"}
    machine.bookmarked("12")
    assert machine.ended(30.0, MIDDLE) == Watch("12")


def test_without_an_answer_the_last_addresses_stay_and_waits_double_up_to_a_bound():
    machine = watching(first_s=1.0, longest_s=5.0)
    machine.listed([routers("a", "10.0.0.1")], "7")
    assert [machine.failed(MIDDLE).after_s for _ in range(5)] == [1.0, 2.0, 4.0, 5.0, 5.0]
    assert machine.addresses == {"10.0.0.1:8002"}
    machine.listed([routers("a", "10.0.0.1")], "8")
    assert machine.failed(MIDDLE) == List(5.0)  # that a list succeeds does not mean that a watch will
    machine.changed(routers("a", "10.0.0.2"), "9")
    assert machine.failed(MIDDLE) == List(1.0)


def test_waits_are_spread_by_the_draw():
    waits = Waits(first_s=1.0, longest_s=8.0)
    assert waits.wait_s(1, 0.0) == 0.5
    assert waits.wait_s(2, 0.75) == 2.5
    assert waits.wait_s(10**6, 0.0) == 4.0


def test_a_forgotten_version_leads_to_a_list_at_once_and_later_only_after_progress():
    machine = watching(first_s=1.0)
    machine.listed([routers("a", "10.0.0.1")], "7")
    assert machine.expired(MIDDLE) == List()
    machine.listed([routers("a", "10.0.0.1")], "8")
    assert machine.expired(MIDDLE) == List(1.0)  # no event since: the server is not well
    machine.listed([routers("a", "10.0.0.1")], "9")
    machine.bookmarked("10")
    assert machine.expired(MIDDLE) == List()
    assert machine.addresses == {"10.0.0.1:8002"}


def test_watches_that_end_at_once_are_spaced_out():
    machine = watching(first_s=1.0)
    machine.listed([], "7")
    assert machine.ended(0.01, MIDDLE) == Watch("7", 1.0)
    assert machine.ended(0.01, MIDDLE) == Watch("7", 2.0)
    machine.bookmarked("8")
    assert machine.ended(0.01, MIDDLE) == Watch("8")
    assert machine.ended(20.0, MIDDLE) == Watch("8")
    assert machine.ended(0.01, MIDDLE) == Watch("8", 1.0)
    assert machine.ended(20.0, MIDDLE) == Watch("8")
    assert machine.failed(MIDDLE) == List(1.0)  # one that was quiet and long had worked
    machine.changed(routers("a", "10.0.0.1"), "9")
    machine.listed([], "10")
    assert machine.ended(0.01, MIDDLE) == Watch("10", 1.0)  # events before the list are no news of its watch


def test_an_outage_is_one_line_when_it_has_lasted_and_one_when_it_is_over():
    outage = Outage()
    assert outage.fails("away", 0.0) is None
    assert outage.problem == "away"
    assert outage.works(1.0) is None  # nobody was told of it
    assert not outage.problem
    assert outage.fails("away", 10.0) is None
    assert outage.fails("still away", 10.0 + PATIENCE_S) == "still away"
    assert outage.fails("away", 11.0 + PATIENCE_S) is None
    assert outage.fails("away", 10.0 + PATIENCE_S + AGAIN_S) == "away"
    assert "700 s" in str(outage.works(710.0))
    assert outage.works(711.0) is None


def test_a_missing_right_is_said_at_once_and_once():
    outage = Outage()
    assert outage.fails("forbidden", 0.0, at_once=True) == "forbidden"
    assert outage.fails("forbidden", 1.0, at_once=True) is None
