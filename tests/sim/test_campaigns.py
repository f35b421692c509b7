"""A campaign in several processes: the sums of one in a row, and it goes on where it was stopped."""

import json

import pytest
from typer.testing import CliRunner

from twostroke.cli.main import app
from twostroke.sim.campaigns import runner
from twostroke.sim.campaigns.journal import Journal, Range, code_digest
from twostroke.sim.faults import run_campaign, seeds_of


@pytest.mark.timeout(300)
def test_ranges_in_processes_have_the_sums_of_one_row(tmp_path):
    journal = Journal(tmp_path / "journal", 7, "code")
    heard = []
    sums = runner.run_ranges(7, 60, journal, 2, lambda sums: heard.append(sums.num_schedules))
    alone = run_campaign(seeds_of(7, 60))
    assert (sums.num_schedules, sums.num_events, sums.ends) == (60, alone.num_events, alone.ends)
    assert not sums.failed
    assert heard[-1] == 60
    assert sorted((done.first, done.count) for done in journal.done) == [(7_000_000, 50), (7_000_050, 10)]


def test_a_stopped_campaign_plays_only_what_is_missing(tmp_path, monkeypatch):
    path = tmp_path / "journal"
    first = Range(3_000_000, 50, 100, 2.0, {"finished": 5})
    Journal(path, 3, "code").add(first)
    path.write_text(path.read_text() + '{"first": 3000050, "cou')  # stopped in the middle of a line
    journal = Journal(path, 3, "code")
    assert journal.done == [first]
    sums = runner.run_ranges(3, 50, journal, 1)
    assert (sums.num_schedules, sums.num_events, dict(sums.ends)) == (50, 100, {"finished": 5})
    assert len(path.read_text().splitlines()) == 2


def test_a_failed_seed_is_kept_and_ends_the_campaign(tmp_path):
    journal = Journal(tmp_path / "journal", 3, "code")
    journal.add(Range(3_000_000, 50, 1, 1.0, {}, (3_000_004,)))
    assert Journal(tmp_path / "journal", 3, "code").done[0].failed == (3_000_004,)
    sums = runner.run_ranges(3, 150, journal, 1)
    assert sums.failed == [3_000_004]
    assert sums.num_schedules == 50


@pytest.mark.parametrize(("campaign", "code"), [(4, "code"), (3, "other code")])
def test_a_journal_of_another_campaign_or_of_other_code_is_not_continued(tmp_path, campaign, code):
    path = tmp_path / "journal"
    Journal(path, 3, "code").add(Range(3_000_000, 50))
    assert Journal(path, campaign, code).done == []
    assert json.loads(path.read_text()) == {"campaign": campaign, "code": code}


def test_the_digest_of_the_code_changes_with_it(tmp_path):
    (tmp_path / "one.py").write_text("a = 1")
    before = code_digest(tmp_path)
    (tmp_path / "one.py").write_text("a = 2")
    assert code_digest(tmp_path) != before


@pytest.mark.timeout(300)
def test_the_command_goes_on_where_it_was(tmp_path):
    command = ["sim", "faults", "--schedules", "4", "--seed", "9", "--journal", str(tmp_path / "journal")]
    assert CliRunner().invoke(app, command).exit_code == 0
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0, again.output
    assert "4 schedules are done already" in again.output
    assert "passed" in again.output
