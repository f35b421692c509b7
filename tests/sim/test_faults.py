"""250 schedules without a violation, every planted bug within its bound, and a seed that plays the same everywhere."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from twostroke.cli.main import app
from twostroke.sim import planting
from twostroke.sim.faults import run_campaign, run_schedule, seeds_of
from twostroke.sim.planted import PLANTED
from twostroke.sim.planting import Planted, instead
from twostroke.sim.setting import Vary, as_drawn
from twostroke.sim.workers.store import Store

NUM_SCHEDULES = 250  # `make campaigns` plays thousands


@pytest.mark.timeout(600)  # a minute at most on a quiet machine; a busy one may take its time
def test_250_schedules_hold_every_invariant():
    happened: Counter[str] = Counter()
    campaign = run_campaign(seeds_of(0, NUM_SCHEDULES), heard=lambda outcome: happened.update(outcome.counters))
    assert not campaign.failed, [f"{o.seed}: {o.violation}" for o in campaign.failed]
    # The weather must bite and must not drown everything.
    assert campaign.ends["finished"] > 250
    for end in ("cancelled", "deadline_exceeded", "worker_lost", "router lost", "poison_request", "overloaded"):
        assert campaign.ends[end], end
    for counter in (
        "submitted",
        "ended_length",
        "ended_cancelled",
        "ended_deadline_exceeded",
        "ended_internal_error",
        "transfers_moved",
    ):
        assert happened[counter], (counter, happened)
    assert happened["transfers_moved"] > 5, "paired channels carry planes in a quarter of schedules"


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "bug",
    # Those that hide for longer are searched for by `make campaigns`.
    [pytest.param(bug, marks=[pytest.mark.campaign] * (bug.max_seeds > NUM_SCHEDULES)) for bug in PLANTED],
    ids=lambda bug: bug.name,
)
def test_a_planted_bug_is_found(bug: Planted):
    others, found = bug.search(seeds_of(0, bug.max_seeds))
    assert found is not None, f"{bug.name} lived through {bug.max_seeds} schedules"
    crashes = [str(other.violation) for other in others if other.violation and other.violation.invariant == "crash"]
    assert not crashes, "the change does not fit the code that it patches"
    if bug.vary is as_drawn and bug.max_seeds <= NUM_SCHEDULES:
        return  # the campaign above plays these seeds without the bug
    for outcome in (*others, found):
        assert run_schedule(outcome.seed, vary=bug.vary).violation is None, "without the bug it is violated, too"


@pytest.mark.parametrize("vary", sorted({bug.vary for bug in PLANTED}, key=lambda vary: vary.__name__))
def test_biased_settings_hold_every_invariant(vary: Vary):
    violated = [str(run_schedule(seed, vary=vary).violation or "") for seed in seeds_of(1, 6)]
    assert not any(violated), violated


@pytest.mark.campaign
@pytest.mark.parametrize("vary", sorted({bug.vary for bug in PLANTED}, key=lambda vary: vary.__name__))
def test_more_biased_settings_hold_every_invariant(vary: Vary):
    violated = [str(run_schedule(seed, vary=vary).violation or "") for seed in seeds_of(1, 60)]
    assert not any(violated), violated


@pytest.mark.parametrize("bug", PLANTED, ids=lambda bug: bug.name)
def test_a_planted_bug_is_in_production_code(bug: Planted):
    package = Path(planting.__file__).parents[1]
    assert bug.files
    for file in bug.files:
        assert (package / file).is_file(), file
        assert not file.startswith("sim/")


def test_a_bug_in_the_simulator_cannot_be_planted():
    with pytest.raises(AssertionError), instead(Store, "run", lambda *_: None):
        pass


def test_a_seed_plays_the_same_twice_and_seeds_differ():
    first = [run_schedule(seed).digest for seed in range(12)]
    assert [run_schedule(seed).digest for seed in range(12)] == first
    assert len(set(first)) == 12


@pytest.mark.timeout(600)
def test_a_seed_plays_the_same_in_every_process():
    script = "from twostroke.sim.faults import run_schedule as r; print([r(s).digest for s in range(100, 108)])"
    said = set()
    for hash_seed in ("0", "1", "4711"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"}
        said.add(
            subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True).stdout
        )
    assert len(said) == 1


def test_a_failing_seed_replays_byte_for_byte():
    bug = next(bug for bug in PLANTED if bug.name == "digests_are_not_checked")
    with bug.plant():
        found = run_campaign(seeds_of(0, bug.max_seeds)).failed[0]
        again = run_schedule(found.seed, keep_all=True)
    assert again.digest == found.digest
    assert str(again.violation) == str(found.violation)
    assert again.lines[-len(found.lines) :] == found.lines
    assert again.lines[-1].endswith(str(found.violation))


def test_the_command_says_how_it_went():
    runner = CliRunner()
    result = runner.invoke(app, ["sim", "faults", "--schedules", "5", "--seed", "3", "--verbose"])
    assert result.exit_code == 0, result.output
    assert "5 schedules" in result.output
    assert "schedules/s" in result.output
    assert "3000004: " in result.output
    replayed = runner.invoke(app, ["sim", "faults", "--replay", "3000004", "--verbose"])
    assert replayed.exit_code == 0, replayed.output
    assert run_schedule(3000004).digest in replayed.output


def test_the_command_lists_the_planted_bugs():
    result = CliRunner().invoke(app, ["sim", "faults", "--list-bugs"])
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines()[1:]]
    assert [line[0] for line in lines] == [bug.name for bug in PLANTED]
    listed = {line[0]: line[1:] for line in lines}
    assert listed["stale_orders_run"][:2] == ["decode_worker/ledger.py", "R6"]
    assert listed["host_blocks_leak"][:2] == ["engine/swap.py", "K2"]
    assert listed["host_blocks_leak"][-1] == "swapping"


def test_the_command_names_the_seed_of_a_violation():
    bug = next(bug for bug in PLANTED if bug.name == "digests_are_not_checked")
    with bug.plant():
        result = CliRunner().invoke(app, ["sim", "faults", "--schedules", "100"])
    assert result.exit_code == 1
    assert "violated K4" in result.output
    assert "--replay" in result.output
