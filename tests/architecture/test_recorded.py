"""`pytest --rewrite`, tried on a copy of the tests: it writes what the code says, and without it a mismatch fails."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.session.recorded import transcript

ROOT = Path(__file__).parents[2]
SCENARIO = Path("tests/scenarios/router/deadlines.txt")
MODULE = "tests/router/routing/test_scenarios.py"
TEST = f"{MODULE}::test_transcript"


class Echo:
    """A stage that answers with the event's words."""

    def play(self, line: str) -> list[str]:
        self.last = line
        return line.split()[1:]

    def state(self) -> str:
        return f"after {self.last}"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the test of one transcript, in which one answer is wrong."""
    for name in (
        "pyproject.toml",
        "tests/conftest.py",
        "tests/support/session/pickles.py",
        "tests/support/session/no_pickle/sitecustomize.py",
        "tests/support/session/recorded.py",
        "tests/support/session/shares.py",
        MODULE,
        SCENARIO,
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    scenario = tmp_path / SCENARIO
    scenario.write_text(scenario.read_text().replace("    taken\n", "    declined\n", 1))
    return tmp_path


def run_test(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, TEST]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240, check=False)


def test_a_mismatch_shows_the_difference_and_the_command(copy: Path):
    before = (copy / SCENARIO).read_text()
    result = run_test(copy)
    assert result.returncode == 1, result.stdout
    assert "-    declined\n+    taken" in result.stdout
    assert f"python -m pytest --rewrite '{TEST}[deadlines]'" in result.stdout
    assert (copy / SCENARIO).read_text() == before


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "under xdist"])
def test_rewrite_records_what_the_code_says(copy: Path, workers: tuple[str, ...]):
    result = run_test(copy, "--rewrite", *workers)
    assert result.returncode == 0, result.stdout
    assert "1 recorded files rewritten" in result.stdout
    assert str(copy / SCENARIO) in result.stdout
    assert (copy / SCENARIO).read_text() == (ROOT / SCENARIO).read_text()
    again = run_test(copy)
    assert again.returncode == 0, again.stdout
    assert "rewritten" not in again.stdout


def test_comments_and_empty_lines_stay_and_answers_are_made():
    recorded = (
        "# the first line\n\na one two  # why\n    one  # kept\n    wrong  # goes\n    = nowhere\n"
        "= nowhere  # goes\nb\n    old\nc new\n"
    )
    assert transcript(recorded, Echo()) == (
        "# the first line\n\na one two  # why\n    one  # kept\n    two\n    = after a one two\n"
        "= after a one two\nb\nc new\n    new\n"
    )
