"""Effect of each command of the face on a sequence. Pure; knows no step, no clock.

A handler returns False if the command does not fit the sequence's state; the state is unchanged then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..core.errors import ContextLengthExceeded, DeadlineExceeded, InternalError, InvalidRequest, Overloaded
from ..core.request import FinishReason
from ..kv.block import BlockId
from ..kv.spec import HASH_BLOCK_TOKENS
from ..kv.windows import furthest_start, lacks_windows
from .lifecycle import SequenceLifecycle
from .link.messages import (
    Bind,
    BlocksFetched,
    CancelSequence,
    FetchBlocks,
    KvComplete,
    KvRead,
    PeerBound,
    PeerNotYet,
    PrefillLocally,
    Reading,
    ReadKv,
    Release,
    Source,
    Submit,
    WriteKv,
)
from .policy import Queue
from .sequence import QUEUE_STATES, PendingFinish, Sequence, SequenceState, new_sequence
from .store_ops import FetchOp, ReadOp, WriteOp

_S = SequenceState
_READABLE = (_S.PREFILLING, _S.HELD, _S.DECODING)


SequenceCommand = CancelSequence | Bind | WriteKv | KvComplete | PrefillLocally | PeerBound | PeerNotYet | Release


class Commands:
    """Applies commands to the sequences; answers go to the outbox."""

    def __init__(self, lives: SequenceLifecycle, max_model_len: int | None) -> None:
        self._lives = lives
        self._max_model_len = max_model_len
        self._num_arrivals = 0
        self._handlers: dict[type[Any], Callable[[Any, Sequence], bool]] = {
            CancelSequence: self._cancel,
            Bind: self._bind,
            WriteKv: self._write,
            KvComplete: self._complete,
            PrefillLocally: self._prefill_locally,
            PeerBound: self._peer_bound,
            PeerNotYet: self._peer_not_yet,
            Release: self._release,
        }

    def change(self, command: SequenceCommand) -> None:
        """Apply a command that names one sequence and changes it."""
        sequence = self._lives.get(command.key)
        if sequence is None:
            self._lives.counters["command_for_unknown_sequence"] += 1
        elif not self._handlers[type(command)](command, sequence):
            self._lives.counters["command_in_wrong_state"] += 1

    def submit(self, submit: Submit, now_s: float, *, stopped: bool) -> None:
        """Add a new sequence, or answer with the reason of its refusal."""
        if submit.key in self._lives.scheduler.by_key:
            self._lives.counters["duplicate_submit"] += 1
            return
        self._lives.counters["submitted"] += 1
        doom = self._refusal(submit, now_s, stopped=stopped)
        if doom is not None:
            self._lives.refuse(submit.key, doom)
            return
        self._num_arrivals += 1
        self._lives.scheduler.add(new_sequence(submit, self._num_arrivals))

    def _refusal(self, submit: Submit, now_s: float, *, stopped: bool) -> PendingFinish | None:
        """Reason to refuse a new sequence, or None."""
        if stopped:
            return PendingFinish(FinishReason.CANCELLED)
        if self._lives.holdings.states is not None and submit.source is not Source.LOCAL:
            message = "this model has recurrent layers, whose states are not handed over; send it to a combined worker"
            return PendingFinish(FinishReason.ERROR, InvalidRequest.code, message)
        num_prompt, max_tokens = len(submit.prompt_ids), submit.params.max_tokens
        if not 0 <= submit.num_emitted < max(num_prompt, 1):
            message = f"num_emitted is {submit.num_emitted} of {num_prompt} prompt tokens; some prompt must be left"
            return PendingFinish(FinishReason.ERROR, InvalidRequest.code, message)
        if num_prompt == 0:
            return PendingFinish(FinishReason.ERROR, InvalidRequest.code, "the prompt has no tokens; send at least one")
        if submit.deadline_s is not None and submit.deadline_s <= now_s:
            return PendingFinish(
                FinishReason.ERROR, DeadlineExceeded.code, "the deadline had passed before the request came"
            )
        if submit.num_emitted >= max_tokens:
            return PendingFinish(FinishReason.LENGTH)
        total = num_prompt - submit.num_emitted + max_tokens
        longest, pool = self._max_model_len, self._lives.holdings.pool
        if longest is not None and total > longest:
            message = f"prompt and max_tokens are {total} tokens; this model takes {longest}: ask for fewer"
            return PendingFinish(FinishReason.ERROR, ContextLengthExceeded.code, message)
        blocks = self._lives.holdings.blocks_for(num_prompt if submit.source is Source.FOR_PEER else total)
        if blocks > pool.num_blocks:
            message = (
                f"prompt and max_tokens are {total} tokens, which need {blocks} KV blocks of {pool.block_tokens}; "
                f"this worker has {pool.num_blocks}: ask for fewer tokens or start it with a larger --kv-cache-tokens"
            )
            return PendingFinish(FinishReason.ERROR, ContextLengthExceeded.code, message)
        queue = Queue(self._lives.scheduler.count(*QUEUE_STATES), self._lives.scheduler.remaining(*QUEUE_STATES))
        full = self._lives.scheduler.policy.refusal(queue, num_prompt)
        return None if full is None else PendingFinish(FinishReason.ERROR, Overloaded.code, full)

    def _cancel(self, command: CancelSequence, sequence: Sequence) -> bool:
        if command.reason is FinishReason.ERROR:
            message = "what this choice brought could not be handled; the worker's log has more"
            self._lives.end(sequence, PendingFinish(FinishReason.ERROR, InternalError.code, message))
        else:
            self._lives.end(sequence, PendingFinish(command.reason))
        return True

    def _bind(self, command: Bind, sequence: Sequence) -> bool:
        if sequence.state is not _S.PROMISED or sequence.wants_bind:
            return False
        self._lives.outbox += self._lives.scheduler.try_bind(sequence)
        return True

    def _write(self, command: WriteKv, sequence: Sequence) -> bool:
        """Write planes into the sequence's own blocks only: its cached prefix is shared and must not be written."""
        start, end = command.token_start, command.token_start + command.token_count
        aligned = start % HASH_BLOCK_TOKENS == 0 and (end % HASH_BLOCK_TOKENS == 0 or end == sequence.num_prompt)
        inside = sequence.cached_tokens <= start < end <= sequence.num_prompt
        if sequence.state is not _S.BOUND or not aligned or not inside:
            return False
        hash_blocks = range(start // HASH_BLOCK_TOKENS, -(-end // HASH_BLOCK_TOKENS))
        sequence.written.update(hash_blocks)
        if lacks_windows(command.sections, self._lives.holdings.prefix.windowed):
            sequence.lacking.update(hash_blocks)
        else:
            sequence.lacking.difference_update(hash_blocks)
        while sequence.num_computed // HASH_BLOCK_TOKENS in sequence.written:
            sequence.num_computed = min(sequence.num_computed + HASH_BLOCK_TOKENS, sequence.num_prompt)
            if sequence.num_computed == sequence.num_prompt:
                break
        table = self._lives.holdings.table(sequence, end)
        self._lives.outbox.append(WriteOp(sequence.key, start, command.token_count, *table, command.sections))
        return True

    def _complete(self, command: KvComplete, sequence: Sequence) -> bool:
        if sequence.state is not _S.BOUND:
            return False
        if sequence.num_computed < sequence.num_prompt:
            # The face reports a complete prompt, but writes are missing: compute the rest, never decode from a gap.
            self._lives.counters["kv_complete_with_gaps"] += 1
            self._go_local(sequence, sequence.num_computed, command.first_token)
            return True
        self._lives.holdings.publish(sequence)
        doom = self._lives.accept(sequence, command.first_token)
        if doom is None:
            self._lives.scheduler.move(sequence, _S.DECODING)
        else:
            self._lives.end(sequence, doom)
        return True

    def _prefill_locally(self, command: PrefillLocally, sequence: Sequence) -> bool:
        if sequence.source is not Source.PEER or sequence.state not in (_S.WAITING, _S.PROMISED, _S.BOUND):
            return False
        self._go_local(sequence, command.kept_tokens, command.first_token)
        return True

    def _go_local(self, sequence: Sequence, kept_tokens: int, first_token: int | None) -> None:
        """Compute the rest here. A known first token is appended, not sampled, so it is not emitted again."""
        sequence.source = Source.LOCAL
        sequence.has_begun = True  # the face knows
        doom = None if first_token is None else self._lives.accept(sequence, first_token)
        if doom is not None:
            self._lives.end(sequence, doom)
        elif sequence.state is _S.BOUND:
            kept = max(min(kept_tokens, sequence.num_computed), sequence.cached_tokens)
            kept = min(kept, sequence.num_skippable)
            sequence.num_computed = self._lives.holdings.furthest_start(sequence, kept)
            sequence.written.clear()
            first = sequence.num_computed // HASH_BLOCK_TOKENS  # from here on all layers are computed
            sequence.lacking = {number for number in sequence.lacking if number < first}
            self._lives.holdings.publish(sequence)
            self._lives.scheduler.move(sequence, _S.PREFILLING)
        elif sequence.state is _S.PROMISED:
            self._lives.scheduler.retract(sequence)

    def _peer_bound(self, command: PeerBound, sequence: Sequence) -> bool:
        if sequence.state not in (_S.OFFERED, _S.PARKED):
            return False
        self._lives.scheduler.unpark(sequence)
        return True

    def _peer_not_yet(self, command: PeerNotYet, sequence: Sequence) -> bool:
        if sequence.state is not _S.OFFERED:
            return False
        self._lives.scheduler.park(sequence)
        return True

    def _release(self, command: Release, sequence: Sequence) -> bool:
        if sequence.state is _S.BOUND:
            self._lives.holdings.publish(sequence)  # what was written without a gap stays cached
        elif sequence.state is not _S.HELD:
            return False
        self._lives.end(sequence, PendingFinish(FinishReason.STOP))
        return True

    def read(self, command: ReadKv) -> None:
        """Read the planes of a live sequence's computed tokens."""
        sequence = self._lives.get(command.key)
        end = command.token_start + command.token_count
        if (
            sequence is None
            or sequence.state not in _READABLE
            or not 0 <= command.token_start < end <= sequence.num_computed
            or not _is_sealed(sequence, command.token_start, end)
        ):
            self._lives.counters["read_of_unknown_kv"] += 1
            self._lives.outbox.append(KvRead(command.key, command.token_start, command.token_count, None))
            return
        table = self._lives.holdings.table(sequence, end)
        place = command.key, command.token_start, command.token_count
        self._lives.outbox.append(ReadOp(*place, *table, command.into, command.without_windows))

    def fetch(self, command: FetchBlocks) -> None:
        """Read the planes of the longest leading part of a chain that is held here, or count its blocks."""
        holdings = self._lives.holdings
        block_tokens, start = holdings.pool.block_tokens, command.first_token
        blocks: list[BlockId] = [BlockId(0)] * (max(start, 0) // block_tokens)
        end, lacking = start, set[int]()
        for identity in command.identities if start >= 0 and start % HASH_BLOCK_TOKENS == 0 else ():
            block = holdings.prefix.locate(identity)
            if block is None or not holdings.prefix.is_of(block, command.root):
                break
            if holdings.prefix.lacks_windows(block):
                if command.how is Reading.ALL:
                    break
                lacking.add(end // HASH_BLOCK_TOKENS)
            # If two blocks share their first hash block, use the one that also holds the later hash blocks.
            blocks[end // block_tokens :] = [block]
            end += HASH_BLOCK_TOKENS
        if command.how is Reading.NOTHING:
            furthest = furthest_start(holdings.prefix.windowed, end // HASH_BLOCK_TOKENS, lacking)
            end = max(start, furthest * HASH_BLOCK_TOKENS)
        if end == start or command.how is Reading.NOTHING:
            self._lives.outbox.append(BlocksFetched(command.fetch_id, (end - start) // HASH_BLOCK_TOKENS, ()))
            return
        table, without = holdings.table_of(blocks), command.how is Reading.WITHOUT_WINDOWS
        self._lives.outbox.append(FetchOp(command.fetch_id, start, end - start, *table, without))


def _is_sealed(sequence: Sequence, start: int, end: int) -> bool:
    """True if a range is sealed: whole hash blocks are sealed when computed, a prompt's tail only for a peer."""
    whole = end % HASH_BLOCK_TOKENS == 0 or (sequence.source is Source.FOR_PEER and end == sequence.num_prompt)
    return whole and start % HASH_BLOCK_TOKENS == 0
