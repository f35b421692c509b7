"""Leases of minutes, for tests of what is handed over and not of who is silent: a slow machine loses nobody then."""

from __future__ import annotations

import pytest

from twostroke.core.lease import Lease
from twostroke.router.routing.fleet import FleetLimits
from twostroke.worker import process

PATIENT = Lease(0.5, 300.0)


@pytest.fixture
def patient_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers and routers that start in this process wait for each other."""
    monkeypatch.setattr(process, "HANDOVER_LEASE", PATIENT)
    usual = FleetLimits()
    patient = (PATIENT.silence_s / 2, PATIENT.silence_s, PATIENT.silence_s, usual.max_workers, usual.return_s)
    monkeypatch.setattr(FleetLimits.__init__, "__defaults__", patient)
