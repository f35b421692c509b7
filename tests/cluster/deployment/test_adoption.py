"""What a new supervisor does with what it finds: adopt, begin anew, refuse. And what is written down for it."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from twostroke.cluster.config import Config, load_config
from twostroke.cluster.deployment.adoption import Adopt, Anew, Given, Refuse, decide, serves_on
from twostroke.cluster.deployment.record import (
    FORMAT,
    Changing,
    MemberRecord,
    PlanRecord,
    Ports,
    Record,
    Unreadable,
    parse,
)
from twostroke.cluster.deployment.settings import changed, digests, told
from twostroke.cluster.model_facts import model_facts
from twostroke.cluster.placement import Plan, place
from twostroke.worker.machine import machine_facts

SALT = "00" * 16
FLAGS = {"cluster.launcher": "process", "cluster.decode": 2, "cluster.key": "a key of this test", "cache.tokens": 4096}


def planned(checkpoint: Path) -> tuple[Config, Plan]:
    config = load_config(flags=FLAGS | {"model.path": str(checkpoint), "model.max_model_len": 256})
    return config, place(config, machine_facts(), model_facts(config))


@pytest.fixture
def record(tiny_checkpoint: Path) -> Record:
    """Of a cluster of four members, of which one is being started."""
    config, plan = planned(tiny_checkpoint)
    handles = {"router-0": "10 1 b", "prefill-0": "11 1 b", "decode-0": "12 1 b", "decode-1": None}
    members = {member.name: MemberRecord(member, handles[member.name]) for member in plan.members}
    now = Changing(members, (), (), {"prefill": 1, "decode": 2})
    ports = Ports(8000, 8001, (9000,))
    return Record(
        FORMAT, "1", "us", "process", None, SALT, digests(config, SALT), PlanRecord.of(plan, config), ports, now
    )


def given(record: Record) -> Given:
    return Given(record.release, record.launcher, record.settings)


def test_living_members_are_adopted_dead_ones_started_and_unknown_ones_ended(record: Record):
    found = {"10 1 b": "us", "12 1 b": "us", "13 1 b": "us", "14 1 b": "older"}
    decision = decide(record, found, given(record))
    assert decision == Adopt(
        {"router-0": "10 1 b", "decode-0": "12 1 b"}, ("prefill-0", "decode-1"), ("13 1 b", "14 1 b")
    )


@pytest.mark.parametrize("imposter", [{"10 2 b": "us"}, {"10 1 c": "us"}, {"10 1 b": "older"}])
def test_a_process_with_the_number_of_a_member_is_none(record: Record, imposter: dict[str, str]):
    """Another start, another start of the system, another deployment of the same folder."""
    assert decide(record, imposter, given(record)) == Anew(tuple(imposter))


def test_without_a_living_member_everything_begins_anew_whatever_changed(record: Record):
    other = Given("2", "ray", {})
    assert decide(record, {}, other) == Anew(())
    assert decide(record, {"13 1 b": "us"}, other) == Anew(("13 1 b",))
    assert decide(None, {"13 1 b": "us"}, other) == Anew(("13 1 b",))


def test_a_difference_is_refused_and_named(record: Record):
    found = {"10 1 b": "us"}
    for other, word in (
        (replace_given(record, release="2"), "release 1, and this is 2"),
        (replace_given(record, launcher="ray"), "--launcher process, and this is ray"),
        (replace_given(record, settings=record.settings | {"cache.tokens": "x"}), "these differ: cache.tokens"),
    ):
        decision = decide(record, found, other)
        assert isinstance(decision, Refuse)
        assert word in decision.reason
        assert "1 members serve without a supervisor (router-0)" in decision.reason


def replace_given(record: Record, **update: object) -> Given:
    return given(record)._replace(**update)  # type: ignore[arg-type]


def test_members_live_on_unless_the_end_was_wanted_or_the_start_failed():
    lives = {
        (adopted, served, asked): serves_on(is_adopted=adopted, is_served=served, is_asked=asked)
        for adopted, served, asked in product((False, True), repeat=3)
    }
    assert {case for case, does in lives.items() if does} == {
        (False, True, False),  # the supervisor failed
        (True, True, False),
        (True, False, False),  # the adoption failed
        (True, False, True),  # and was given up
    }


def test_a_record_is_read_as_it_was_written(record: Record, tiny_checkpoint: Path):
    assert parse(record.to_json()) == record
    config, plan = planned(tiny_checkpoint)  # of another moment than the fixture's, so perhaps with other memory
    again = parse(replace(record, plan=PlanRecord.of(plan, config)).to_json()).plan.plan(config)
    assert replace(again, decisions=plan.decisions, config=plan.config) == plan
    assert again.settle(config) == plan.settle(config)
    assert b"a key of this test" not in record.to_json()


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_a_damaged_record_is_said_to_be_one(record: Record, cut: int):
    with pytest.raises(Unreadable, match="damaged or of another release"):
        parse(record.to_json()[:cut])
    with pytest.raises(Unreadable, match="format 99"):
        parse(replace(record, format=99).to_json())


def test_changed_settings_are_named_and_a_drawn_key_is_no_change(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def of(**flags: object) -> dict[str, str]:
        return digests(load_config(flags={name.replace("__", "."): value for name, value in flags.items()}), SALT)

    assert changed(of(), of()) == []  # each has drawn another key
    assert changed(of(cluster__key="k" * 16), of(cluster__key="k" * 16)) == []
    assert changed(of(), of(cluster__key="k" * 16)) == ["cluster.key"]
    assert changed(of(cluster__key="j" * 16), of(cluster__key="k" * 16)) == ["cluster.key"]
    assert changed(of(cluster__decode=2), of(cache__block_size=32)) == ["cache.block_size", "cluster.decode"]
    assert changed({"a": "1", "b": "2"}, {"a": "1", "c": "2"}) == ["b", "c"]  # settings of one release alone
    (tmp_path / "a" / "m").mkdir(parents=True)
    (tmp_path / "b" / "m").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a")
    here = of(model__path="m")
    assert changed(here, of(model__path=str(tmp_path / "a" / "m"))) == []
    monkeypatch.chdir(tmp_path / "b")
    assert changed(here, of(model__path="m")) == ["model.path"]
    assert told([f"s{number}" for number in range(10)]) == "s0, s1, s2, s3, s4, s5, s6, s7 and 2 more"


def test_digests_say_nothing_of_values_and_differ_from_deployment_to_deployment():
    config = load_config(flags=FLAGS)
    one, other = digests(config, SALT), digests(config, "11" * 16)
    assert one.keys() == other.keys()
    assert not set(one.values()) & set(other.values())
    assert len(set(one.values())) == len(one)  # equal values of two settings do not show as equal
