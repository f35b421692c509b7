"""Admission control: bounded requests and tokens, fair between tenants, with estimated Retry-After times. Pure.

offered = accepted + rejected + cancelled      at every moment; accepted requests run or have ended by themselves
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...core.errors import DeadlineExceeded, Overloaded

_RATE_WINDOW_S = 10.0


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """Bounds on requests under way, and parameters of retries."""

    max_requests: int = 512
    max_tokens: int = 2_000_000
    contended_share: float = 0.5  # above this fill level no tenant gets more than an equal share
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


class DrainRate:
    """Rate of finished work in tokens per second, over the last seconds."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._since_s: float | None = None
        self._noted_s = 0.0

    def note(self, tokens: int, now_s: float) -> None:
        """Add the tokens of a request that ended now."""
        if self._since_s is None:
            self._since_s = self._noted_s = now_s
        self._decay(now_s)
        self._tokens += tokens

    def per_s(self, now_s: float) -> float:
        """Present rate in tokens per second; 0 before any request has ended."""
        if self._since_s is None:
            return 0.0
        self._decay(now_s)
        return self._tokens / min(_RATE_WINDOW_S, max(1.0, now_s - self._since_s))

    def _decay(self, now_s: float) -> None:
        self._tokens *= math.exp(-(now_s - self._noted_s) / _RATE_WINDOW_S)
        self._noted_s = now_s


class Admission:
    """Bounds the requests under way. `offer` accepts or refuses; an accepted one ends by one `release` or `reject`."""

    def __init__(self, limits: AdmissionLimits | None = None) -> None:
        self.limits = limits or AdmissionLimits()
        self._under_way: dict[str, Offer] = {}
        self._share_by_tenant: dict[str, float] = {}  # share of the bounds that each tenant uses
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

    def offer(self, offer: Offer, now_s: float) -> None:
        """Accept a request.

        Raises:
            Overloaded: too much is under way, in total or for this tenant; with an estimated `retry_after_s`.
        """
        assert offer.request_id not in self._under_way
        self.offered += 1
        try:
            self._check(offer, now_s)
        except Overloaded:
            self.rejected += 1
            raise
        self.accepted += 1
        self._under_way[offer.request_id] = offer
        self.tokens += offer.tokens
        self._share_by_tenant[offer.tenant] = self._share_by_tenant.get(offer.tenant, 0.0) + self._size(offer)
        self._retry_tokens = min(self.limits.retry_reserve, self._retry_tokens + self.limits.retry_share)

    def reject(self, request_id: str, now_s: float) -> None:
        """Remove an accepted request that cannot be served after all; it counts as rejected."""
        if self._leave(request_id, now_s):
            self.accepted -= 1
            self.rejected += 1

    def release(self, request_id: str, now_s: float, cancelled: bool = False) -> None:
        """Remove an accepted request that is over."""
        if self._leave(request_id, now_s) and cancelled:
            self.accepted -= 1
            self.cancelled += 1

    def check_deadline(self, first_token_ms: float, alone_ms: float, timeout_s: float) -> None:
        """Refuse a request that cannot meet its deadline.

        Raises:
            DeadlineExceeded: even an idle worker would be too late (`alone_ms`).
            Overloaded: the queues are too long for this deadline.
        """
        if alone_ms > timeout_s * 1e3:
            raise DeadlineExceeded(
                f"the first token takes {alone_ms / 1e3:.1f} s of computing, longer than timeout {timeout_s:g} s"
            )
        if first_token_ms > timeout_s * 1e3:
            raise Overloaded(
                f"the first token is expected in {first_token_ms / 1e3:.1f} s, later than timeout {timeout_s:g} s",
                retry_after_s=self._bounded(first_token_ms / 1e3 - timeout_s),
            )

    def may_retry(self) -> bool:
        """Take one retry from the budget; False if none is left."""
        if self._retry_tokens < 1.0:
            return False
        self._retry_tokens -= 1.0
        return True

    def retry_after_s(self, tokens: int, now_s: float) -> float:
        """Estimated seconds until `tokens` tokens have ended, at the recent rate, within the bounds."""
        rate = self._drain.per_s(now_s)
        return self._bounded(tokens / rate) if rate > 0 else self.limits.first_retry_s

    def _check(self, offer: Offer, now_s: float) -> None:
        limits = self.limits
        excess = self.tokens + offer.tokens - limits.max_tokens
        if excess > 0 and self._under_way:
            raise Overloaded(
                f"{self.tokens} tokens are under way of at most {limits.max_tokens}",
                retry_after_s=self.retry_after_s(excess, now_s),
            )
        if len(self._under_way) >= limits.max_requests:
            mean = max(1, self.tokens // len(self._under_way))
            raise Overloaded(
                f"{len(self._under_way)} requests are under way, the most that are taken",
                retry_after_s=self.retry_after_s(mean, now_s),
            )
        self._check_share(offer, now_s)

    def _check_share(self, offer: Offer, now_s: float) -> None:
        """Above `contended_share`, a tenant may not exceed an equal share of the used capacity."""
        limits = self.limits
        size = self._size(offer)
        own = self._share_by_tenant.get(offer.tenant, 0.0)
        tenants = len(self._share_by_tenant.keys() | {offer.tenant})
        fill = sum(self._share_by_tenant.values()) + size
        fair = max(fill, limits.contended_share) / tenants
        if tenants > 1 and own and fill > limits.contended_share and own + size > fair:
            raise Overloaded(
                f"this tenant uses {own:.0%} of what the cluster takes; its share among {tenants} is {fair:.0%}",
                retry_after_s=self.retry_after_s(offer.tokens, now_s),
            )

    def _size(self, offer: Offer) -> float:
        return max(offer.tokens / self.limits.max_tokens, 1 / self.limits.max_requests)

    def _leave(self, request_id: str, now_s: float) -> bool:
        offer = self._under_way.pop(request_id, None)
        if offer is None:
            return False
        self.tokens -= offer.tokens
        self._share_by_tenant[offer.tenant] -= self._size(offer)
        if not any(other.tenant == offer.tenant for other in self._under_way.values()):
            del self._share_by_tenant[offer.tenant]  # sums of floats may not return to exactly 0
        self._drain.note(offer.tokens, now_s)
        return True

    def _bounded(self, seconds: float) -> float:
        return min(self.limits.longest_retry_s, max(self.limits.first_retry_s, seconds))
