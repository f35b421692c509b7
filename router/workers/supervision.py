"""Last report of the cluster's supervisor: how many workers it wants, and why. Values only; decides nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...core.request import Role
from ...protos import worker_pb2

MAX_EVENTS = 32
MAX_CHARS = 1000  # of a text
MAX_DECISION_CHARS = 16_384
_ROLES = frozenset(role.value for role in Role)


@dataclass(slots=True)
class Supervision:
    """What a supervisor reported last."""

    incarnation: int = 0  # 0: nothing was reported
    at_s: float = 0.0
    desired: Mapping[str, int] = field(default_factory=dict)
    actual: Mapping[str, int] = field(default_factory=dict)
    action: str = ""
    reason: str = ""
    decision: Mapping[str, Any] | None = None
    events: tuple[str, ...] = ()

    def take(self, report: worker_pb2.SupervisorReport, now_s: float) -> bool:
        """Take a report, within the bounds above. False: it is of an older supervisor, and dropped."""
        if report.incarnation < self.incarnation:
            return False
        self.incarnation, self.at_s = report.incarnation, now_s
        self.desired = {role: count for role, count in report.desired.items() if role in _ROLES}
        self.actual = {role: count for role, count in report.actual.items() if role in _ROLES}
        self.action, self.reason = report.action[:MAX_CHARS], report.reason[:MAX_CHARS]
        self.decision = _decision(report.decision)
        self.events = tuple(event[:MAX_CHARS] for event in report.events[-MAX_EVENTS:])
        return True

    def facts(self, now_s: float) -> dict[str, Any] | None:
        """The report as JSON-able values; None: there is none."""
        if not self.incarnation:
            return None
        return {
            "incarnation": str(self.incarnation),
            "age_s": round(now_s - self.at_s, 3),
            "desired": dict(self.desired),
            "actual": dict(self.actual),
            "action": self.action,
            "reason": self.reason,
            "decision": self.decision,
            "events": list(self.events),
        }


def _decision(text: str) -> dict[str, Any] | None:
    """The decision's values; None: there is none, or it is malformed or too long."""
    if not text or len(text) > MAX_DECISION_CHARS:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
