"""Every mutant of `make mutants` can still be planted. The campaign itself takes too long for here."""

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "mutants"))
from mutant import ROOT, Mutant
from planted import MUTANTS, TESTS


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_it_can_be_planted(mutant: Mutant) -> None:
    planted = mutant.planted((ROOT / mutant.file).read_text())
    compile(planted, mutant.file, "exec")
    assert any(mutant.file.startswith(part) for part in TESTS)


def test_no_two_have_one_name() -> None:
    assert [name for name, times in Counter(mutant.name for mutant in MUTANTS).items() if times > 1] == []


def test_the_tests_that_are_asked_exist() -> None:
    asked = {words for of_file in TESTS.values() for words in of_file}
    assert [words for words in asked if not (ROOT / words.split("::")[0]).exists()] == []


def test_every_part_of_the_tests_is_some_mutant_s() -> None:
    """A part that no mutant begins with was renamed: its mutants are asked of other tests, which see nothing."""
    chosen = {next(part for part in TESTS if mutant.file.startswith(part)) for mutant in MUTANTS}
    assert sorted(set(TESTS) - chosen) == []
