"""Delivery state of one request: the tokens and epochs that may still be added to its client's stream. Pure.

Only the current epoch's next token of each choice is taken; all others are classified and dropped. So with any number
of retries, delays and duplicates, the client's stream is always a prefix of the final one, without gaps.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from ...core.request import Epoch, FinishReason
from .pieces import OutputDelta


class DeliveryVerdict(StrEnum):
    """Decision about tokens or an end from a worker. Values are the metric's labels."""

    TAKE = "take"
    STALE_EPOCH = "stale_epoch"
    REPEATED = "repeated"
    GAP = "gap"
    AFTER_END = "after_end"


@dataclass(slots=True)
class _Progress:
    epoch: Epoch | None = None
    token_ids: array[int] = field(default_factory=lambda: array("I"))  # delivered: the prompt of a later dispatch
    finish: FinishReason | None = None

    @property
    def next_index(self) -> int:
        return len(self.token_ids)


class Delivery:
    """Delivery cursor of every choice."""

    def __init__(self, num_choices: int) -> None:
        self._choices = [_Progress() for _ in range(num_choices)]

    @property
    def unfinished(self) -> tuple[int, ...]:
        """Choices that have not ended."""
        return tuple(i for i, progress in enumerate(self._choices) if progress.finish is None)

    @property
    def completion_tokens(self) -> int:
        """Number of delivered tokens, over all choices."""
        return sum(progress.next_index for progress in self._choices)

    @property
    def finish_reasons(self) -> list[FinishReason | None]:
        """Finish reason per choice; None: it still runs."""
        return [progress.finish for progress in self._choices]

    def tokens_of(self, choice: int) -> int:
        """Number of delivered tokens of one choice."""
        return self._choices[choice].next_index

    def ids_of(self, choice: int) -> tuple[int, ...]:
        """Delivered token ids of one choice."""
        return tuple(self._choices[choice].token_ids)

    def restore(self, choice: int, first_index: int, token_ids: Sequence[int], finish: FinishReason | None) -> bool:
        """Take over what a client has of a choice, before any dispatch. False: it does not continue what is there."""
        progress = self._choices[choice] if choice < len(self._choices) else None
        if progress is None or progress.finish is not None or first_index != progress.next_index:
            return False
        progress.token_ids += array("I", token_ids)
        progress.finish = finish
        return True

    def dispatch(self, epoch: Epoch) -> tuple[int, ...]:
        """Assign all unfinished choices to this epoch; returns them."""
        for index in self.unfinished:
            current = self._choices[index].epoch
            assert current is None or current < epoch, (current, epoch)
            self._choices[index].epoch = epoch
        return self.unfinished

    def recall(self) -> None:
        """Accept tokens of no epoch until the next `dispatch`: later messages of the last one are stale."""
        for index in self.unfinished:
            self._choices[index].epoch = None

    def tokens(self, choice: int, epoch: Epoch, first_index: int, token_ids: Sequence[int]) -> DeliveryVerdict:
        """Tokens of a choice from `first_index` on arrived: take them, or return why not."""
        verdict = self._standing(choice, epoch)
        if verdict is not DeliveryVerdict.TAKE:
            return verdict
        progress = self._choices[choice]
        if first_index != progress.next_index:
            return DeliveryVerdict.REPEATED if first_index < progress.next_index else DeliveryVerdict.GAP
        progress.token_ids.extend(token_ids)
        return DeliveryVerdict.TAKE

    def is_awaited(self, choice: int, epoch: Epoch) -> bool:
        """True if this epoch may still add to the choice."""
        return self._standing(choice, epoch) is DeliveryVerdict.TAKE

    def end(self, choice: int, epoch: Epoch, reason: FinishReason) -> DeliveryVerdict:
        """The end of a choice arrived: it is taken once, and from the current epoch only."""
        verdict = self._standing(choice, epoch)
        if verdict is DeliveryVerdict.TAKE:
            self._choices[choice].finish = reason
        return verdict

    def _standing(self, choice: int, epoch: Epoch) -> DeliveryVerdict:
        if choice >= len(self._choices) or self._choices[choice].epoch != epoch:
            return DeliveryVerdict.STALE_EPOCH
        return DeliveryVerdict.TAKE if self._choices[choice].finish is None else DeliveryVerdict.AFTER_END


class PieceBuffer:
    """Pieces that the client has not fetched yet, bounded in items: a full buffer merges new pieces into its last ones.

    A client that leaves the buffer full too long is too slow; `full_since_s` is the time when it became full.
    """

    def __init__(self, max_pieces: int) -> None:
        self._max_pieces = max_pieces
        self._pieces: deque[OutputDelta] = deque()
        self.full_since_s: float | None = None

    def __len__(self) -> int:
        return len(self._pieces)

    def put(self, piece: OutputDelta, now_s: float) -> None:
        """Append a piece, or merge it into the last one of its choice if the buffer is full."""
        if len(self._pieces) >= self._max_pieces:
            if self.full_since_s is None:
                self.full_since_s = now_s
            for index in range(len(self._pieces) - 1, -1, -1):
                if self._pieces[index].choice == piece.choice:
                    self._pieces[index] = _joined(self._pieces[index], piece)
                    return
        self._pieces.append(piece)

    def take(self) -> OutputDelta | None:
        """The oldest piece, or None."""
        if not self._pieces:
            return None
        piece = self._pieces.popleft()
        if len(self._pieces) < self._max_pieces:
            self.full_since_s = None
        return piece


def _joined(first: OutputDelta, second: OutputDelta) -> OutputDelta:
    assert first.first_index + len(first.token_ids) == second.first_index
    return OutputDelta(
        first.choice,
        first.first_index,
        first.token_ids + second.token_ids,
        first.text + second.text,
        second.finish_reason,
        second.usage,
        first.logprobs + second.logprobs,
        first.prompt_scores + second.prompt_scores,
        max(first.num_shown, second.num_shown),
    )
