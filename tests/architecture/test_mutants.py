"""Every mutant of `make mutants` can still be planted. The campaign itself takes too long for here."""

import sys
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
