"""When a source of addresses that does not answer is worth a line of the log. Pure; times come from the caller."""

from __future__ import annotations

PATIENCE_S = 15.0  # a Service has no endpoint, and a name no address, while a cluster starts
AGAIN_S = 600.0  # between two lines about one outage


class Outage:
    """One source's trouble: one line when it has lasted, a rare one while it lasts, one when it is over."""

    def __init__(self) -> None:
        self.problem = ""  # the present one
        self._since_s: float | None = None
        self._said_at_s: float | None = None  # of the present outage

    def fails(self, problem: str, now_s: float, *, at_once: bool = False) -> str | None:
        """The source cannot be asked, or has nothing. Returns the line to log, if it is time for one.

        `at_once`: time heals nothing here, e.g. a right that is missing.
        """
        if self._since_s is None:
            self._since_s = now_s
        self.problem = problem
        if not at_once and now_s - self._since_s < PATIENCE_S:
            return None
        if self._said_at_s is not None and now_s - self._said_at_s < AGAIN_S:
            return None
        self._said_at_s = now_s
        return problem

    def works(self, now_s: float) -> str | None:
        """The source answers. Returns the line to log, if its outage was logged."""
        since_s, was_said = self._since_s, self._said_at_s is not None
        self.problem, self._since_s, self._said_at_s = "", None, None
        return f"it answers again, after {now_s - since_s:.0f} s" if was_said and since_s is not None else None
