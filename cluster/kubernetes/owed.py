"""Changes of the numbers of pods that were decided and that the API server has not taken yet. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...core.request import Role

FIRST_WAIT_S, LONGEST_WAIT_S = 2.0, 60.0


@dataclass(slots=True)
class _Debt:
    count: int  # of pods to add, or to take away
    due_s: float
    failures: int = 0
    problem: str = ""


class Owed:
    """By the role whose pods are scaled."""

    def __init__(self) -> None:
        self._debts: dict[Role, _Debt] = {}

    def add(self, role: Role, count: int, now_s: float) -> None:
        """So many pods more, or fewer."""
        debt = self._debts.setdefault(role, _Debt(0, now_s))
        debt.count += count
        if debt.count == 0:
            del self._debts[role]

    def due(self, now_s: float) -> dict[Role, int]:
        """What to ask for now."""
        return {role: debt.count for role, debt in self._debts.items() if now_s >= debt.due_s}

    def taken(self, role: Role) -> None:
        """It is done."""
        self._debts.pop(role, None)

    def refused(self, role: Role, problem: str, now_s: float) -> int:
        """It was not taken. Returns how many starts are given up; pods that are to go are asked for again later."""
        debt = self._debts[role]
        if debt.count > 0:
            del self._debts[role]
            return debt.count
        debt.failures += 1
        debt.problem = problem
        debt.due_s = now_s + min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** min(debt.failures - 1, 10))
        return 0

    def words(self, names: Mapping[Role, str]) -> tuple[str, ...]:
        """What is under way, for people; `names` of what is scaled."""
        return tuple(
            f"{names[role]} is to have {abs(debt.count)} pod{'s' * (abs(debt.count) > 1)} "
            f"{'more' if debt.count > 0 else 'fewer'}{f': {debt.problem}' if debt.problem else ''}"
            for role, debt in self._debts.items()
        )
