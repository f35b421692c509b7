"""Which addresses of a Service's EndpointSlices count."""

import pytest
from support.deploy.kube.slices import endpoint, endpoint_slice

from twostroke.cluster.discovery.slices import Wanted, addresses_of, slice_of


def addresses(*items: dict, wanted: Wanted | None = None) -> frozenset[str]:
    return addresses_of([slice_of(item) for item in items], wanted or Wanted(8002))


def one(name: str, *endpoints: dict, **more) -> dict:
    return endpoint_slice(name, "routers", endpoints, **more)


def test_all_slices_of_a_service_count_together():
    first = one("a", endpoint("r-1", "10.0.0.1"), endpoint("r-2", "10.0.0.2"))
    second = one("b", endpoint("r-3", "10.0.0.3"))
    assert addresses(first, second) == {"10.0.0.1:8002", "10.0.0.2:8002", "10.0.0.3:8002"}


def test_pods_that_are_not_ready_or_go_are_left_out_and_an_unknown_condition_means_ready():
    found = one(
        "a",
        endpoint("r-1", "10.0.0.1", ready=False),
        endpoint(
            "r-2", "10.0.0.2", ready=True, terminating=True
        ),  # so it is where pods that are not ready are published
        endpoint("r-3", "10.0.0.3", ready=None),
        endpoint("r-4", "10.0.0.4"),
    )
    assert addresses(found) == {"10.0.0.3:8002", "10.0.0.4:8002"}
    bare = one("a") | {"endpoints": [{"addresses": ["10.0.0.5"]}, {"addresses": []}]}
    assert addresses(bare) == {"10.0.0.5:8002"}


def test_pods_that_go_count_for_who_wants_them():
    found = one(
        "a", endpoint("r-1", "10.0.0.1", ready=False, terminating=True), endpoint("r-2", "10.0.0.2", ready=False)
    )
    assert addresses(found, wanted=Wanted(8002, with_terminating=True)) == {"10.0.0.1:8002"}


def test_a_pod_in_two_slices_counts_once_and_not_if_one_has_it_going():
    moved = one("a", endpoint("r-1", "10.0.0.1", ready=False)), one("b", endpoint("r-1", "10.0.0.1"))
    assert addresses(*moved) == {"10.0.0.1:8002"}
    going = one("a", endpoint("r-1", "10.0.0.1")), one("b", endpoint("r-1", "10.0.0.1", terminating=True))
    assert addresses(*going) == frozenset()


def test_a_pod_with_addresses_of_both_families_counts_once():
    both = one("a", endpoint("r-1", "fd00::1"), family="IPv6"), one("b", endpoint("r-1", "10.0.0.1"))
    assert addresses(*both) == {"10.0.0.1:8002"}
    assert addresses(both[0]) == {"[fd00::1]:8002"}


def test_a_ports_name_is_looked_up_in_each_slice():
    slices = (
        one("a", endpoint("r-1", "10.0.0.1"), ports={"internal": 9002}),
        one("b", endpoint("r-2", "10.0.0.2"), ports={"internal": 9003}),
        one("c", endpoint("r-3", "10.0.0.3"), ports={"other": 9004}),
    )
    assert addresses(*slices, wanted=Wanted("internal")) == {"10.0.0.1:9002", "10.0.0.2:9003"}


def test_our_own_pod_is_left_out():
    found = one("a", endpoint("r-1", "10.0.0.1"), endpoint("r-2", "10.0.0.2"))
    assert addresses(found, wanted=Wanted(8002, without_pod="r-1")) == {"10.0.0.2:8002"}


@pytest.mark.parametrize(
    "item", [{}, {"metadata": {"name": "a"}}, {"metadata": {"name": "a"}, "addressType": 1, "endpoints": 7}]
)
def test_what_is_no_slice_is_an_error(item: dict):
    with pytest.raises((KeyError, TypeError, ValueError)):
        slice_of(item)
