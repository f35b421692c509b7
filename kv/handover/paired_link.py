"""State machines of the two ends of a two-rank communicator: source rank and destination rank. Pure.

    source                                    destination
    offer(slot) ── Announce(id, bytes) ─────▶ announced: waits for a free slot
    ready ◀─────── Ready(id) ──────────────── Post(id, slot): its receive is posted
    Post(id, slot): its send is posted
    completed ─▶ Free(slot)                   completed ─▶ Deliver(id, slot) … release(slot)

Announce and Ready travel on the control stream. A collective library cannot cancel one operation and may hang with a
peer that is gone, so nothing is posted before both ends have said that they are ready, transfers are posted in the
order of their ids on both ends, and any error ends the whole communicator: `Abort`. Memory of a posted operation can
still be read or written by the library: it is in quarantine, and free only after its completion or after the abort.
The library's ids and tags are not trusted over time: ids are ours, begin at 1 and are never used again on a link.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class Announce:
    """To the destination: the planes of transfer `id` are ready to be sent."""

    id: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Ready:
    """To the source: the receive of transfer `id` is posted."""

    id: int


@dataclass(frozen=True, slots=True)
class Post:
    """Post the send or the receive of transfer `id` from or into a slot; `completed` or `failed` answers."""

    id: int
    slot: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Deliver:
    """The planes of transfer `id` are in the slot, which is the owner's until `release`."""

    id: int
    slot: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Free:
    """The library cannot reach the slot any more."""

    slot: int


@dataclass(frozen=True, slots=True)
class Abort:
    """Abort the communicator, and call `aborted` when that is done. The link is never used again."""

    reason: str


LinkAction = Announce | Ready | Post | Deliver | Free | Abort


class LinkState(StrEnum):
    """States of an end."""

    OPEN = "open"
    ABORTING = "aborting"
    GONE = "gone"


class _End(ABC):
    """What both ends have in common: posted operations, their deadline, and the abort."""

    def __init__(self, patience_s: float) -> None:
        """`patience_s`: longest time from a post to its completion; after it the peer or the library hangs."""
        self.state = LinkState.OPEN
        self.reason = ""  # of the abort
        self._patience_s = patience_s
        self._posted: dict[int, tuple[Post, float]] = {}  # by id, with its deadline; oldest first

    @property
    def quarantined(self) -> frozenset[int]:
        """Slots that the library can reach."""
        return frozenset(post.slot for post, _ in self._posted.values())

    @property
    def next_deadline_s(self) -> float | None:
        """Latest time of the next `tick`; None: nothing is posted."""
        if self.state is not LinkState.OPEN or not self._posted:
            return None
        return next(iter(self._posted.values()))[1]

    def tick(self, now_s: float) -> list[LinkAction]:
        """Time passed."""
        due_s = self.next_deadline_s
        if due_s is None or now_s < due_s:
            return []
        return self.failed(f"transfer {next(iter(self._posted))} did not complete within {self._patience_s:g} s")

    def failed(self, reason: str) -> list[LinkAction]:
        """An operation failed, the control stream ended, or the link is not wanted any more: abort. Idempotent."""
        if self.state is not LinkState.OPEN:
            return []
        self.state, self.reason = LinkState.ABORTING, reason
        return [Abort(reason), *self._forget_unposted()]

    def aborted(self) -> list[LinkAction]:
        """The communicator is gone: quarantine ends."""
        assert self.state is LinkState.ABORTING, self.state
        self.state = LinkState.GONE
        slots = sorted(self.quarantined)
        self._posted.clear()
        return [Free(slot) for slot in slots]

    def _post(self, post: Post, now_s: float) -> Post:
        assert post.slot not in self.quarantined, f"slot {post.slot} is posted already"
        self._posted[post.id] = (post, now_s + self._patience_s)
        return post

    @abstractmethod
    def _forget_unposted(self) -> list[LinkAction]:
        """Forget the transfers that are not posted yet; Free of their slots, if the library never had them."""

    def _take_posted(self, transfer: int) -> Post | None:
        """The post that completed; None: the link is being aborted, and its completions count no more."""
        if self.state is not LinkState.OPEN:
            return None
        return self._posted.pop(transfer)[0]


class SourceEnd(_End):
    """The rank that sends."""

    def __init__(self, patience_s: float) -> None:
        super().__init__(patience_s)
        self._next_id = 1
        self._announced: deque[Post] = deque()

    def offer(self, slot: int, num_bytes: int) -> list[LinkAction]:
        """A slot is filled: announce it. Free of it answers later, also if the link is over."""
        if self.state is not LinkState.OPEN:
            return [Free(slot)]
        post = Post(self._next_id, slot, num_bytes)
        self._next_id += 1
        self._announced.append(post)
        return [Announce(post.id, num_bytes)]

    def ready(self, transfer: int, now_s: float) -> list[LinkAction]:
        """The destination has posted its receive."""
        if self.state is not LinkState.OPEN:
            return []
        if not self._announced or self._announced[0].id != transfer:
            return self.failed(f"transfer {transfer} is ready out of order")
        return [self._post(self._announced.popleft(), now_s)]

    def completed(self, transfer: int) -> list[LinkAction]:
        """The library says that the send is over."""
        post = self._take_posted(transfer)
        return [] if post is None else [Free(post.slot)]

    def _forget_unposted(self) -> list[LinkAction]:
        free: list[LinkAction] = [Free(post.slot) for post in self._announced]
        self._announced.clear()
        return free


class DestinationEnd(_End):
    """The rank that receives, into its own slots."""

    def __init__(self, slots: int, slot_bytes: int, patience_s: float) -> None:
        super().__init__(patience_s)
        self._slots, self._slot_bytes = slots, slot_bytes
        self._free = deque(range(slots))
        self.last_id = 0  # of the transfers that were announced
        self._waiting: deque[Announce] = deque()  # for a slot

    @property
    def free_slots(self) -> frozenset[int]:
        """Slots that the next receives are posted into."""
        return frozenset(self._free)

    def announced(self, transfer: int, num_bytes: int, now_s: float) -> list[LinkAction]:
        """The source has filled a slot of its own."""
        if self.state is not LinkState.OPEN:
            return []
        if transfer != self.last_id + 1 or not 0 < num_bytes <= self._slot_bytes or len(self._waiting) >= self._slots:
            return self.failed(f"transfer {transfer} of {num_bytes} bytes after {self.last_id}")
        self.last_id = transfer
        self._waiting.append(Announce(transfer, num_bytes))
        return self._pump(now_s)

    def completed(self, transfer: int) -> list[LinkAction]:
        """The library says that the receive is over."""
        post = self._take_posted(transfer)
        return [] if post is None else [Deliver(post.id, post.slot, post.num_bytes)]

    def release(self, slot: int, now_s: float) -> list[LinkAction]:
        """The owner has read a delivered slot."""
        assert slot not in self._free, f"slot {slot} is free already"
        assert slot not in self.quarantined, f"slot {slot} is posted"
        self._free.append(slot)
        return self._pump(now_s)

    def _pump(self, now_s: float) -> list[LinkAction]:
        actions: list[LinkAction] = []
        while self.state is LinkState.OPEN and self._waiting and self._free:
            first = self._waiting.popleft()
            # The receive is posted first: Ready promises that it is there.
            actions += [self._post(Post(first.id, self._free.popleft(), first.num_bytes), now_s), Ready(first.id)]
        return actions

    def _forget_unposted(self) -> list[LinkAction]:
        self._waiting.clear()
        return []
