"""Small scopes explored to closure, planted bugs found by a shortest trace, and the drawing of docs/handover.md."""

import logging
from collections import OrderedDict
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from twostroke.cli.main import app
from twostroke.decode_worker.ledger import Ledger
from twostroke.decode_worker.task import DecodeTask
from twostroke.engine.link import messages as link
from twostroke.sim import planted_handover, planted_router
from twostroke.sim.exhaustive.canonical import canonical
from twostroke.sim.exhaustive.cluster import Cluster
from twostroke.sim.exhaustive.edges import edges, tables
from twostroke.sim.exhaustive.search import search
from twostroke.sim.exhaustive.state import Scope
from twostroke.sim.planting import instead

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/handover.md"


@pytest.fixture(autouse=True)
def silenced():
    """Faults would make production code log thousands of warnings."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(before)


@pytest.mark.parametrize("scope", ["1x1x1x1", "1x1x1x1+", "1x2x1x1+", "2x1x1x0", "2x1x1x0+", "2x2x2x0", "1x2x2x0"])
def test_a_small_scope_closes_and_every_run_of_it_ends(scope: str):
    found = search(Scope.parse(scope))
    assert found.violation is None, (str(found.violation), found.trace)
    assert found.is_closed
    assert found.longest_run > 0
    outcomes = set(found.outcomes)
    if scope.rstrip("+").endswith("1"):
        assert {"finished", "worker_lost", "deadline_exceeded", "cancelled", "tokens_lost"} <= outcomes
    else:
        assert outcomes == {"finished"}, "without a fault every request finishes"


@pytest.mark.parametrize("scope", ["1x1x2x1", "1x1x2x1+"])
def test_no_single_fault_ends_a_stream_where_another_decode_worker_is_left(scope: str):
    found = search(Scope.parse(scope))
    assert found.violation is None, (str(found.violation), found.trace)
    assert found.is_closed
    assert set(found.outcomes) == {"finished", "cancelled", "deadline_exceeded"}  # cancelled: the client left


@pytest.mark.parametrize("scope", ["2x1x1x0", "2x2x2x0", "1x1x1x1"])
def test_a_reduced_search_ends_in_the_same_states_as_a_full_one(scope: str):
    reduced, full = (search(Scope.parse(scope), is_reduced=is_reduced) for is_reduced in (True, False))
    assert (reduced.num_states, reduced.num_moves) < (full.num_states, full.num_moves)
    assert (reduced.num_ends, reduced.outcomes, reduced.longest_run) == (full.num_ends, full.outcomes, full.longest_run)


def old_epochs_are_heard_while_it_waits() -> AbstractContextManager[None]:
    return planted_router.old_epochs_are_heard(while_it_waits=True)


def an_older_run_must_end_first() -> AbstractContextManager[None]:
    """The ledger forgets its table of a router with the newest run, though an older run is still ending."""

    def end(self: Ledger, run) -> None:
        router, key, epoch, _ = self._entries.pop(run)
        newest = self._newest[router]
        if newest.get(key) is run:
            del newest[key]
            if not newest:
                del self._newest[router]
            self._remember(router, key, epoch)

    return instead(Ledger, "end", end)


def an_answer_is_given_twice() -> AbstractContextManager[None]:
    """A second peer is told NotYet before the engine has answered the first one's question, and again after it."""

    def bind_wanted(self: DecodeTask) -> None:
        assert self._pull is not None
        self._pull_waits = True
        if self._has_bound:
            self._pull.bound()
        elif self._has_asked:
            self._pull.not_yet()
        else:
            self._has_asked = True
            self._tools.pull.dispatcher.send(link.Bind(self.order.engine_key))

    return instead(DecodeTask, "bind_wanted", bind_wanted)


def ended_epochs_are_forgotten() -> AbstractContextManager[None]:
    """A late duplicate of an ended choice's order runs again."""
    return instead(Ledger, "_remember", lambda self, router, key, epoch: setattr(self, "_ended", OrderedDict()))


@pytest.mark.parametrize(
    ("plant", "scope", "invariant", "length"),
    [
        (planted_handover.digests_are_not_checked, "1x1x1x1", "K4", 8),
        (planted_handover.duplicates_are_accepted, "1x1x1x1", "K4", 8),
        (planted_handover.older_epochs_are_admitted, "1x1x1x1", "K4", 8),
        (planted_handover.refetch_is_ignored, "1x1x1x1", "R7", None),
        (planted_handover.slot_of_a_damaged_frame_is_kept, "1x1x1x1", "R7", None),
        (planted_handover.silence_is_ignored, "1x1x1x1", "K1", 3),
        (old_epochs_are_heard_while_it_waits, "1x1x1x1", "R6", None),
        (planted_router.gaps_are_closed, "1x1x1x1", "R3", None),
        (planted_router.waiting_requests_are_forgotten, "1x1x1x1", "R7", None),
        (planted_router.worker_is_not_told_of_the_end, "1x1x1x1", "R8", None),
        (an_older_run_must_end_first, "1x1x1x1", "crash", None),
        (an_answer_is_given_twice, "1x2x1x1+", "crash", 9),
        (ended_epochs_are_forgotten, "1x1x1x1", "R8", None),
        (planted_handover.a_registration_outlives_its_request, "1x1x1x1", "K3", None),
        (planted_handover.completions_are_dropped, "1x1x1x0", "R7", None),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_planted_bug_is_found_by_a_shortest_trace(plant, scope: str, invariant: str, length: int | None):
    with plant():
        found = search(Scope.parse(scope))
        assert found.violation is not None, plant.__name__
        assert found.violation.invariant == invariant, (str(found.violation), found.trace)
        assert length is None or len(found.trace) == length, found.trace
        cluster = Cluster(found.scope)
        state = cluster.first()
        for label in found.trace[:-1]:
            state = next(step.state for step in cluster.steps(state) if step.label == label)


def test_a_client_that_leaves_between_the_end_of_prefill_and_decodes_turn_frees_both_sides():
    cluster = Cluster(Scope.parse("1x1x1x1"))
    state = cluster.first()

    def take(*labels: str) -> None:
        nonlocal state
        for label in labels:
            state = next(step.state for step in cluster.steps(state) if label in step.label)

    take("takes an order", "open", "started", "bind", "is computed", "first_token")
    (job,) = state.tasks[0].links
    assert job is not None
    assert job.stage == "computed"
    assert len(job.blocks) == 2
    take("client of r0 leaves", "takes an order", "cancel #3 arrives")
    assert not any(link and link.blocks for link in state.tasks[0].links), "prefill frees its blocks at the cancel"
    take("is freed")
    assert not state.tasks


def test_a_new_attribute_of_a_machine_is_part_of_its_state():
    class Sender:
        def __init__(self, more: object) -> None:
            self.more = more

    assert canonical(Sender(1)) != canonical(Sender(2))
    with pytest.raises(TypeError, match="no canonical value"):
        canonical(Sender(object()))


def test_the_document_has_exactly_the_edges_of_the_machines():
    text = DOCUMENT.read_text()
    for table in tables():
        assert table in text, f"docs/handover.md is out of date; `twostroke sim exhaustive --edges` prints\n{table}"


def test_the_document_draws_every_change_of_state_and_no_other():
    drawings = [part.partition("```")[0] for part in DOCUMENT.read_text().split("```mermaid\n")[1:]]
    assert len(drawings) == 2
    for drawing, found in zip(drawings, edges(), strict=True):
        drawn = {tuple(line.split(":")[0].split("-->")) for line in drawing.splitlines() if "-->" in line}
        pairs = {(one.strip(), other.strip()) for one, other in drawn if "[*]" not in (one.strip(), other.strip())}
        assert pairs == {(edge.before, edge.after) for edge in found if edge.before and edge.before != edge.after}


def test_the_command_says_what_it_visited_and_shows_a_trace():
    runner = CliRunner()
    result = runner.invoke(app, ["sim", "exhaustive", "--scope", "1x1x1x0"])
    assert result.exit_code == 0, result.output
    assert "closed: every invariant holds" in result.output
    assert runner.invoke(app, ["sim", "exhaustive", "--scope", "1x1x1x1", "--max-states", "99"]).exit_code == 2
    assert runner.invoke(app, ["sim", "exhaustive", "--scope", "1x1"]).exit_code == 2
    with planted_handover.digests_are_not_checked():
        result = runner.invoke(app, ["sim", "exhaustive", "--scope", "1x1x1x1"])
    assert result.exit_code == 1
    assert "violated K4" in result.output
    assert "arrives" in result.output
