"""What a newcomer is to have: learnt from what workers announce, whichever router an adapter was loaded through."""

from dataclasses import replace

import pytest
from support.fakes.list_router import MODEL

from twostroke.core.request import Role
from twostroke.router.routing.facts import AdapterFacts, WorkerFacts
from twostroke.router.workers import loaded_adapters
from twostroke.router.workers.loaded_adapters import LoadedAdapters, Wanted

A = AdapterFacts("a", b"A" * 16, "/a", 8, 100, asked=True)
B = AdapterFacts("b", b"B" * 16, "/b", 8, 100, asked=True)
OWN = replace(A, asked=False)
A2 = replace(A, digest=b"2" * 16, path="/a2")
W = WorkerFacts("w", 1, Role.COMBINED, "w:1", MODEL, 1000, 16, 8, 64)


def holding(*held: AdapterFacts, incarnation: int = 1) -> WorkerFacts:
    return replace(W, incarnation=incarnation, adapters=held)


def test_a_name_comes_and_goes_with_the_workers_that_were_known():
    loaded = LoadedAdapters()
    assert not loaded.heard(holding(), holding(A), is_learning=False)
    assert loaded.wanted == {"a": Wanted("/a", A.digest)}
    loaded.heard(holding(A), holding(A, B), is_learning=False)
    loaded.heard(holding(A, B), holding(B), is_learning=False)
    assert set(loaded.wanted) == {"b"}


def test_a_name_with_other_files_replaces():
    loaded = LoadedAdapters()
    loaded.heard(holding(), holding(A), is_learning=False)
    loaded.heard(holding(A), holding(A2), is_learning=False)
    assert loaded.wanted == {"a": Wanted("/a2", A2.digest)}
    loaded.heard(holding(A, incarnation=7), holding(incarnation=7), is_learning=False)  # one that is behind
    assert set(loaded.wanted) == {"a"}


def test_a_process_that_starts_anew_takes_nothing_away():
    loaded = LoadedAdapters()
    loaded.heard(holding(), holding(A), is_learning=False)
    assert not loaded.heard(holding(A), holding(incarnation=2), is_learning=True)
    assert set(loaded.wanted) == {"a"}


def test_a_router_that_starts_learns_and_a_later_one_does_not():
    loaded = LoadedAdapters()
    assert not loaded.heard(None, holding(A), is_learning=False)
    assert not loaded.wanted
    assert loaded.heard(None, holding(A), is_learning=True)
    assert not loaded.heard(None, holding(A), is_learning=True), "nothing new"
    assert set(loaded.wanted) == {"a"}


def test_what_a_configuration_names_is_that_workers_own():
    loaded = LoadedAdapters()
    assert not loaded.heard(None, holding(OWN), is_learning=True)
    assert not loaded.heard(holding(), holding(OWN), is_learning=True)
    assert not loaded.wanted


def test_it_is_bounded(monkeypatch):
    monkeypatch.setattr(loaded_adapters, "MAX_ADAPTERS", 1)
    loaded = LoadedAdapters()
    loaded.heard(None, holding(A, B), is_learning=True)
    assert len(loaded.wanted) == 1


@pytest.mark.parametrize(("digest", "left"), [(None, set()), (A.digest, set()), (B.digest, {"a"})])
def test_a_name_is_forgotten_if_it_is_still_that_adapter(digest, left):
    loaded = LoadedAdapters()
    loaded.heard(None, holding(A), is_learning=True)
    loaded.gone("a", digest)
    assert set(loaded.wanted) == left
