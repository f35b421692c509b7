"""Task of one choice of one request, from its order to its end on this worker. Knows no session and no text rules.

    order ─▶ engine Submit ─▶ Promised ─▶ pull from the first peer ─▶ KvComplete ─▶ tokens … ─▶ Ended
                                 │  │          ▲ │ lost: the next peer, or ─┐
                                 │  └ fetch from a source ── all but a few fetched ─┤
                                 └─ no peer, or all but < 16 tokens held ───────────┴─▶ local prefill

The engine's `Ended` is the only end: it proves that the blocks are free. The reason of an end that was decided earlier
(a stop string, a cancel, the deadline) is kept in `_verdict` until then.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable

from ..core.errors import TransportUnavailable
from ..core.request import FinishReason
from ..core.timeline import Instant, Timeline
from ..engine.link import messages as link
from ..engine.link.client import SequenceEvent
from ..kv.handover.fetching import BlockFetch
from ..kv.handover.machine import Fetched, GotFirstToken, Label, Lost
from ..kv.handover.plane_channel import GLOO, GRPC, SHM
from ..kv.handover.receiver import Receiver
from ..kv.handover.sources import MOST_LEFT_TOKENS, SourceLine
from ..kv.spec import HASH_BLOCK_TOKENS
from .choice import ChoiceText
from .fetch import KvFetch
from .messages import open_of, submit_of
from .order import Order, Peer
from .outbox import NO_SCORES, Outbox, Scores
from .pull import NOTHING, REFUSALS, KvPull, Offer
from .report import HandoverTotals, end_message, ending_of, life_of, taken_message
from .tools import DecodeTaskTools

log = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 600.0


class DecodeTask:
    """Owns one sequence of the engine. All methods are called on the loop and return at once."""

    def __init__(
        self,
        order: Order,
        choice: ChoiceText,
        outbox: Outbox,
        tools: DecodeTaskTools,
        ended: Callable[[DecodeTask], None],
        *,
        adapter_slot: int = 0,
    ) -> None:
        """`adapter_slot`: held for this run by its owner, who releases it at its end."""
        self.order = order
        self.adapter_slot = adapter_slot
        self.timeline = Timeline()
        self._choice = choice
        self._outbox = outbox
        self._tools = tools
        self._ended = ended
        self._received_at_s = tools.pull.clock.now_s()
        self._deadline_s = self._received_at_s + (order.timeout_s or DEFAULT_TIMEOUT_S)
        self._verdict: FinishReason | None = None
        self._pull: KvPull | None = None
        self._peers = list(order.peers)
        self._peer: Peer | None = None  # that was asked last
        self._fetch: KvFetch | None = None
        self._sources = SourceLine(order.sources, order.prompt.names.identities, len(order.prompt_ids))
        self._fetch_waits = False  # for the engine's Bound
        self._has_bound = False
        self._has_asked = False
        self._is_put_off = False  # the engine has answered NotYet
        self._pull_waits = False  # the present pull asked for Bind and has no answer yet
        self._awaited_pair: Peer | None = None  # whose paired channel is required and being made
        self._held_tokens = 0
        self._num_said = 0  # tokens for the router
        self._last_token_s: float | None = None
        self._gaps_s = array("d")  # between tokens
        self.told = HandoverTotals()
        self.timeline.mark(Instant.RECEIVED, self._received_at_s)

    @property
    def is_suspect(self) -> bool:
        """True if it may kill this worker, as far as its router knows."""
        return self._num_said < self.order.confirm

    # ------------------------------------------------------------------ from the session

    def start(self) -> None:
        """Submit the sequence to the engine."""
        order = self.order
        dispatcher = self._tools.pull.dispatcher
        dispatcher.own(order.engine_key, self.handle)
        dispatcher.send(submit_of(order, self._deadline_s, self.adapter_slot))
        if not (order.peers or order.sources):
            self.told.local_reason = "ordered"
        if self._tools.journal is not None:
            self._tools.journal.begin(order)

    def cancel(self, reason: str, verdict: FinishReason = FinishReason.CANCELLED) -> None:
        """End the run: its blocks are freed at the next step boundary, here and at the peer."""
        if self._verdict is None:
            self._verdict = verdict
            self._tools.pull.dispatcher.send(link.CancelSequence(self.order.engine_key, verdict))
        if self._fetch is not None:
            self._fetch.cancel()
        if self._pull is not None:
            self._pull.cancel(reason)

    # ------------------------------------------------------------------ from the engine

    def handle(self, event: SequenceEvent) -> None:
        """Handle one event of this run's sequence."""
        match event:
            case link.Promised(_, held_tokens):
                self._promised(held_tokens)
            case link.Bound():
                self._bound()
            case link.NotYet():
                self._is_put_off = True
                if self._pull is not None and self._pull_waits:
                    self._pull.not_yet()
            case link.KvWritten(_, token_start, token_count):
                if self._fetch is not None:
                    self._fetch.written(token_start, token_count)
                elif self._pull is not None:
                    self._pull.written(token_start, token_count)
            case link.TokenNews():
                self._say(event)
            case link.Ended():
                self._end(event)
            case _:
                log.debug("%s: %s is nothing to a run", self.order.engine_key, type(event).__name__)

    def _promised(self, held_tokens: int) -> None:
        self._mark(Instant.PROMISED)
        self._held_tokens = self.told.tokens_held = held_tokens
        if not (self.order.peers or self.order.sources) or self._verdict is not None:
            return
        if len(self.order.prompt_ids) - held_tokens < HASH_BLOCK_TOKENS:
            # Less than a block is missing: a hand-over would take longer than computing it here.
            self._go_local("under_a_block_missing", held_tokens, None)
        elif self._sources.may_help(held_tokens):
            self._fetch_waits = True
            self._ask_bind()
        else:
            self._get_rest("ordered")

    def _bound(self) -> None:
        self._has_bound = True
        self._mark(Instant.BOUND)
        if self._fetch_waits:
            self._fetch_waits = False
            self._fetch_from_next()
        elif self._pull is not None and self._pull_waits:
            self._pull.bound()  # else a lost peer had asked for it: the present one has not sent Started yet

    # ------------------------------------------------------------------ blocks that other workers hold

    def _fetch_from_next(self) -> None:
        """Fetch from the next source that may have more than is here; without one, get the rest as ordered."""
        if self._verdict is not None:
            return
        source = self._sources.next(self._held_tokens)
        if source is None:
            self._get_rest("fetched" if self.told.tokens_fetched else "not_fetched")
            return
        order, pull, model = self.order, self._tools.pull, self._tools.facts.model
        now_s = pull.clock.now_s()
        windowed = model.kv_spec.main.windowed
        wanted = self._sources.wanted(
            self._held_tokens, model.numerics_class if model.deterministic else None, windowed
        )
        fetch = BlockFetch(wanted, pull.timing.silence_s, self._deadline_s, now_s)
        host = self._tools.connect_source(order.engine_key, source.address, max(0.001, self._deadline_s - now_s))

        def over(fetched: Fetched) -> None:
            self.told.add_fetch(source.worker_id, fetch)
            self._sources.ended(fetched.end)
            self._held_tokens = fetched.stored_upto
            self._fetch = None
            self._fetch_from_next()

        self._fetch = KvFetch(fetch, host, order, pull, over)

    def _get_rest(self, reason: str) -> None:
        """Have a peer compute what is missing; or compute it here: without peers, or if a fetch left only a little."""
        left = len(self.order.prompt_ids) - self._held_tokens
        if self._peers and not (self.told.tokens_fetched and left < MOST_LEFT_TOKENS):
            self._pull_from_next()
        else:
            self._go_local(reason, self._held_tokens, None)

    def _ask_bind(self) -> None:
        """Ask the engine to bind blocks, unless it was asked before; `_bound` follows."""
        if not self._has_asked:
            self._has_asked = True
            self._tools.pull.dispatcher.send(link.Bind(self.order.engine_key))

    # ------------------------------------------------------------------ the hand-over

    def _pull_from_next(self) -> None:
        peer, required = self._peers.pop(0), self._tools.facts.transport.required
        pairs = self._tools.pull.pairs
        if required == GLOO and pairs is not None and pairs.get(peer.address) is None:
            self._awaited_pair = peer

            def known() -> None:
                if self._awaited_pair is peer:
                    self._awaited_pair = None
                    self._pull_from(peer)

            pairs.when_known(peer.address, known)
        else:
            self._pull_from(peer)

    def _offered(self, peer: Peer) -> Offer | None:
        """What is offered to a peer for the planes; None: less than this worker requires."""
        policy, rings, pairs = self._tools.facts.transport, self._tools.pull.rings, self._tools.pull.pairs
        if rings is not None and policy.may_share:
            why = rings.why_none(peer.address)
            ring = rings.take(peer.address)
            offer = Offer(ring, why_nothing="" if ring is not None else why)
        elif pairs is not None and policy.offers_pair:
            pair = pairs.get(peer.address)
            if pair is None:
                offer = Offer(why_nothing=pairs.why_none(peer.address))
            else:
                offer = Offer(pair=pair, pair_key=pair.open_key(self._tools.facts.frame_slots))
        else:
            offer = NOTHING
        found = SHM if offer.ring is not None else GRPC if offer.pair is None else GLOO
        return offer if policy.required in ("", GRPC, found) else None

    def _pull_from(self, peer: Peer) -> None:
        if self._verdict is not None:
            return
        order, tools = self.order, self._tools
        self._peer = peer
        offer = self._offered(peer)
        if offer is None:
            is_ring = tools.facts.transport.required == SHM
            self._go_local("no_shared_memory" if is_ring else "no_paired_channel", self._held_tokens, None)
            return
        label = Label(order.key.request_id, order.key.choice, order.epoch)
        now_s = tools.pull.clock.now_s()
        left_s = self._deadline_s - now_s
        opening = open_of(order, peer, tools.facts, self._held_tokens, left_s=left_s, offer=offer)
        receiver = Receiver(label, opening, tools.pull.timing, self._deadline_s, now_s)
        self.told.prefill_worker = peer.worker_id
        self.told.tokens_asked = len(order.prompt_ids) - self._held_tokens
        self._pull_waits = False
        host = tools.connect(order.engine_key, peer.address)
        self._pull = KvPull(receiver, host, order.engine_key, self, tools.pull, offer=offer)

    def bind_wanted(self) -> None:
        """Implements `PullOwner.bind_wanted`. A second peer may ask for blocks that the engine has bound already."""
        assert self._pull is not None
        self._pull_waits = True
        order = self.order
        if self._peer is not None and (order.confirm or self._peer != order.peers[0]):
            # Its turn is next, and it computes nothing before it hears of the blocks that are bound now.
            self._outbox.add_taken(taken_message(order.key, order.epoch, self._peer))
        if self._has_bound:
            self._pull.bound()
        elif self._is_put_off:
            self._pull.not_yet()  # Bound will come
        else:  # or the answer to an earlier question is on its way
            self._ask_bind()

    def first_token_came(self, first: GotFirstToken) -> None:
        """Implements `PullOwner.first_token_came`."""
        key, index = self.order.engine_key, self.order.num_emitted
        self._say(link.TokenNews(key, index, (first.token_id,), first.logprobs, first.prompt_logprobs))

    def pull_completed(self) -> None:
        """Implements `PullOwner.pull_completed`."""
        pull = self._finish_pull()
        first_token = pull.receiver.first_token
        assert first_token is not None, "complete without a first token"
        self.told.complete(pull)
        if self._verdict is None:
            self._tools.pull.dispatcher.send(link.KvComplete(self.order.engine_key, first_token))

    def pull_lost(self, lost: Lost) -> None:
        """Implements `PullOwner.pull_lost`. Asks the next peer if no token has arrived, else prefills the rest here."""
        self._finish_pull()
        log.info("%s: hand-over lost: %s %s", self.order.engine_key, lost.reason, lost.detail or lost.error_message)
        if self._verdict is not None:
            return
        is_untouched = lost.stored_upto <= self._held_tokens and lost.first_token is None
        if lost.reason in REFUSALS and is_untouched and self._peers:
            self._pull_from_next()
        elif lost.reason in REFUSALS:
            is_by_transport = lost.error_code == TransportUnavailable.code
            reason = "peer_refused" if lost.error_code else f"peer_{lost.reason.value}"
            reason = "peer_transport" if is_by_transport else reason
            self._go_local(reason, lost.stored_upto, lost.first_token)
        # else: the request's own deadline; the engine's clock ends it

    def _finish_pull(self) -> KvPull:
        pull = self._pull
        assert pull is not None
        self._pull = None
        self.told.add(pull)
        return pull

    def _go_local(self, reason: str, kept_tokens: int, first_token: int | None) -> None:
        self.told.local_reason = reason
        self.told.recomputed_tokens = len(self.order.prompt_ids) - kept_tokens
        self._tools.pull.dispatcher.send(link.PrefillLocally(self.order.engine_key, kept_tokens, first_token))

    # ------------------------------------------------------------------ to the router

    def _say(self, news: link.TokenNews) -> None:
        """Send tokens to the router; those after an end are dropped."""
        if self._verdict is not None:
            return
        now_s = self._tools.pull.clock.now_s()
        try:
            spoken = self._choice.push(news.first_index, news.token_ids, news.logprobs)
        except Exception:  # a failure in the text of this choice must not end others
            log.exception("%s: tokens from %d on gave no text; the choice ends", self.order.key, news.first_index)
            self.cancel("failed", FinishReason.ERROR)
            return
        if not spoken.token_ids:
            return
        self._num_said += len(spoken.token_ids)
        if self._tools.journal is not None:
            self._tools.journal.grew(self.order.engine_key, spoken.token_ids, has_kv=self._pull is None)
        self.timeline.mark(Instant.FIRST_TOKEN, now_s)
        if spoken.first_index + len(spoken.token_ids) - self.order.num_emitted > 1:
            self.timeline.mark(Instant.SECOND_TOKEN, now_s)
        if self._last_token_s is not None:
            count = len(spoken.token_ids)
            self._gaps_s.extend([(now_s - self._last_token_s) / count] * count)
        self._last_token_s = now_s
        scores = NO_SCORES
        if spoken.logprobs or news.prompt_logprobs:
            scores = Scores(spoken.logprobs, news.prompt_logprobs, self._choice.num_shown)
        key, epoch = self.order.key, self.order.epoch
        self._outbox.add_tokens(key, epoch, spoken.first_index, spoken.token_ids, spoken.text, scores=scores)
        if spoken.ended is not None and (spoken.is_by_text or self._pull is not None):
            # The engine does not know of a stop string, and does not know a peer's first token yet.
            self.cancel("finished", spoken.ended)

    def _mark(self, instant: Instant) -> None:
        self.timeline.mark(instant, self._tools.pull.clock.now_s())

    def _end(self, event: link.Ended) -> None:
        """The engine has freed the sequence: report the end to the router, exactly once."""
        if self._tools.journal is not None:
            self._tools.journal.end(self.order.engine_key)
        self._awaited_pair = None
        if self._fetch is not None:
            self._fetch.cancel()
            self._fetch = None
        if self._pull is not None:
            self._pull.cancel("ended")
            self.told.add(self._pull)
            self._pull = None
        if event.began_s is not None and not self.told.is_complete:
            self.timeline.mark(Instant.PREFILL_BEGAN, event.began_s)
        if self._last_token_s is not None:
            self.timeline.mark(Instant.LAST_TOKEN, self._last_token_s)
        self.timeline.mark(Instant.FINISHED, self._tools.pull.clock.now_s())
        ending = ending_of(event, self._verdict or event.reason, self._choice)
        spec, timeline = self._tools.facts.model.kv_spec, self.told.complete_timeline(self.timeline)
        self._outbox.add_end(end_message(self.order, ending, self.told, timeline, spec))
        self._tools.pull.ended(life_of(self.order, ending, self.told, timeline, self._gaps_s))
        self._ended(self)
