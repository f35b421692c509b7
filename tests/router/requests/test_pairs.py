"""The table of pairs keeps each pair's present transport and a moving average of its speed."""

from twostroke.router.requests import pairs
from twostroke.router.requests.pairs import PairKey, Pairs

ONE, OTHER = PairKey("p1", "d1"), PairKey("p2", "d1")


def report(transport="shm", speed=4e9, moved=1 << 20, reason=""):
    return {"transport": transport, "transport_reason": reason, "bytes_per_s": speed, "bytes_moved": moved}


def test_a_pair_has_the_transport_and_mean_speed_of_its_hand_overs() -> None:
    known = Pairs()
    assert known.observe(ONE, report(speed=4e9)).bytes_per_s == 4e9
    state = known.observe(ONE, report(speed=2e9))
    assert state.bytes_per_s == 4e9 + (2e9 - 4e9) * pairs.WEIGHT
    assert (state.handovers, state.bytes_moved) == (2, 2 << 20)


def test_a_small_hand_over_does_not_change_the_speed() -> None:
    known = Pairs()
    known.observe(ONE, report(speed=4e9))
    assert known.observe(ONE, report(speed=0.0)).bytes_per_s == 4e9


def test_the_speed_of_another_transport_begins_anew() -> None:
    known = Pairs()
    known.observe(ONE, report(speed=4e9))
    known.observe(ONE, report("grpc", speed=0.0, reason="another host"))
    assert known.facts() == [
        {
            "prefill_worker": "p1",
            "decode_worker": "d1",
            "transport": "grpc",
            "reason": "another host",
            "bytes_per_s": 0.0,
            "handovers": 2,
            "bytes_moved": 2 << 20,
        }
    ]
    assert known.speeds() == {("p1", "d1", "grpc"): 0.0}


def test_a_request_without_a_hand_over_makes_no_pair() -> None:
    known = Pairs()
    assert known.observe(ONE, report("none", 0.0, 0)) is None
    assert known.facts() == []


def test_pairs_of_workers_that_are_gone_are_forgotten() -> None:
    known = Pairs()
    known.observe(ONE, report())
    known.observe(OTHER, report())
    known.keep(frozenset({"p2", "d1"}))
    assert [pair["prefill_worker"] for pair in known.facts()] == ["p2"]


def test_beyond_the_bound_the_pair_used_longest_ago_is_forgotten(monkeypatch) -> None:
    monkeypatch.setattr(pairs, "MAX_PAIRS", 2)
    known = Pairs()
    third = PairKey("p3", "d1")
    for pair in (ONE, OTHER, ONE, third):
        known.observe(pair, report())
    assert set(known.speeds()) == {(*ONE, "shm"), (*third, "shm")}
