"""Planted bugs of one worker's engine: scheduler, pool, prefix cache, swapping, and reactions to the store."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from ..engine.cache_manager import Cost, KvCacheManager
from ..engine.commands import Commands
from ..engine.lifecycle import SequenceLifecycle
from ..engine.link.messages import Event
from ..engine.scheduler import Scheduler
from ..engine.sequence import PendingFinish, SequenceState
from ..engine.sequence import Sequence as Live
from ..engine.store_ops import StoreOp, SwapInOp, SwapOp
from ..engine.swap import SwapSpace
from ..engine.turn import Turn
from ..kv import keys
from ..kv.block import BlockIdentity, chain
from ..kv.cache.prefix import PrefixCache
from ..kv.section import HeldTokens
from ..kv.store.host_store import HostStore
from .planting import Planted, guessing, instead, overpromising, swapping


def everything_is_kept_after_a_loss() -> AbstractContextManager[None]:
    """After a fall-back, tokens that never arrived count as stored; face and engine agree on the wrong number."""
    original = Commands._go_local

    def go_local(self: Commands, sequence: Live, kept_tokens: int, first_token: int | None) -> None:
        if sequence.state is SequenceState.BOUND:
            kept_tokens = sequence.num_computed = sequence.num_prompt
        original(self, sequence, kept_tokens, first_token)

    return instead(Commands, "_go_local", go_local)


def bind_is_forgotten_after_not_yet() -> AbstractContextManager[None]:
    """The engine answers NotYet and never tries to bind again."""
    original = Scheduler.try_bind

    def try_bind(self: Scheduler, sequence: Live) -> Any:
        events = original(self, sequence)
        sequence.wants_bind = False
        return events

    return instead(Scheduler, "try_bind", try_bind)


def promise_is_kept_after_cancel() -> AbstractContextManager[None]:
    """Blocks promised to a sequence stay counted after it ends."""

    def remove(self: Scheduler, sequence: Live) -> None:
        self.holdings.release(sequence)
        del self._by_state[sequence.state][sequence.key]
        del self.by_key[sequence.key]
        sequence.state = SequenceState.ENDED

    return instead(Scheduler, "remove", remove)


def prefix_is_taken_without_owning_it() -> AbstractContextManager[None]:
    """A sequence reads cached blocks without owning them: eviction may take them."""

    def acquire(self: PrefixCache, identities: Sequence[BlockIdentity]) -> Any:
        return [self._entry_by_key[self._key(identities, i)].block for i in range(self._held_blocks(identities))]

    return instead(PrefixCache, "acquire", acquire)


def prefix_is_published_before_it_is_computed() -> AbstractContextManager[None]:
    """All blocks of a prompt can be found as soon as the first is computed."""
    original = KvCacheManager.publish

    def publish(self: KvCacheManager, sequence: Live) -> None:
        computed = sequence.num_computed
        sequence.num_computed = min(sequence.num_prompt, len(sequence.blocks) * self.pool.block_tokens)
        original(self, sequence)
        sequence.num_computed = computed

    return instead(KvCacheManager, "publish", publish)


def tenants_share_prefixes() -> AbstractContextManager[None]:
    """The chain of block identities begins with an empty root instead of the tenant's."""

    def rootless(key: bytes, root: bytes, token_ids: Sequence[int], start: int = 0) -> list[BlockIdentity]:
        return chain(key, b"", token_ids, start)

    return instead(keys, "chain", rootless)


def blocks_go_in_the_middle_of_a_step() -> AbstractContextManager[None]:
    """A cancel frees blocks that the running step still writes."""
    original = SequenceLifecycle.finish

    def end(self: SequenceLifecycle, sequence: Live, doom: PendingFinish) -> None:
        if sequence.key in self.in_step:
            self.holdings.release(sequence)
            sequence.doom = sequence.doom or doom
        else:
            original(self, sequence, doom)

    return instead(SequenceLifecycle, "end", end)


def stale_generation_comes_back() -> AbstractContextManager[None]:
    """A swap-in writes into blocks under the generation of their previous use."""
    original = KvCacheManager.swap_in

    def swap_in(self: KvCacheManager, sequence: Live) -> SwapInOp | None:
        op = original(self, sequence)
        return None if op is None else replace(op, generations=tuple([g - 1 for g in op.generations]))

    return instead(KvCacheManager, "swap_in", swap_in)


def host_blocks_leak() -> AbstractContextManager[None]:
    """A sequence that ends while it is swapped out does not free its host blocks."""
    original = SwapSpace.drop

    def drop(self: SwapSpace, sequence: Live) -> None:
        if sequence.state is SequenceState.SWAPPED and not sequence.blocks:
            sequence.swapped = None
        original(self, sequence)

    return instead(SwapSpace, "drop", drop)


def blocks_are_copied_out_after_the_step() -> AbstractContextManager[None]:
    """Blocks of a preempted sequence are copied out only after their next owner has written them."""
    original = Scheduler.take_swap_ops
    late: WeakKeyDictionary[Scheduler, list[SwapOp]] = WeakKeyDictionary()

    def take_swap_ops(self: Scheduler) -> list[SwapOp]:
        now, late[self] = late.get(self, []), original(self)
        return now

    return instead(Scheduler, "take_swap_ops", take_swap_ops)


def promises_are_not_counted() -> AbstractContextManager[None]:
    """Admission counts the blocks in use, but not those promised to other sequences."""

    def has_room(self: Scheduler, cost: Cost) -> bool:
        promised, self.num_promised = self.num_promised, 0
        try:
            return original(self, cost)
        finally:
            self.num_promised = promised

    original = Scheduler._has_room
    return instead(Scheduler, "_has_room", has_room)


def everybody_is_let_in() -> AbstractContextManager[None]:
    """Admission ignores the watermark."""
    return instead(Scheduler, "_has_room", lambda self, cost: cost.from_free <= self.holdings.pool.num_free)


def evictions_are_not_told() -> AbstractContextManager[None]:
    """Evicted blocks stay in the routers' prefix maps."""
    original = PrefixCache._remove

    def remove(self: PrefixCache, entry: Any) -> None:
        note, self._note = self._note, lambda *_, **__: None  # type: ignore[method-assign]
        original(self, entry)
        self._note = note  # type: ignore[method-assign]

    return instead(PrefixCache, "_remove", remove)


def damaged_swaps_are_served() -> AbstractContextManager[None]:
    """The seals of blocks that come back from host memory are not checked."""
    original = HostStore.swap_in

    def swap_in(self: HostStore, host: HeldTokens, held: HeldTokens) -> bool:
        original(self, host, held)
        return True

    return instead(HostStore, "swap_in", swap_in)


def failed_swaps_are_served() -> AbstractContextManager[None]:
    """The engine continues with blocks that the store reports as damaged after a swap-in."""
    original = Turn._failed

    def failed(self: Turn, op: StoreOp, error: Exception | None) -> tuple[list[Event], list[Event | StoreOp]]:
        return ([], []) if isinstance(op, SwapInOp) else original(self, op, error)

    return instead(Turn, "_failed", failed)


def tails_go_out_unsealed() -> AbstractContextManager[None]:
    """Generated tokens that do not fill a hash block are copied out without a seal."""

    def swap_out(self: HostStore, held: HeldTokens, host: HeldTokens) -> None:
        self._host.write_tokens(host, self._device.read_tokens(held))

    return instead(HostStore, "swap_out", swap_out)


def rejected_drafts_keep_their_blocks() -> AbstractContextManager[None]:
    """Blocks that were taken for guessed tokens stay with the sequence when the guesses were wrong."""
    return instead(KvCacheManager, "trim", lambda self, sequence, num_tokens: None)


def one_rejected_draft_counts_as_computed() -> AbstractContextManager[None]:
    """After a wrong guess the sequence goes on one token too late: the KV there is the rejected token's."""
    original = SequenceLifecycle.accept_drafts

    def accept_drafts(self: SequenceLifecycle, sequence: Live, step: Any, token_ids: Any, doom: Any) -> Any:
        found = original(self, sequence, step, token_ids, doom)
        sequence.num_computed += len(token_ids) <= len(step.draft_ids)
        return found

    return instead(SequenceLifecycle, "accept_drafts", accept_drafts)


def drafts_are_published() -> AbstractContextManager[None]:
    """Blocks are published under the guessed tokens before the step has judged them."""
    original = SequenceLifecycle.accept_drafts

    def accept_drafts(self: SequenceLifecycle, sequence: Live, step: Any, token_ids: Any, doom: Any) -> Any:
        last = sequence.tokens.pop()
        sequence.tokens += step.draft_ids
        sequence.num_computed = step.end + len(step.draft_ids)
        self.holdings.publish(sequence)
        sequence.tokens[step.end :] = [last]
        return original(self, sequence, step, token_ids, doom)

    return instead(SequenceLifecycle, "accept_drafts", accept_drafts)


def accepted_drafts_are_not_said() -> AbstractContextManager[None]:
    """Only the first token of a step goes to the face; the engine goes on after all of them."""
    original = SequenceLifecycle.accept_drafts

    def accept_drafts(self: SequenceLifecycle, sequence: Live, step: Any, token_ids: Any, doom: Any) -> Any:
        doom, _ = original(self, sequence, step, token_ids, doom)
        return doom, token_ids[:1]

    return instead(SequenceLifecycle, "accept_drafts", accept_drafts)


BUGS = (
    Planted(everything_is_kept_after_a_loss, ("K4",), 300),
    Planted(bind_is_forgotten_after_not_yet, ("L1",), 700, overpromising),
    Planted(promise_is_kept_after_cancel, ("K2",), 100),
    Planted(promises_are_not_counted, ("K6",), 150),
    Planted(everybody_is_let_in, ("K6",), 100),
    Planted(prefix_is_taken_without_owning_it, ("K2",), 100),
    Planted(prefix_is_published_before_it_is_computed, ("K3",), 100),
    Planted(evictions_are_not_told, ("K5",), 100),
    Planted(tenants_share_prefixes, ("K4",), 550),
    Planted(blocks_go_in_the_middle_of_a_step, ("K2",), 150),
    Planted(stale_generation_comes_back, ("K3",), 100, swapping),
    Planted(host_blocks_leak, ("K2",), 400, swapping),
    Planted(damaged_swaps_are_served, ("K4",), 150, swapping),
    Planted(failed_swaps_are_served, ("K4",), 150, swapping),
    Planted(tails_go_out_unsealed, ("K4",), 100, swapping),
    Planted(blocks_are_copied_out_after_the_step, ("K3", "K4"), 100, swapping),
    Planted(rejected_drafts_keep_their_blocks, ("K2",), 150, guessing),
    Planted(one_rejected_draft_counts_as_computed, ("K2", "K4"), 100, guessing),
    Planted(drafts_are_published, ("K2", "K3", "K4"), 100, guessing),
    Planted(accepted_drafts_are_not_said, ("L1", "R1"), 150, guessing),
)
