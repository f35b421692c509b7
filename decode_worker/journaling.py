"""Offers the KV of this worker's streams to their buddies, beside the steps. Drives journal.py on an event loop."""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grpc
from google.protobuf.message import DecodeError

from ..core.clock import Clock
from ..core.request import SequenceKey
from ..kv.handover.transports.grpc import Channels
from ..kv.messages import scope_to_wire
from ..kv.spec import HASH_BLOCK_TOKENS
from ..protos import handover_pb2
from .journal import Journal, Offer
from .order import Order

log = logging.getLogger(__name__)

OFFER_S = 10.0  # longest time for a buddy to fetch and store an offer


@dataclass(slots=True)
class JournaledRun:
    """One run with a buddy: its tokens so far."""

    order: Order
    token_ids: array[int] = field(default_factory=lambda: array("I"))  # generated here


class Journaling:
    """The journal of one worker."""

    def __init__(
        self, journal: Journal, channels: Channels, clock: Clock, counters: Counter[str], address: Callable[[], str]
    ) -> None:
        """`address`: of this worker, from which buddies fetch."""
        self._journal = journal
        self._channels = channels
        self._clock = clock
        self._counters = counters
        self._address = address
        self._runs: dict[SequenceKey, JournaledRun] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

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
        """A run is over."""
        self._runs.pop(key, None)
        self._journal.end(key)

    def close(self) -> None:
        """Offer nothing more."""
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()

    # ------------------------------------------------------------------ inside

    def _offer(self) -> None:
        """Make the offers that are due, and come back when the next one may be."""
        now_s = self._clock.now_s()
        while (offer := self._journal.next(now_s)) is not None:
            task = asyncio.create_task(self._send(offer, self._runs[offer.key]))  # it may end before the task runs
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due_s = self._journal.next_s(now_s)
        if due_s is not None:
            self._timer = asyncio.get_running_loop().call_later(max(0.01, due_s - now_s), self._offer)

    async def _send(self, offer: Offer, run: JournaledRun) -> None:
        order, kept = run.order, 0
        assert order.buddy is not None, "a run without a buddy has no journal"
        try:
            request = handover_pb2.KeepRequest(
                token_ids=(*order.prompt_ids, *run.token_ids)[: offer.num_tokens],
                **scope_to_wire(order.scope),
                identity_root=order.prompt.names.root,
                address=self._address(),
            )
            reply = await self._channels.keep(order.buddy.address, request.SerializeToString(), OFFER_S)
            told = handover_pb2.KeepReply.FromString(reply)
            kept = told.kept_tokens
            if told.reason:
                log.debug("%s: its buddy kept %d of %d tokens: %s", offer.key, kept, offer.num_tokens, told.reason)
        except (grpc.RpcError, DecodeError) as error:
            log.debug("%s: its buddy does not answer: %s", offer.key, error)
        finally:
            self._counters["journal_offers" if kept >= offer.num_tokens else "journal_refused"] += 1
            self._counters["journal_blocks"] += kept // HASH_BLOCK_TOKENS if kept >= offer.num_tokens else 0
            self._journal.answered(offer, kept, self._clock.now_s())
        self._offer()
