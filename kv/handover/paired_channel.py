"""One end of a two-rank link with its communicator and its memory: carries out the actions of `paired_link.py`. Pure.

The owner has a control stream for Announce and Ready, calls all methods on one thread, and `turn` regularly.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence

from .paired_library import (
    DESTINATION,
    SOURCE,
    Aborted,
    CommunicatorEvent,
    Completed,
    Failed,
    Join,
    Opened,
    Patience,
    SlotMemory,
)
from .paired_link import Abort, Announce, Deliver, DestinationEnd, Free, LinkAction, LinkState, Post, Ready, SourceEnd

Say = Callable[[Announce | Ready], None]
"""Send a message on the control stream. Raises OSError if that is over."""
Told = Callable[[Deliver | Free], None]
"""A slot was filled, or is out of the library's reach."""


class PairedChannel:
    """The source if `end` is a SourceEnd, else the destination. `memory` is the owner's."""

    def __init__(
        self,
        end: SourceEnd | DestinationEnd,
        memory: SlotMemory,
        join: Join,
        patience: Patience,
        *,
        say: Say,
        told: Told,
        woken: Callable[[], None] = lambda: None,
    ) -> None:
        """`join` makes the rank's communicator. `woken`: called in any thread when `turn` has something to do."""
        self.end = end
        self.is_open = False  # both ranks have joined; before it, keep the peer's messages unread
        self._memory = memory
        self._say = say
        self._told = told
        self._events: queue.SimpleQueue[CommunicatorEvent] = queue.SimpleQueue()
        self._woken = woken
        self._link = join(SOURCE if isinstance(end, SourceEnd) else DESTINATION, patience, self._report)

    @property
    def is_gone(self) -> bool:
        """True if the link is over, and all memory is the owner's again."""
        return self.end.state is LinkState.GONE

    def offer(self, slot: int, num_bytes: int) -> None:
        """Send the first `num_bytes` of a slot; a Free tells that it can be written again."""
        assert isinstance(self.end, SourceEnd)
        self._act(self.end.offer(slot, num_bytes))

    def release(self, slot: int, now_s: float) -> None:
        """A delivered slot was read."""
        assert isinstance(self.end, DestinationEnd)
        self._act(self.end.release(slot, now_s))

    def hear(self, message: Announce | Ready, now_s: float) -> None:
        """The peer's message on the control stream."""
        if isinstance(self.end, SourceEnd):
            fits = isinstance(message, Ready)
            self._act(
                self.end.ready(message.id, now_s) if fits else self.end.failed("a message of the other direction")
            )
        elif isinstance(message, Announce):
            self._act(self.end.announced(message.id, message.num_bytes, now_s))
        else:
            self._act(self.end.failed("a message of the other direction"))

    def fail(self, reason: str) -> None:
        """The control stream ended, or the link is not wanted any more."""
        self._act(self.end.failed(reason))

    def turn(self, now_s: float) -> None:
        """Handle what the library reported, and the passing of time."""
        while not self._events.empty():
            self._take(self._events.get())
        self._act(self.end.tick(now_s))

    def close(self, timeout_s: float) -> bool:
        """Abort if that did not happen yet; wait until the library has let go. False: it has not within `timeout_s`."""
        self.fail("closed")
        has_ended = self._link.join(timeout_s)
        self.turn(0.0)
        return has_ended

    # ------------------------------------------------------------------ inside

    def _report(self, event: CommunicatorEvent) -> None:
        self._events.put(event)
        self._woken()

    def _take(self, event: CommunicatorEvent) -> None:
        match event:
            case Opened():
                self.is_open = True
            case Completed(transfer):
                self._act(self.end.completed(transfer))
            case Failed(reason):
                self.fail(reason)
            case Aborted():
                self._act(self.end.aborted())

    def _act(self, actions: Sequence[LinkAction]) -> None:
        for action in actions:
            match action:
                case Announce() | Ready():
                    try:
                        self._say(action)
                    except OSError as error:
                        self.fail(f"the control stream ended: {error}")
                case Post(_, slot, num_bytes):
                    self._link.post(action, self._memory[slot, :num_bytes])
                case Deliver() | Free():
                    self._told(action)
                case Abort():
                    self._link.abort()
