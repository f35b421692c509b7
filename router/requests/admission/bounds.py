"""Admission control: bounds in requests, tokens and predicted time, with estimated Retry-After times. Pure.

offered = accepted + rejected + cancelled      at every moment; accepted requests wait, run or have ended by themselves
"""

from __future__ import annotations

from dataclasses import dataclass

from ....core.errors import DeadlineExceeded, Overloaded
from .estimates import AnswerShare, DrainRate, FullRate, TimingError


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """Bounds on requests under way, and parameters of retries."""

    max_requests: int = 512
    max_tokens: int = 2_000_000
    max_wait_s: float = 60.0  # predicted, for a free worker
    first_retry_s: float = 1.0  # Retry-After before any work has ended, and its lower bound
    longest_retry_s: float = 60.0
    retry_share: float = 0.1  # second dispatches per accepted request
    retry_reserve: float = 10.0


@dataclass(frozen=True, slots=True)
class Offer:
    """Size and owner of a request that asks for admission."""

    request_id: str
    tenant: str
    tokens: int  # prompt tokens and expected generated tokens, of all choices
    timeout_s: float


class Admission:
    """Bounds the requests that wait or run. Each one that `offer` accepts ends by one `release` or `reject`."""

    def __init__(self, limits: AdmissionLimits | None = None) -> None:
        self.limits = limits or AdmissionLimits()
        self.full_rate = FullRate()
        self.answers = AnswerShare()
        self.timing = TimingError()
        self._first_ms = 0.0  # predicted time to the first token of requests whose turn came; recent mean
        self._under_way: dict[str, Offer] = {}
        self._drain = DrainRate()
        self._retry_tokens = self.limits.retry_reserve
        self.tokens = 0
        self.offered = 0
        self.accepted = 0
        self.rejected = 0
        self.cancelled = 0

    def __len__(self) -> int:
        return len(self._under_way)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._under_way

    def excess(self, tokens: int) -> tuple[int, int]:
        """Requests and tokens that must leave before a request of `tokens` tokens fits; (0, 0): it fits.

        A request alone always fits, whatever its size.
        """
        if not self._under_way:
            return 0, 0
        limits = self.limits
        return max(0, len(self._under_way) + 1 - limits.max_requests), max(0, self.tokens + tokens - limits.max_tokens)

    def offer(self, offer: Offer, now_s: float) -> None:
        """Accept a request.

        Raises:
            Overloaded: too much waits or runs; with an estimated `retry_after_s`.
        """
        assert offer.request_id not in self._under_way
        try:
            self.check(offer.tokens, now_s)
        except Overloaded:
            self.refuse()
            raise
        self.offered += 1
        self.accepted += 1
        self._under_way[offer.request_id] = offer
        self.tokens += offer.tokens
        self._retry_tokens = min(self.limits.retry_reserve, self._retry_tokens + self.limits.retry_share)

    def refuse(self) -> None:
        """Count a request that was refused without being offered."""
        self.offered += 1
        self.rejected += 1

    def reject(self, request_id: str, now_s: float) -> None:
        """Remove an accepted request that was not served after all; it counts as rejected."""
        if self._leave(request_id) is not None:
            self.accepted -= 1
            self.rejected += 1

    def release(self, request_id: str, now_s: float, cancelled: bool = False, *, served: bool = True) -> None:
        """Remove an accepted request that is over. `served`: a worker had it, so its end is finished work."""
        offer = self._leave(request_id)
        if offer is None:
            return
        if served:
            self._drain.note(offer.tokens, now_s)
            self.full_rate.note(offer.tokens, now_s)
        if cancelled:
            self.accepted -= 1
            self.cancelled += 1

    def check(self, tokens: int, now_s: float) -> None:
        """Check the bounds for a request of this cost. Changes nothing.

        Raises:
            Overloaded: it does not fit.
        """
        num, excess = self.excess(tokens)
        if excess:
            raise Overloaded(
                f"{self.tokens} tokens are under way of at most {self.limits.max_tokens}",
                retry_after_s=self.retry_after_s(excess, now_s),
            )
        if num:
            mean = max(1, self.tokens // len(self._under_way))
            raise Overloaded(
                f"{len(self._under_way)} requests are under way, the most that are taken",
                retry_after_s=self.retry_after_s(mean, now_s),
            )

    def check_wait(self, cost_before: float, least_ms: float, left_s: float, now_s: float) -> None:
        """Refuse a request that would wait too long behind others, at the rate at which work ends while others wait.

        `least_ms`: time that its answer takes at least.

        Raises:
            Overloaded: it would miss its deadline, or wait longer than `max_wait_s`.
        """
        rate = self.full_rate.per_s(now_s)
        if not cost_before or rate is None:
            return
        after_ms = self.timing.factor * (least_ms + self._first_ms)  # as `check_deadline` will ask for, after the wait
        allowed_s = min(self.limits.max_wait_s, left_s - after_ms / 1e3)
        wait_s = cost_before / rate
        if wait_s > allowed_s:
            raise Overloaded(
                f"{cost_before:.0f} tokens of others come first, for about {wait_s:.1f} s; this request may wait "
                f"{max(0.0, allowed_s):.1f} s",
                retry_after_s=self._bounded(wait_s - allowed_s),
            )

    def check_deadline(
        self, first_token_ms: float, alone_ms: float, timeout_s: float, answer_ms: float = 0.0, *, others: bool = False
    ) -> None:
        """Refuse a request that cannot meet its deadline.

        `answer_ms`: predicted time from the first token to the last one; 0: not known, and only the first one counts.
        `others`: others wait, who could use the worker instead: then the prediction's usual error counts as well. Else
        the request is tried, so that an error that has passed is forgotten.

        Raises:
            DeadlineExceeded: even an idle worker would be too late (`alone_ms` to the first token).
            Overloaded: the queues are too long for this deadline.
        """
        self._first_ms += (first_token_ms - self._first_ms) / 8
        what = "answer" if answer_ms else "first token"
        alone_s = (alone_ms + answer_ms) / 1e3
        if alone_s > timeout_s:
            raise DeadlineExceeded(
                f"the {what} is predicted to take {alone_s:.1f} s of computing, longer than timeout {timeout_s:g} s; "
                "ask for fewer tokens, or allow more time"
            )
        expected_s = (self.timing.factor if others else 1.0) * (first_token_ms + answer_ms) / 1e3
        if expected_s > timeout_s:
            raise Overloaded(
                f"the {what} is expected in {expected_s:.1f} s, later than timeout {timeout_s:g} s",
                retry_after_s=self._bounded(expected_s - timeout_s),
            )

    def may_retry(self) -> bool:
        """Take one retry from the budget; False if none is left."""
        if self._retry_tokens < 1.0:
            return False
        self._retry_tokens -= 1.0
        return True

    def retry_after_s(self, tokens: int, now_s: float) -> float:
        """Estimated seconds until `tokens` tokens have ended, at the recent rate, within the bounds."""
        rate = self.full_rate.per_s(now_s) or self._drain.per_s(now_s)
        return self._bounded(tokens / rate) if rate > 0 else self.limits.first_retry_s

    def _leave(self, request_id: str) -> Offer | None:
        offer = self._under_way.pop(request_id, None)
        if offer is not None:
            self.tokens -= offer.tokens
        return offer

    def _bounded(self, seconds: float) -> float:
        return min(self.limits.longest_retry_s, max(self.limits.first_retry_s, seconds))
