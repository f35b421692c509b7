"""What a two-rank communicator is told and reports, whatever the library. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from .paired_link import Post

SOURCE, DESTINATION = 0, 1  # ranks


@dataclass(frozen=True, slots=True)
class Patience:
    """Longest waits, in seconds."""

    join_s: float  # for the other rank to join
    operation_s: float  # from the wait for one operation to its end


@dataclass(frozen=True, slots=True)
class Opened:
    """Both ranks have joined: operations may be posted."""


@dataclass(frozen=True, slots=True)
class Completed:
    """The operation of this transfer is over; the library cannot reach its memory any more."""

    id: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The communicator is of no use any more; `abort` it."""

    reason: str


@dataclass(frozen=True, slots=True)
class Aborted:
    """The library cannot reach any memory any more. The last event."""


CommunicatorEvent = Opened | Completed | Failed | Aborted


class SlotMemory(Protocol):
    """uint8 [slots, slot_bytes], in the kind of array that the library takes."""

    def __getitem__(self, place: tuple[int, slice], /) -> Any:
        """The bytes of a range of a slot, not copied."""
        ...


class Communicator(Protocol):
    """One rank of a two-rank communicator: the library, or a script that fails as libraries do."""

    def post(self, post: Post, memory: Any) -> None:
        """Post the operation of a transfer on `memory` uint8 [num_bytes], a part of SlotMemory; its event follows."""
        ...

    def abort(self) -> None:
        """End the communicator; `Aborted` follows. Idempotent."""
        ...

    def join(self, timeout_s: float) -> bool:
        """Wait until it has ended after `abort`; True if it has."""
        ...


Join = Callable[[int, Patience, Callable[[CommunicatorEvent], None]], Communicator]
"""Make the communicator of a rank. It joins at once; events come in any thread."""
