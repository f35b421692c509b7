"""What a router keeps of the supervisor's reports: the last one, within bounds, and never an older supervisor's."""

import json

import pytest

from twostroke.protos import worker_pb2
from twostroke.router.workers.supervision import MAX_CHARS, MAX_DECISION_CHARS, MAX_EVENTS, Supervision


def report(incarnation: int = 1, **fields: object) -> worker_pb2.SupervisorReport:
    return worker_pb2.SupervisorReport(incarnation=incarnation, **fields)


def test_the_last_report_of_the_newest_supervisor_counts() -> None:
    kept = Supervision()
    assert kept.facts(9.0) is None
    assert kept.take(report(2, desired={"decode": 3}, actual={"decode": 2}, action="start", reason="more"), 10.0)
    assert not kept.take(report(1, desired={"decode": 9}), 11.0)
    facts = kept.facts(12.5)
    assert facts is not None
    assert (facts["desired"], facts["actual"], facts["age_s"]) == ({"decode": 3}, {"decode": 2}, 2.5)
    assert (facts["action"], facts["reason"], facts["decision"]) == ("start", "more", None)
    assert kept.take(report(2, desired={"decode": 1}), 13.0)
    assert kept.desired == {"decode": 1}
    json.dumps(kept.facts(14.0))


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("", None),
        ("no json", None),
        ("[1]", None),
        ("[" * 10_000, None),
        ('{"terms": {"a": 1}}', {"terms": {"a": 1}}),
        (json.dumps({"a": "x" * MAX_DECISION_CHARS}), None),
    ],
)
def test_a_decision_that_is_malformed_or_too_long_is_left_out(text: str, kept: object) -> None:
    found = Supervision()
    found.take(report(decision=text), 0.0)
    assert found.decision == kept


def test_texts_and_lists_have_bounds_and_unknown_roles_are_dropped() -> None:
    found = Supervision()
    found.take(report(reason="r" * 5000, events=[f"{n} " + "e" * 5000 for n in range(100)], desired={"x": 1}), 0.0)
    assert len(found.reason) == MAX_CHARS
    assert len(found.events) == MAX_EVENTS
    assert found.events[-1].startswith("99 ")
    assert {len(event) for event in found.events} == {MAX_CHARS}
    assert found.desired == {}
