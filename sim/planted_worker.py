"""Planted bugs between a worker and its routers: sessions, epochs, messages, and streams that go on elsewhere."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from ..core.request import Epoch, SamplingParams, SequenceKey
from ..decode_worker import fetch, report, task
from ..decode_worker.choice import ChoiceText
from ..decode_worker.ledger import Ledger, Named, RouterKey, Standing
from ..decode_worker.order import Order
from ..decode_worker.outbox import Outbox
from ..decode_worker.report import end_message
from ..engine.link.messages import CacheDelta, CacheSnapshot
from ..kv.handover.fetching import BlockFetch
from ..kv.handover.machine import Action
from ..protos import worker_pb2
from ..router.requests import orders
from ..router.requests.orders import Orders
from ..router.requests.state import RequestState
from ..router.workers.wire import submit_to_wire
from ..text.stream import TextStream
from ..worker.watch import Watcher
from .planting import (
    Planted,
    both,
    damaging_departures,
    departing_decoders,
    instead,
    losing_decoders,
    losing_routers,
)


def stale_orders_run() -> AbstractContextManager[None]:
    """An order of an older dispatch replaces the newer run."""
    original = Ledger.standing

    def standing(self: Ledger[Any, Any], router: RouterKey, key: SequenceKey, epoch: Epoch) -> Standing:
        found = original(self, router, key, epoch)
        return Standing.NEW if found is Standing.STALE else found

    return instead(Ledger, "standing", standing)


def stale_cancels_kill() -> AbstractContextManager[None]:
    """A cancel of an older dispatch ends the newer run."""
    original = Ledger.named

    def named(self: Ledger[Any, Any], router: RouterKey, request_id: str, epoch: Epoch) -> Named[Any]:
        return original(self, router, request_id, Epoch(epoch.incarnation + 1, 0))

    return instead(Ledger, "named", named)


def one_orphan_survives() -> AbstractContextManager[None]:
    """The first run of a lost session is not cancelled when its grace is over."""
    original = Ledger.lose

    def lose(self: Ledger[Any, Any], session: Any) -> tuple[Any, ...]:
        return original(self, session)[1:]

    return instead(Ledger, "lose", lose)


def ends_are_forgotten() -> AbstractContextManager[None]:
    """A late copy of an order is run again after its run has ended."""
    return instead(Ledger, "_remember", lambda *_: None)


def removals_are_not_told() -> AbstractContextManager[None]:
    """A watching router is told of new blocks only, not of evicted ones."""
    original = Watcher.hear_cache

    def hear_cache(self: Watcher, event: CacheDelta | CacheSnapshot) -> None:
        original(self, replace(event, removed=()) if isinstance(event, CacheDelta) else event)

    return instead(Watcher, "hear_cache", hear_cache)


def ends_overtake_tokens() -> AbstractContextManager[None]:
    """When a message is full, a choice's end leaves before its last tokens."""
    original = Outbox.take

    def take(self: Outbox) -> worker_pb2.StepOutput | None:
        output = original(self)
        if output is not None:
            output.ends.extend(self._ends)
            self._ends = []
        return output

    return instead(Outbox, "take", take)


# ------------------------------------------------------------------ streams that go on at another worker


def _ordering(change: Any) -> AbstractContextManager[None]:
    def submit(*given: Any, **named: Any) -> worker_pb2.Submit:
        return change(submit_to_wire(*given, **named))  # type: ignore[no-any-return]

    return instead(orders, "submit_to_wire", submit)


def last_token_is_forgotten() -> AbstractContextManager[None]:
    """The last token that the client has is not in the prompt of the next dispatch."""

    def change(order: worker_pb2.Submit) -> worker_pb2.Submit:
        if order.emitted_tokens:
            del order.prompt_ids[-1]
            order.emitted_tokens -= 1
        return order

    return _ordering(change)


def last_token_is_doubled() -> AbstractContextManager[None]:
    """The last token that the client has is twice in the prompt of the next dispatch."""

    def change(order: worker_pb2.Submit) -> worker_pb2.Submit:
        if order.emitted_tokens:
            order.prompt_ids.append(order.prompt_ids[-1])
        return order

    return _ordering(change)


def emitted_tokens_are_prompt() -> AbstractContextManager[None]:
    """The worker is not told how many ids of its prompt were generated: it begins to count anew."""

    def change(order: worker_pb2.Submit) -> worker_pb2.Submit:
        order.emitted_tokens = 0
        return order

    return _ordering(change)


def first_choice_stands_for_all() -> AbstractContextManager[None]:
    """Every choice goes on after the tokens of the first one."""
    original = RequestState.dispatched

    def dispatched(self: RequestState, dispatch: Any) -> tuple[int, ...]:
        found = original(self, dispatch)
        ids_of, leading = self.delivery.ids_of, self.leading
        self.delivery.ids_of = lambda choice: ids_of(leading)  # type: ignore[method-assign]
        return found

    return instead(RequestState, "dispatched", dispatched)


def old_epoch_is_used() -> AbstractContextManager[None]:
    """A request that is ordered again keeps its epoch."""
    original = Orders._next_epoch

    def next_epoch(self: Orders, run: RequestState) -> Epoch:
        return run.dispatches[0].epoch if run.dispatches else original(self, run)

    return instead(Orders, "_next_epoch", next_epoch)


def usage_counts_again() -> AbstractContextManager[None]:
    """The tokens of earlier dispatches are billed twice."""

    def end_twice(order: Order, *given: Any) -> worker_pb2.RequestEnd:
        end = end_message(order, *given)
        end.usage.completion_tokens += order.num_emitted
        return end

    return both(instead(task, "end_message", end_twice), instead(report, "end_message", end_twice))


def withheld_text_is_lost() -> AbstractContextManager[None]:
    """The text of a resumed choice begins empty: what the first worker withheld is lost."""

    def begin(
        self: ChoiceText, text: TextStream, params: SamplingParams, eos_ids: Collection[int], emitted_ids: Sequence[int]
    ) -> None:
        self._text, self._params, self._eos_ids = text, params, eos_ids
        self.num_tokens, self.ended = len(emitted_ids), None

    return instead(ChoiceText, "_begin", begin)


def text_is_said_again() -> AbstractContextManager[None]:
    """The text that the client has comes once more with the first token of the next worker."""
    push, begin = ChoiceText.push, ChoiceText._begin

    def begun(self: ChoiceText, *given: Any) -> None:
        self.again = ""  # type: ignore[attr-defined]
        begin(self, *given)
        self.begun = True  # type: ignore[attr-defined]

    def pushed(self: ChoiceText, *given: Any) -> Any:
        delta = push(self, *given)
        if not hasattr(self, "begun"):
            self.again = delta.text  # type: ignore[attr-defined]
            return delta
        text, self.again = self.again + delta.text, ""  # type: ignore[attr-defined]
        return delta._replace(text=text)

    return both(instead(ChoiceText, "_begin", begun), instead(ChoiceText, "push", pushed))


def fetched_blocks_are_not_checked() -> AbstractContextManager[None]:
    """Blocks of another worker are stored without a look at their digests."""
    return instead(fetch, "verify_frame", lambda *_: True)


def last_fetched_block_is_not_heard() -> AbstractContextManager[None]:
    """A fetch does not notice that its last frame is stored, so its request waits for nothing."""
    original = BlockFetch.written

    def written(self: BlockFetch, token_start: int, token_count: int) -> list[Action]:
        return [] if self.end is not None else original(self, token_start, token_count)

    return instead(BlockFetch, "written", written)


BUGS = (
    Planted(stale_orders_run, ("R6",), 100),
    Planted(stale_cancels_kill, ("R6",), 100),
    Planted(one_orphan_survives, ("R7",), 100, losing_routers),
    Planted(ends_are_forgotten, ("R6",), 100),
    Planted(removals_are_not_told, ("K5",), 100),
    Planted(ends_overtake_tokens, ("R1",), 450),
    Planted(last_token_is_forgotten, ("L1", "R3"), 100, losing_decoders),
    Planted(last_token_is_doubled, ("L1", "R3", "R4"), 100, losing_decoders),
    Planted(emitted_tokens_are_prompt, ("L1", "R3", "R4", "R5"), 100, losing_decoders),
    Planted(first_choice_stands_for_all, ("L1", "R3", "R4"), 400, losing_decoders),
    Planted(old_epoch_is_used, ("L1", "R6", "R7", "crash"), 100, losing_decoders),
    Planted(usage_counts_again, ("R5", "L1"), 100, losing_decoders),
    Planted(withheld_text_is_lost, ("R4",), 400, losing_decoders),
    Planted(text_is_said_again, ("R4",), 100, losing_decoders),
    Planted(fetched_blocks_are_not_checked, ("K4",), 100, damaging_departures),
    Planted(last_fetched_block_is_not_heard, ("L1", "R7"), 100, departing_decoders),
)
