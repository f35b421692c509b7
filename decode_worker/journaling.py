"""Offers the KV of this worker's streams to their buddies, beside the steps: carries out what journal.py decides.

`Buddies` provides calls and timers: buddy_calls.py on asyncio, sim/ in virtual time.
"""

from __future__ import annotations

import logging
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from google.protobuf.message import DecodeError

from ..core.clock import Clock
from ..core.request import SequenceKey
from ..kv.handover.carrier import Cancellable
from ..kv.messages import scope_to_wire
from ..kv.spec import HASH_BLOCK_TOKENS
from ..protos import handover_pb2
from .journal import Journal, Offer
from .order import Order

log = logging.getLogger(__name__)

OFFER_S = 10.0  # longest time for a buddy to fetch and store an offer
MIN_DELAY_S = 0.01  # of the timer: a few due offers may wait for each other


class Buddies(Protocol):
    """Calls to the workers that keep copies, and a timer."""

    def keep(self, address: str, request: bytes, timeout_s: float, answered: Callable[[bytes | None], None]) -> None:
        """Call Blocks.Keep. `answered` gets the reply, once and never from inside this call; None: none in time."""
        ...

    def after(self, delay_s: float, act: Callable[[], None]) -> Cancellable:
        """Call `act` after `delay_s`, never from inside this call."""
        ...

    def close(self) -> None:
        """End all calls under way."""
        ...


@dataclass(slots=True)
class JournaledRun:
    """One run with a buddy: its tokens so far."""

    order: Order
    token_ids: array[int] = field(default_factory=lambda: array("I"))  # generated here


class Journaling:
    """The journal of one worker. All methods are called on one loop and return at once."""

    def __init__(
        self, journal: Journal, buddies: Buddies, clock: Clock, counters: Counter[str], address: Callable[[], str]
    ) -> None:
        """`address`: of this worker, from which buddies fetch."""
        self._journal = journal
        self._buddies = buddies
        self._clock = clock
        self._counters = counters
        self._address = address
        self._runs: dict[SequenceKey, JournaledRun] = {}
        self._timer: Cancellable | None = None
        self._is_closed = False

    @property
    def is_idle(self) -> bool:
        """True if no run has a buddy and no offer is under way."""
        return not self._runs and not self._journal.num_under_way

    def begin(self, order: Order) -> None:
        """A run begins; one without a buddy is ignored."""
        if order.buddy is None:
            return
        is_prefill = any(peer.worker_id == order.buddy.worker_id for peer in order.peers[:1])
        self._runs[order.engine_key] = JournaledRun(order)
        self._journal.begin(order.engine_key, len(order.prompt_ids) if is_prefill else 0)

    def grew(self, key: SequenceKey, token_ids: Sequence[int], *, has_kv: bool) -> None:
        """A run has new tokens. `has_kv`: all before the last of them are computed here, or arrived."""
        run = self._runs.get(key)
        if run is None:
            return
        run.token_ids.extend(token_ids)
        if has_kv:
            self._journal.grew(key, len(run.order.prompt_ids) + len(run.token_ids))
            self._offer()

    def end(self, key: SequenceKey) -> None:
        """A run is over. Its offers under way go on: their copies may serve the next prompt."""
        self._runs.pop(key, None)
        self._journal.end(key)

    def close(self) -> None:
        """Offer nothing more."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._buddies.close()

    # ------------------------------------------------------------------ inside

    def _offer(self) -> None:
        """Make the offers that are due, and come back when the next one may be."""
        if self._is_closed:
            return
        now_s = self._clock.now_s()
        while (offer := self._journal.next(now_s)) is not None:
            self._send(offer, self._runs[offer.key])
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due_s = self._journal.next_s(now_s)
        if due_s is not None:
            self._timer = self._buddies.after(max(MIN_DELAY_S, due_s - now_s), self._offer)

    def _send(self, offer: Offer, run: JournaledRun) -> None:
        order = run.order
        assert order.buddy is not None, "a run without a buddy has no journal"
        request = handover_pb2.KeepRequest(
            token_ids=(*order.prompt_ids, *run.token_ids)[: offer.num_tokens],
            **scope_to_wire(order.scope),
            identity_root=order.prompt.names.root,
            address=self._address(),
        )

        def answered(reply: bytes | None) -> None:
            self._answered(offer, _kept_of(offer, reply))

        self._buddies.keep(order.buddy.address, request.SerializeToString(), OFFER_S, answered)

    def _answered(self, offer: Offer, kept_tokens: int) -> None:
        if kept_tokens == offer.num_tokens:
            self._counters["journal_offers"] += 1
            self._counters["journal_blocks"] += kept_tokens // HASH_BLOCK_TOKENS
        else:
            self._counters["journal_refused"] += 1
        self._journal.answered(offer, kept_tokens, self._clock.now_s())
        self._offer()


def _kept_of(offer: Offer, reply: bytes | None) -> int:
    """Leading tokens that the buddy says it holds; 0 if it says nothing that makes sense."""
    if reply is None:
        return 0
    try:
        told = handover_pb2.KeepReply.FromString(reply)
    except DecodeError as error:
        log.debug("%s: its buddy answers nonsense: %s", offer.key, error)
        return 0
    if told.reason:
        log.debug("%s: its buddy kept %d of %d tokens: %s", offer.key, told.kept_tokens, offer.num_tokens, told.reason)
    return told.kept_tokens if told.kept_tokens <= offer.num_tokens else 0
