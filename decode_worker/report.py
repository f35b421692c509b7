"""Report of a run at its end: usage, timeline, and facts about its hand-overs. Knows no engine and no stream."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..core.errors import TwostrokeError, from_code
from ..core.life import Life, Transfer
from ..core.request import Epoch, FinishReason, SequenceKey
from ..core.timeline import Instant, Timeline
from ..engine.link import messages as link
from ..kv.handover.fetching import BlockFetch
from ..kv.handover.sources import NOTHING_FETCHED, FetchedBlocks
from ..kv.messages import epoch_to_wire, error_to_wire, finish_to_wire, instants_to_wire
from ..kv.spec import KvSpec
from ..protos import common_pb2, worker_pb2
from .choice import ChoiceText
from .order import Order, Peer
from .pull import KvPull

log = logging.getLogger(__name__)


class Ending(NamedTuple):
    """End of a run for the client."""

    event: link.Ended
    reason: FinishReason
    tail_text: str
    num_tokens: int  # generated, those of earlier dispatches included
    num_shown: int  # those of them that are part of the text


def ending_of(event: link.Ended, reason: FinishReason, choice: ChoiceText) -> Ending:
    """The end of a choice, with the text that was withheld until now. `reason`: as far as it was known before."""
    tail = ""
    try:
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            tail = choice.flush()
    except Exception:  # a failure in the text of this choice must not end others
        log.exception("%s: the last text could not be made; the choice ends with an error", event.key)
        reason = FinishReason.ERROR
    if reason is FinishReason.LENGTH and choice.ended is not None:
        reason = choice.ended  # the withheld text completed a stop string
    return Ending(event, reason, tail, choice.num_tokens, choice.num_shown)


@dataclass(slots=True)
class HandoverTotals:
    """Sums over the hand-overs of one run."""

    prefill_worker: str = ""  # the last one that was asked
    local_reason: str = ""
    is_complete: bool = False  # a peer computed the prompt
    tokens_held: int = 0
    tokens_asked: int = 0  # of a peer
    tokens_moved: int = 0
    bytes_moved: int = 0
    transport: str = "none"  # of the last hand-over that moved bytes
    transport_reason: str = ""
    bytes_per_s: float = 0.0
    prefill_cached_tokens: int = 0
    prefill_fetched: FetchedBlocks = NOTHING_FETCHED  # by the prefill worker, for this prompt
    refetched_blocks: int = 0
    recomputed_tokens: int = 0
    tokens_fetched: int = 0  # cached blocks of other workers
    bytes_fetched: int = 0
    fetched_from: str = ""  # the last worker that gave some
    fetch_end: str = ""  # of the last fetch
    timeline: Timeline | None = None  # of the last hand-over
    transfers: list[Transfer] = field(default_factory=list)

    def add(self, pull: KvPull) -> None:
        """Add the counts of a hand-over, complete or lost."""
        counters = pull.receiver.counters
        self.bytes_moved += counters.frame_bytes
        if counters.frame_bytes:
            self.transport = pull.receiver.transport
            self.transport_reason, self.bytes_per_s = pull.transport_reason, pull.bytes_per_s
        self.tokens_moved += max(0, pull.receiver.stored_upto - self.tokens_held - self.tokens_fetched)
        self.refetched_blocks += pull.refetched_blocks
        self.prefill_cached_tokens = pull.prefill_cached_tokens
        self.prefill_fetched = pull.prefill_fetched
        self.timeline = pull.timeline

    def add_fetch(self, source: str, fetch: BlockFetch) -> None:
        """Add the counts of a fetch that is over."""
        tokens = fetch.stored_upto - fetch.wanted.first_token
        self.tokens_fetched += tokens
        self.bytes_fetched += fetch.num_bytes
        self.fetch_end = "" if fetch.end is None else fetch.end.value
        if tokens:
            self.fetched_from = source

    def complete(self, pull: KvPull) -> None:
        """Record that a peer computed the prompt and all of its KV arrived."""
        self.is_complete = True
        duration_s = pull.timeline.between_s(Instant.FIRST_FRAME, Instant.LAST_FRAME)
        self.transfers.append(Transfer(pull.receiver.counters.frame_bytes, duration_s))

    def complete_timeline(self, own: Timeline) -> Timeline:
        """A run's instants and those of its last hand-over; if both have an instant, the run's is taken."""
        whole = Timeline()
        for part in (own, self.timeline):
            for instant in Instant:
                at_s = part.at_s(instant) if part else None
                if at_s is not None:
                    whole.mark(instant, at_s)
        return whole


def life_of(order: Order, ending: Ending, told: HandoverTotals, timeline: Timeline, gaps_s: Sequence[float]) -> Life:
    """Metrics of a run that is over."""
    received_s = _received_s(timeline)
    num_prompt = len(order.prompt_ids) - order.num_emitted
    cached = min(ending.event.cached_tokens or told.tokens_held, num_prompt)
    moved = min(told.tokens_moved + told.tokens_fetched, num_prompt - cached)
    return Life(
        prompt_tokens=num_prompt,
        max_tokens=order.params.max_tokens,
        generated=(ending.num_tokens - order.num_emitted,),
        reasons=(ending.reason,),
        phases=timeline.phases(received_s),
        ttft_s=timeline.between_s(Instant.RECEIVED, Instant.FIRST_TOKEN),
        e2e_s=timeline.between_s(Instant.RECEIVED, Instant.FINISHED) or 0.0,
        gaps_s=gaps_s,
        cached_tokens=cached,
        computed_tokens=num_prompt - cached - moved,
        asked_tokens=told.tokens_asked + told.tokens_fetched,
        moved_tokens=moved,
        transfers=tuple(told.transfers),
    )


def end_message(
    order: Order, ending: Ending, told: HandoverTotals, timeline: Timeline, spec: KvSpec
) -> worker_pb2.RequestEnd:
    """The one RequestEnd of a (request, choice, epoch). `timeline` must be that of `complete_timeline`."""
    cached = ending.event.cached_tokens or told.tokens_held
    if told.is_complete:
        cached = max(cached, told.prefill_cached_tokens)
    end = worker_pb2.RequestEnd(
        request_id=order.key.request_id,
        choice=order.key.choice,
        epoch=epoch_to_wire(order.epoch),
        reason=finish_to_wire(ending.reason),
        usage=common_pb2.Usage(
            prompt_tokens=len(order.prompt_ids) - order.num_emitted,
            completion_tokens=ending.num_tokens,
            cached_tokens=min(cached, len(order.prompt_ids) - order.num_emitted),
            draft_tokens=ending.event.draft_tokens,
            accepted_tokens=ending.event.accepted_tokens,
            proposer=ending.event.proposer,
        ),
        timeline=instants_to_wire(timeline, _received_s(timeline)),
        handover=_handover(told, spec),
        tail_text=ending.tail_text,
        shown_tokens=ending.num_shown,
    )
    if ending.reason is FinishReason.ERROR:
        end.error.CopyFrom(error_to_wire(_error_of(ending.event)))
    return end


def known_end_message(order: Order, choice: ChoiceText, now_s: float, spec: KvSpec) -> worker_pb2.RequestEnd | None:
    """The end of an order whose emitted tokens ended the choice already; None: more tokens follow.

    The worker that generated them died before it could send the end.
    """
    if choice.ended is None:
        return None
    tail = choice.flush()  # may complete a stop string, and change `ended`
    event = link.Ended(order.engine_key, choice.ended)
    timeline = Timeline()
    timeline.mark(Instant.RECEIVED, now_s)
    ending = Ending(event, choice.ended, tail, choice.num_tokens, choice.num_shown)
    return end_message(order, ending, HandoverTotals(local_reason="ended_already"), timeline, spec)


def refusal_message(message: worker_pb2.Submit, error: TwostrokeError) -> worker_pb2.RequestEnd:
    """The end of an order that never became a run."""
    return worker_pb2.RequestEnd(
        request_id=message.request_id,
        choice=message.choice,
        epoch=message.epoch,
        reason=common_pb2.FINISH_REASON_ERROR,
        error=error_to_wire(error),
        usage=common_pb2.Usage(prompt_tokens=len(message.prompt_ids)),
    )


def taken_message(key: SequenceKey, epoch: Epoch, peer: Peer | None = None) -> worker_pb2.OrderTaken:
    """Who is about to work on an order: the peer that will compute its prompt; None: this worker has taken it."""
    taken = worker_pb2.OrderTaken(request_id=key.request_id, choice=key.choice, epoch=epoch_to_wire(epoch))
    if peer is not None:
        taken.peer.worker_id, taken.peer.incarnation, taken.peer.address = (
            peer.worker_id,
            peer.incarnation,
            peer.address,
        )
    return taken


def _received_s(timeline: Timeline) -> float:
    at_s = timeline.at_s(Instant.RECEIVED)
    assert at_s is not None, "every run was received"
    return at_s


def _error_of(event: link.Ended) -> TwostrokeError:
    # Without a code the engine did not fail: the failure was here, while the text was made.
    return from_code(event.error_code, event.error_message or "this choice failed on its worker, whose log has more")


def _handover(told: HandoverTotals, spec: KvSpec) -> worker_pb2.HandoverReport:
    return worker_pb2.HandoverReport(
        prefill_worker=told.prefill_worker if told.is_complete else "",
        transport=told.transport,
        transport_reason=told.transport_reason,
        bytes_per_s=told.bytes_per_s,
        bytes_moved=told.bytes_moved,
        bytes_as_bf16=told.tokens_moved * spec.bf16_bytes_per_token,
        tokens_moved=told.tokens_moved,
        tokens_held=told.tokens_held,
        prefill_cached_tokens=told.prefill_cached_tokens,
        refetched_blocks=told.refetched_blocks,
        recomputed_tokens=told.recomputed_tokens,
        local_reason=told.local_reason,
        tokens_asked=told.tokens_asked,
        tokens_fetched=told.tokens_fetched,
        bytes_fetched=told.bytes_fetched,
        fetched_from=told.fetched_from,
        fetch_end=told.fetch_end,
        prefill_fetched_tokens=told.prefill_fetched.num_tokens,
        prefill_fetched_from=told.prefill_fetched.source,
        prefill_fetch_end=told.prefill_fetched.end,
    )
