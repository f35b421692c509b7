"""Who of several planners acts."""

from twostroke.cluster.kubernetes.lease import Create, LeaseTiming, Record, Renew, Take, Tenure, Wait

TIMING = LeaseTiming(duration_s=30.0, renew_by_s=20.0)


def record(holder: str, version: str, transitions: int = 0) -> Record:
    return Record(holder, version, 30.0, transitions)


def test_who_finds_no_lease_makes_it_and_acts_from_then_on():
    tenure = Tenure("a", TIMING)
    assert not tenure.holds(0.0)
    assert tenure.look(None, 0.0) == Create()
    assert not tenure.holds(0.0)
    tenure.written(0.0)
    assert tenure.holds(19.9)
    assert tenure.look(None, 5.0) == Create()  # somebody deleted it: another one may make it before us
    assert not tenure.holds(5.0)


def test_who_does_not_renew_in_time_stops_before_another_may_begin():
    holder, other = Tenure("a", TIMING), Tenure("b", TIMING)
    holder.look(None, 0.0)
    holder.written(0.0)
    assert other.look(record("a", "1"), 0.5) == Wait("a")
    assert other.look(record("a", "1"), 30.4) == Wait("a")
    assert not holder.holds(20.0)
    assert other.look(record("a", "1"), 30.6) == Take("1", 1)


def test_a_lease_that_is_renewed_is_not_taken_however_old_its_own_times_are():
    other = Tenure("b", TIMING)
    for second in range(0, 300, 20):
        assert other.look(record("a", str(second)), float(second)) == Wait("a")


def test_a_lease_that_was_let_go_is_taken_at_once():
    assert Tenure("b", TIMING).look(record("", "4", 2), 0.0) == Take("4", 3)


def test_the_holder_renews_what_it_reads():
    tenure = Tenure("a", TIMING)
    assert tenure.look(record("a", "5", 2), 0.0) == Renew("5", 2)
    tenure.written(0.0)
    assert tenure.look(record("a", "6", 2), 10.0) == Renew("6", 2)
    assert tenure.holds(10.0)
    assert not tenure.holds(25.0)  # it was not written since


def test_who_sees_another_holder_or_is_refused_stops_at_once():
    tenure = Tenure("a", TIMING)
    tenure.look(None, 0.0)
    tenure.written(0.0)
    assert tenure.look(record("b", "7"), 1.0) == Wait("b")
    assert not tenure.holds(1.0)
    assert tenure.holder == "b"
    tenure.written(2.0)
    tenure.refused()
    assert not tenure.holds(2.0)
