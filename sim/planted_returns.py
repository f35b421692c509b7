"""Planted bugs of blocks that come back to prefill workers."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from ..core.request import FinishReason
from ..engine.commands import Commands
from ..engine.link import messages as link
from ..engine.sequence import Sequence, SequenceState
from ..kv.handover.sources import FetchedBlocks
from ..prefill_worker.task import PrefillTask
from ..worker.blocks.returns import ReturnTask
from .planting import Planted, chatting, chatting_in_bad_weather, instead


def returns_outlive_their_jobs() -> AbstractContextManager[None]:
    """What a job fetches goes on after its hand-over has ended."""
    return instead(ReturnTask, "cancel", lambda *_: None)


def jobs_begin_after_their_end() -> AbstractContextManager[None]:
    """A job whose hand-over ended while its blocks came is computed all the same."""

    def returned(self: PrefillTask, came: FetchedBlocks) -> None:
        self._returning = None
        self.sender.fetched(came)
        self._begin()

    return instead(PrefillTask, "_returned", returned)


def jobs_wait_for_what_was_given_up() -> AbstractContextManager[None]:
    """A job does not begin if its return was given up, e.g. because all of it is here already."""
    original = ReturnTask._ended

    def ended(self: ReturnTask, ended: link.Ended) -> None:
        if ended.reason is FinishReason.STOP:
            original(self, ended)

    return instead(ReturnTask, "_ended", ended)


def blocks_that_did_not_come_are_kept() -> AbstractContextManager[None]:
    """All blocks of a return are published, whether they came or not."""
    original = Commands._release

    def release(self: Commands, command: link.Release, sequence: Sequence) -> bool:
        if sequence.state is SequenceState.BOUND:
            sequence.num_computed = sequence.num_prompt
        return original(self, command, sequence)

    return instead(Commands, "_release", release)


def returned_blocks_are_kept_by_nobody() -> AbstractContextManager[None]:
    """A return that is over keeps its blocks until the job's deadline."""
    original: Any = Commands._release

    def release(self: Commands, command: link.Release, sequence: Sequence) -> bool:
        return sequence.state is SequenceState.BOUND or original(self, command, sequence)

    return instead(Commands, "_release", release)


BUGS: tuple[Planted, ...] = (
    Planted(returns_outlive_their_jobs, ("R7",), 250, chatting_in_bad_weather),
    Planted(jobs_begin_after_their_end, ("R7", "K1"), 100, chatting_in_bad_weather),
    Planted(jobs_wait_for_what_was_given_up, ("K1",), 120, chatting),
    Planted(blocks_that_did_not_come_are_kept, ("K4", "K5", "K7"), 150, chatting_in_bad_weather),
    Planted(returned_blocks_are_kept_by_nobody, ("L1",), 100, chatting),
)
