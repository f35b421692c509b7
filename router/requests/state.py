"""State of one request under way: its dispatches, its results, and the pieces that the client has not fetched. Pure.

Knows no network and no event loop: `on_news` tells the owner of the client's stream that a piece can be fetched.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from ...core.errors import Overloaded, TokensLost, TwostrokeError, WorkerLost
from ...core.life import Transfer
from ...core.request import FinishReason, Request
from ...core.timeline import Instant, Timeline
from ...kv.block import BlockIdentity
from ...kv.messages import adopt_instants, epoch_from_wire, error_from_wire, finish_from_wire, logprobs_from_wire
from ...protos import worker_pb2
from ..routing.candidates import RequestFacts
from ..routing.facts import ModelFacts, WorkerKey
from ..routing.views import RETRY_AFTER_S
from ..workers.wire import transfer_of
from .attempts import Dispatch, Left
from .delivery import Delivery, DeliveryVerdict, PieceBuffer
from .pieces import OutputDelta, TokenUsage
from .suspects import Suspicion


class Stage(Enum):
    """Stage of a request."""

    ROUTING = "routing"  # no worker computes it; a worker is being chosen
    DISPATCHED = "dispatched"  # one worker computes it, under the epoch of its last dispatch
    SETTLED = "settled"  # no more output of workers is expected


class Timer(Protocol):
    """A scheduled call."""

    def cancel(self) -> None:
        """Do not make the call. No effect after it was made."""
        ...


class RequestState:
    """The state of one request, from admission until its stream is closed."""

    def __init__(self, name: str, request: Request, timeline: Timeline, model: ModelFacts, max_pieces: int) -> None:
        """`name`: its key inside the cluster, unique over tenants, routers and time; clients know `request_id`."""
        self.name = name
        self.request = request
        self.timeline = timeline
        self.model = model
        self.delivery = Delivery(request.num_choices)
        self.dispatches: list[Dispatch] = []
        self._failed_by: dict[WorkerKey, Left] = {}
        self.suspicion: Suspicion | None = None  # a worker was lost with it
        self.stage = Stage.ROUTING
        self.waits_since_s = 0.0  # while ROUTING: begin of the wait for a worker
        self.cause: TwostrokeError | None = None  # reason of the last retry
        self.error: TwostrokeError | None = None
        self.on_news: Callable[[], None] = lambda: None  # a piece can be fetched, or the stream is over
        self.identities: Sequence[BlockIdentity] | None = None  # of its prompt and the tokens since; None: unknown
        self.token_gaps_s = array("d")
        self.first_token_s: float | None = None
        self.handovers: list[tuple[int, dict[str, Any]]] = []
        self.transfers: list[Transfer] = []
        self.deadline: Timer | None = None
        self.first_choice: int | None = None  # choice with the first token; its instants count for the request
        self.predicted = (0.0, 0.0)  # ms to the first token, and per later one, of its first dispatch
        self._last_token_s: dict[int, float] = {}
        self._cached: dict[int, int] = {}
        self.proposers: set[str] = set()  # what guessed, of all dispatches: names of their methods
        self._guesses = (0, 0)  # tokens guessed by speculative decoding, and those that were right
        self._buffer = PieceBuffer(max_pieces)

    @property
    def request_id(self) -> str:
        """The client's id. Not a key inside the cluster, because other tenants may use the same."""
        return self.request.request_id

    @property
    def current(self) -> Dispatch | None:
        """The last dispatch, also when it is over."""
        return self.dispatches[-1] if self.dispatches else None

    @property
    def living(self) -> Dispatch | None:
        """The dispatch whose worker computes the request now; None while it is routed, and after it is settled."""
        return self.dispatches[-1] if self.stage is Stage.DISPATCHED else None

    @property
    def has_output(self) -> bool:
        """True if its client has a token: another worker must go on after it."""
        return self.delivery.completion_tokens > 0

    @property
    def num_tries(self) -> int:
        """Number of dispatches, but for those to workers that were full, or had another suspect, and began nothing.

        Those that workers gave back because they drain do not count either: each worker drains once.
        """
        return sum(1 for one in self.dispatches if not (one.was_drained or (one.was_refused and one.may_be_refused)))

    def exclude(self, worker: WorkerKey, error: TwostrokeError, now_s: float) -> None:
        """A worker failed it: it is not chosen for it soon, or not at all (see `next_ask_s`)."""
        self._failed_by[worker] = Left(now_s, error)

    def excludes(self, worker: WorkerKey, now_s: float) -> bool:
        """True if a worker that failed it is not to be asked again now."""
        failed = self._failed_by.get(worker)
        return failed is not None and now_s < self._asks_again_s(failed)

    def next_ask_s(self, now_s: float) -> float:
        """When the next of the workers that failed it may be asked again; infinity: none."""
        return min(
            (at_s for at_s in map(self._asks_again_s, self._failed_by.values()) if at_s > now_s), default=math.inf
        )

    def _asks_again_s(self, failed: Left) -> float:
        """A stream that has begun asks all again; a new request only those that were full."""
        may_ask = self.has_output or isinstance(failed.error, Overloaded)
        return failed.at_s + RETRY_AFTER_S if may_ask else math.inf

    @property
    def leading(self) -> int:
        """The unfinished choice that stands for the others where workers are chosen."""
        return self.delivery.unfinished[0]

    def ids_of(self, choice: int) -> tuple[int, ...]:
        """The prompt and the tokens that the client has of a choice: the prompt of its next dispatch."""
        return self.request.prompt_ids + self.delivery.ids_of(choice)

    @property
    def facts(self) -> RequestFacts:
        """Facts for the choice of workers: what is left to do."""
        request, had = self.request, self.delivery.tokens_of(self.leading)
        expected = max(1, request.expected_tokens - had)
        is_resumed = bool(self.dispatches or self.has_output)
        num_tokens, num_choices = len(request.prompt_ids) + had, len(self.delivery.unfinished)
        return RequestFacts(self.name, num_tokens, expected, num_choices, is_resumed)

    def dispatched(self, dispatch: Dispatch) -> tuple[int, ...]:
        """Begin a dispatch; returns the choices to order: those that have not ended."""
        assert self.stage is Stage.ROUTING
        self.stage = Stage.DISPATCHED
        self.dispatches.append(dispatch)
        self.timeline.mark(Instant.ROUTED, dispatch.at_s)
        dispatch.is_suspect = self.suspicion is not None
        dispatch.resumed = tuple(map(self.delivery.tokens_of, range(self.request.num_choices)))
        return self.delivery.dispatch(dispatch.epoch)

    def recall(self, error: TwostrokeError, now_s: float, *, drains: bool = False) -> None:
        """Take the request back from its worker: later messages of the last dispatch are stale."""
        assert self.living is not None
        self.living.left = Left(now_s, error, drains)
        self.stage = Stage.ROUTING
        self.delivery.recall()
        if self.has_output:
            self.identities = None  # of a longer chain now
            if self.first_token_s is not None:  # its worker's own time of it may never come
                self.timeline.mark(Instant.FIRST_TOKEN, self.first_token_s)

    @property
    def usage(self) -> TokenUsage:
        """Billed tokens: the prompt once, every delivered token; cached tokens are the least over all choices."""
        cached = min(self._cached.values(), default=0)
        drafted, accepted = self._guesses
        return TokenUsage(len(self.request.prompt_ids), self.delivery.completion_tokens, cached, drafted, accepted)

    @property
    def finish_reasons(self) -> tuple[FinishReason, ...]:
        """Finish reasons of the choices that have ended."""
        return tuple(reason for reason in self.delivery.finish_reasons if reason is not None)

    def left_s(self, now_s: float) -> float:
        """Remaining time until its deadline, in seconds."""
        return self.arrived_s + self.request.timeout_s - now_s

    @property
    def arrived_s(self) -> float:
        """Arrival time, from which all its durations count."""
        arrived = self.timeline.at_s(Instant.ARRIVED)
        assert arrived is not None
        return arrived

    # ------------------------------------------------------------------ from the worker

    def order_taken(self, taken: worker_pb2.OrderTaken) -> bool:
        """Somebody is about to work on it. False: on an older dispatch of it."""
        living = self.living
        if living is None or living.epoch != epoch_from_wire(taken.epoch):
            return False
        if taken.HasField("peer"):
            living.prefill = WorkerKey(taken.peer.worker_id, taken.peer.incarnation)
        else:
            living.is_taken = True
        return True

    def take_tokens(self, output: worker_pb2.TokenOutput, now_s: float) -> DeliveryVerdict:
        """Add tokens to the stream if they are the next ones of the current epoch."""
        epoch = epoch_from_wire(output.epoch)
        verdict = self.delivery.tokens(output.choice, epoch, output.first_index, output.token_ids)
        if verdict is DeliveryVerdict.TAKE:
            self._note_pace(output.choice, len(output.token_ids), now_s)
            piece = OutputDelta(
                output.choice,
                output.first_index,
                tuple(output.token_ids),
                output.text,
                logprobs=logprobs_from_wire(output.logprobs),
                prompt_scores=tuple(output.prompt_logprobs),
                num_shown=output.shown_tokens,
            )
            self._put(piece, now_s)
        return verdict

    def take_end(self, end: worker_pb2.RequestEnd, now_s: float) -> DeliveryVerdict | TwostrokeError:
        """Add a choice's end to the stream. Returns an error if the worker failed; no end is added then."""
        reason = finish_from_wire(end.reason)
        epoch = epoch_from_wire(end.epoch)
        if reason in (None, FinishReason.ERROR, FinishReason.CANCELLED):
            if not self.delivery.is_awaited(end.choice, epoch):
                return DeliveryVerdict.STALE_EPOCH
            self._note_report(end)
            return _failure(end)
        if self.delivery.is_awaited(end.choice, epoch):
            missing = end.usage.completion_tokens - self.delivery.tokens_of(end.choice)
            if missing > 0:
                return TokensLost(f"the last {missing} tokens never came", retry_after_s=1.0)
        verdict = self.delivery.end(end.choice, epoch, reason)
        if verdict is not DeliveryVerdict.TAKE:
            return verdict
        self._cached[end.choice] = end.usage.cached_tokens
        self._note_report(end)
        first_index = self.delivery.tokens_of(end.choice)
        usage = None if self.delivery.unfinished else self.usage
        last = OutputDelta(end.choice, first_index, (), end.tail_text, reason, usage, num_shown=end.shown_tokens)
        self._put(last, now_s)
        return verdict

    def _note_pace(self, choice: int, count: int, now_s: float) -> None:
        if self.first_token_s is None:
            self.first_token_s, self.first_choice = now_s, choice
        current = self.current
        if current is not None and current.first_token_s is None:
            current.first_token_s = now_s
        last_s = self._last_token_s.get(choice)
        if last_s is not None and count:
            self.token_gaps_s.extend([(now_s - last_s) / count] * count)
        self._last_token_s[choice] = now_s

    def _note_report(self, end: worker_pb2.RequestEnd) -> None:
        current = self.current
        assert current is not None
        adopt_instants(current.timeline, end.timeline, current.at_s)
        last_s = current.timeline.at_s(Instant.LAST_TOKEN)
        if self.first_choice in (None, end.choice) and not current.is_resumed:
            adopt_instants(self.timeline, end.timeline, current.at_s)
        elif self.first_choice == end.choice and last_s is not None:
            self.timeline.mark(Instant.LAST_TOKEN, last_s)  # the others happened on an earlier worker
        report = {field.name: getattr(end.handover, field.name) for field in end.handover.DESCRIPTOR.fields}
        self.handovers.append((end.choice, report))
        if end.handover.tokens_fetched:
            source = end.handover.fetched_from
            current.fetched[source] = current.fetched.get(source, 0) + end.handover.tokens_fetched
        drafted, accepted = self._guesses
        self._guesses = drafted + end.usage.draft_tokens, accepted + end.usage.accepted_tokens
        if end.usage.proposer:
            self.proposers.add(end.usage.proposer)
        transfer = transfer_of(end)
        if transfer is not None:
            self.transfers.append(transfer)

    # ------------------------------------------------------------------ to the client

    def _put(self, piece: OutputDelta, now_s: float) -> None:
        self._buffer.put(piece, now_s)

    def fail(self, error: TwostrokeError) -> None:
        """End the stream with this error, after the buffered pieces. Only the first error counts."""
        if self.error is None:
            self.error = error

    def is_slow(self, now_s: float, patience_s: float) -> bool:
        """True if the client has left its buffer full for more than `patience_s`."""
        since_s = self._buffer.full_since_s
        return since_s is not None and now_s - since_s > patience_s

    def take_piece(self) -> OutputDelta | None:
        """The next piece for the client; None: there is none now."""
        return self._buffer.take()

    @property
    def is_over(self) -> bool:
        """True if no piece will be added: every choice has ended, or the request failed."""
        return self.error is not None or not self.delivery.unfinished


def _failure(end: worker_pb2.RequestEnd) -> TwostrokeError:
    if end.HasField("error"):
        return error_from_wire(end.error)
    return WorkerLost("the worker was stopped before the request had ended", retry_after_s=1.0)


@dataclass(slots=True)
class RequestStates:
    """Requests that are not settled, by name, and those with an open stream, by tenant and client's id."""

    active: dict[str, RequestState] = field(default_factory=dict)
    open: dict[tuple[str, str], RequestState] = field(default_factory=dict)

    def find(self, tenant: str, request_id: str) -> RequestState | None:
        """A tenant's request with an open stream, or None. Ids are separate for each tenant."""
        return self.open.get((tenant, request_id))

    def on(self, key: WorkerKey) -> list[RequestState]:
        """Active requests that this worker computes."""
        return [run for run in self.active.values() if run.living is not None and run.living.decode == key]
