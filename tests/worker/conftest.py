"""Fixtures: real workers on loopback, patient unless a test says that it is about silence."""

from __future__ import annotations

import pytest
from support.clusters.leases import patient_leases
from support.engines.workers import all_free, hand_to, make_prompt, router_of, start_worker, tiny_checkpoint

__all__ = ["all_free", "hand_to", "make_prompt", "patient_leases", "router_of", "start_worker", "tiny_checkpoint"]


@pytest.fixture
def usual_leases() -> None:
    """For tests of who is silent: workers lose each other after the times that users have."""


@pytest.fixture(autouse=True)
def _leases(request: pytest.FixtureRequest) -> None:
    if "usual_leases" not in request.fixturenames:
        request.getfixturevalue("patient_leases")
