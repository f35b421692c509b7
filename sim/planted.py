"""Bugs that were put in on purpose, and within how many seeds each must be found. What the simulator is measured with.

Each is one small change of a production machine, as somebody could make it by accident; the last one was real. The
bound is about four times the number of seeds that finding it took, counted from the first seed of campaign 0.

| bug                                       | breaks | found after | bound |
|-------------------------------------------|--------|-------------|-------|
| digests_are_not_checked                   | K4     |           8 |   100 |
| duplicates_are_accepted                   | L1     |          21 |   100 |
| refetch_is_ignored                        | L1     |          65 |   300 |
| slot_of_a_damaged_frame_is_kept           | L1     |          65 |   300 |
| silence_is_ignored                        | R7     |          16 |    60 |
| first_token_is_sampled_again              | R3     |          42 |   200 |
| everything_is_kept_after_a_loss           | K4     |           3 |    50 |
| bind_is_forgotten_after_not_yet           | L1     |          66 |   300 |
| promise_is_kept_after_cancel              | K2     |           4 |    50 |
| prefix_is_taken_without_owning_it         | K2     |           2 |    50 |
| prefix_is_published_before_it_is_computed | K3     |           3 |    50 |
| tenants_share_prefixes                    | K4     |           7 |    50 |
| blocks_go_in_the_middle_of_a_step         | K2     |           3 |    50 |
| stale_generation_comes_back               | K3     |          40 |   200 |
| host_blocks_leak                          | K2     |         127 |   500 |
| damaged_swaps_are_served                  | K4     |         112 |   500 |
| blocks_are_copied_out_after_the_step      | K3     |          54 |   300 |
| old_epochs_are_heard                      | R6     |           7 |   300 |
| gaps_are_closed                           | R2     |           2 |    50 |
| epochs_begin_anew_with_each_request       | L1     |          45 |   200 |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from ..core.request import Epoch
from ..decode_worker.run import Run as DecodeRun
from ..kv import keys
from ..kv.block import BlockIdentity, chain
from ..kv.handover import Action, Label, Lost, Stream, Verdict
from ..kv.handover_receiver import FrameArrived, Receiver
from ..kv.handover_sender import Sender
from ..kv.prefix import PrefixCache
from ..model.commands import Commands
from ..model.holdings import Holdings
from ..model.lives import Lives
from ..model.schedule import Scheduler
from ..model.sequence import Doom, SequenceState
from ..model.sequence import Sequence as Live
from ..model.store_op import SwapInOp, SwapOp
from ..model.swap import SwapSpace
from ..router import delivery
from ..router.lifecycle import Lifecycle
from ..router.run import Run as RouterRun
from . import handovers, store


@dataclass(frozen=True, slots=True)
class Planted:
    """One bug and its bound."""

    plant: Callable[[], AbstractContextManager[None]]
    breaks: tuple[str, ...]  # invariants, whichever is seen first
    max_seeds: int

    @property
    def name(self) -> str:
        """The function's."""
        return self.plant.__name__


@contextmanager
def _instead(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    """The attribute is another one for a while."""
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)


# ------------------------------------------------------------------ the hand-over


def digests_are_not_checked() -> AbstractContextManager[None]:
    """Decode takes every frame for intact."""
    return _instead(handovers, "digests_hold", lambda *_: True)


def duplicates_are_accepted() -> AbstractContextManager[None]:
    """What was seen before is taken again."""
    original = Stream.admit

    def admit(self: Stream, label: Label, sequence: int, now_s: float) -> Verdict:
        verdict = original(self, label, sequence, now_s)
        return Verdict.ACCEPT if verdict is Verdict.DROP else verdict

    return _instead(Stream, "admit", admit)


def refetch_is_ignored() -> AbstractContextManager[None]:
    """Prefill does not send a damaged range again."""
    return _instead(Sender, "_refetch", lambda self, wanted, now_s: [])


def slot_of_a_damaged_frame_is_kept() -> AbstractContextManager[None]:
    """Decode asks again and forgets to free the slot."""
    original = Receiver._refetch

    def refetch(self: Receiver, frame: FrameArrived, units: range, now_s: float) -> list[Action]:
        actions = original(self, frame, units, now_s)
        if not any(isinstance(action, Lost) for action in actions):
            self._stream._sent -= 1  # the number of the word that is swallowed
            actions.pop()
        return actions

    return _instead(Receiver, "_refetch", refetch)


def silence_is_ignored() -> AbstractContextManager[None]:
    """A peer that says nothing is waited for until the deadline."""
    original = Sender._abort

    def abort(self: Sender, reason: Any, now_s: float, *rest: Any) -> list[Action]:
        actions = original(self, reason, now_s, *rest)
        return [a for a in actions if type(a).__name__ != "Abort"] if reason in ("silent", "closed") else actions

    return _instead(Sender, "_abort", abort)


def first_token_is_sampled_again() -> AbstractContextManager[None]:
    """After a fall-back, the first token that the client has is forgotten, and another one sampled."""
    original = DecodeRun.pull_lost

    def pull_lost(self: DecodeRun, lost: Lost) -> None:
        original(self, Lost(lost.reason, lost.stored_upto, None, lost.detail, lost.error_code, lost.error_message))

    return _instead(DecodeRun, "pull_lost", pull_lost)


def everything_is_kept_after_a_loss() -> AbstractContextManager[None]:
    """After a fall-back, tokens count as stored that never came: face and engine agree on the wrong number."""
    original = Commands._go_local

    def go_local(self: Commands, sequence: Live, kept_tokens: int, first_token: int | None) -> None:
        if sequence.state is SequenceState.BOUND:
            kept_tokens = sequence.num_computed = sequence.num_prompt
        original(self, sequence, kept_tokens, first_token)

    return _instead(Commands, "_go_local", go_local)


# ------------------------------------------------------------------ the engine


def bind_is_forgotten_after_not_yet() -> AbstractContextManager[None]:
    """The engine says NotYet and never tries again."""
    original = Scheduler.try_bind

    def try_bind(self: Scheduler, sequence: Live) -> Any:
        events = original(self, sequence)
        sequence.wants_bind = False
        return events

    return _instead(Scheduler, "try_bind", try_bind)


def promise_is_kept_after_cancel() -> AbstractContextManager[None]:
    """Room promised to a sequence that ends stays counted."""

    def remove(self: Scheduler, sequence: Live) -> None:
        self.holdings.release(sequence)
        del self._by_state[sequence.state][sequence.key]
        del self.by_key[sequence.key]
        sequence.state = SequenceState.ENDED

    return _instead(Scheduler, "remove", remove)


def prefix_is_taken_without_owning_it() -> AbstractContextManager[None]:
    """Cached blocks are read by somebody who does not own them: eviction may take them away."""

    def acquire(self: PrefixCache, identities: Sequence[BlockIdentity]) -> Any:
        return [self._entry_by_key[self._key(identities, i)].block for i in range(self._held_blocks(identities))]

    return _instead(PrefixCache, "acquire", acquire)


def prefix_is_published_before_it_is_computed() -> AbstractContextManager[None]:
    """A sequence's blocks are findable as soon as the first of them is computed."""
    original = Holdings.publish

    def publish(self: Holdings, sequence: Live) -> None:
        computed = sequence.num_computed
        sequence.num_computed = min(sequence.num_prompt, len(sequence.blocks) * self.pool.block_tokens)
        original(self, sequence)
        sequence.num_computed = computed

    return _instead(Holdings, "publish", publish)


def tenants_share_prefixes() -> AbstractContextManager[None]:
    """The chain begins with nothing instead of the tenant's root."""

    def rootless(key: bytes, root: bytes, token_ids: Sequence[int], start: int = 0) -> list[BlockIdentity]:
        return chain(key, b"", token_ids, start)

    return _instead(keys, "chain", rootless)


def blocks_go_in_the_middle_of_a_step() -> AbstractContextManager[None]:
    """A cancel frees the blocks that the running step writes."""
    original = Lives.finish

    def end(self: Lives, sequence: Live, doom: Doom) -> None:
        if sequence.key in self.in_step:
            self.holdings.release(sequence)
            sequence.doom = sequence.doom or doom
        else:
            original(self, sequence, doom)

    return _instead(Lives, "end", end)


# ------------------------------------------------------------------ swapping


def stale_generation_comes_back() -> AbstractContextManager[None]:
    """What is copied back goes into the blocks under the generation of their last use."""
    original = Holdings.swap_in

    def swap_in(self: Holdings, sequence: Live) -> SwapInOp | None:
        op = original(self, sequence)
        return None if op is None else replace(op, generations=tuple([g - 1 for g in op.generations]))

    return _instead(Holdings, "swap_in", swap_in)


def host_blocks_leak() -> AbstractContextManager[None]:
    """Whoever ends while swapped leaves its host blocks behind."""
    original = SwapSpace.drop

    def drop(self: SwapSpace, sequence: Live) -> None:
        if sequence.state is SequenceState.SWAPPED and not sequence.blocks:
            sequence.swapped = None
        original(self, sequence)

    return _instead(SwapSpace, "drop", drop)


def damaged_swaps_are_served() -> AbstractContextManager[None]:
    """Nobody looks at the digests of what comes back from host memory."""
    return _instead(store, "swap_holds", lambda _: True)


def blocks_are_copied_out_after_the_step() -> AbstractContextManager[None]:
    """A preempted sequence's blocks are copied when their next owner has written them."""
    original = Scheduler.take_swap_ops
    late: WeakKeyDictionary[Scheduler, list[SwapOp]] = WeakKeyDictionary()

    def take_swap_ops(self: Scheduler) -> list[SwapOp]:
        now, late[self] = late.get(self, []), original(self)
        return now

    return _instead(Scheduler, "take_swap_ops", take_swap_ops)


# ------------------------------------------------------------------ streams and epochs


def old_epochs_are_heard() -> AbstractContextManager[None]:
    """The router takes tokens of any dispatch of a request."""

    def standing(self: delivery.Delivery, choice: int, epoch: Epoch) -> delivery.Verdict:
        is_running = choice < len(self._choices) and self._choices[choice].finish is None
        return delivery.Verdict.TAKE if is_running else delivery.Verdict.AFTER_END

    return _instead(delivery.Delivery, "_standing", standing)


def gaps_are_closed() -> AbstractContextManager[None]:
    """The router takes tokens that do not follow."""

    def tokens(self: delivery.Delivery, choice: int, epoch: Epoch, first_index: int, count: int) -> delivery.Verdict:
        verdict = self._standing(choice, epoch)
        if verdict is delivery.Verdict.TAKE:
            self._choices[choice].next_index = first_index + count
        return verdict

    return _instead(delivery.Delivery, "tokens", tokens)


def epochs_begin_anew_with_each_request() -> AbstractContextManager[None]:
    """Was real: an id that comes again is dispatched under an epoch that its worker has seen."""

    def next_epoch(self: Lifecycle, run: RouterRun) -> Epoch:
        return Epoch(self._incarnation, len(run.dispatches) + 1)

    return _instead(Lifecycle, "_next_epoch", next_epoch)


PLANTED = (
    Planted(digests_are_not_checked, ("K4",), 100),
    Planted(duplicates_are_accepted, ("L1",), 100),
    Planted(refetch_is_ignored, ("L1",), 300),
    Planted(slot_of_a_damaged_frame_is_kept, ("L1",), 300),
    Planted(silence_is_ignored, ("R7",), 60),
    Planted(first_token_is_sampled_again, ("R3",), 200),
    Planted(everything_is_kept_after_a_loss, ("K4",), 50),
    Planted(bind_is_forgotten_after_not_yet, ("L1",), 300),
    Planted(promise_is_kept_after_cancel, ("K2",), 50),
    Planted(prefix_is_taken_without_owning_it, ("K2",), 50),
    Planted(prefix_is_published_before_it_is_computed, ("K3",), 50),
    Planted(tenants_share_prefixes, ("K4",), 50),
    Planted(blocks_go_in_the_middle_of_a_step, ("K2",), 50),
    Planted(stale_generation_comes_back, ("K3",), 200),
    Planted(host_blocks_leak, ("K2",), 500),
    Planted(damaged_swaps_are_served, ("K4",), 500),
    Planted(blocks_are_copied_out_after_the_step, ("K3", "K4"), 300),
    Planted(old_epochs_are_heard, ("R6",), 300),
    Planted(gaps_are_closed, ("R2",), 50),
    Planted(epochs_begin_anew_with_each_request, ("L1",), 200),
)
