"""A library of two-rank communicators in the simulator: it is late, fails, hangs, and lets go of memory late.

What it reports goes to production's `PairedChannel`. Until it has reported an operation's end, or its abort, it may
read or write that operation's memory at any time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ..kv.handover.paired_library import (
    DESTINATION,
    SOURCE,
    Aborted,
    CommunicatorEvent,
    Completed,
    Failed,
    Join,
    Opened,
    Patience,
)
from ..kv.handover.paired_link import Post
from .world import Process, World


@dataclass(frozen=True, slots=True)
class PairSetting:
    """Paired channels of a schedule."""

    patience: Patience
    retry_s: float  # until a channel that ended is made again
    delay_s: float  # mean of every step of the library
    join_failure: float  # probability that the ranks do not meet
    failure: float  # probability that an operation fails, on one side or both
    hang: float  # probability that an operation never ends
    damage: float  # probability that planes are damaged on their way
    max_channels: int  # of one worker
    is_required: bool  # decode workers take no other transport


Report = Callable[[CommunicatorEvent], None]


class SimMemory:
    """Slots of one end. Implements `SlotMemory`."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self.views = [memoryview(bytearray(slot_bytes)) for _ in range(slots)]

    def __getitem__(self, place: tuple[int, slice]) -> memoryview:
        """Implements `SlotMemory.__getitem__`."""
        slot, cut = place
        return self.views[slot][cut]


class SimRank:
    """One rank. Implements `Communicator`."""

    def __init__(self, link: _Link, process: Process, told: Report) -> None:
        self.process, self.life = process, process.life
        self.posted: dict[int, tuple[Post, memoryview]] = {}  # operations whose memory the library can reach
        self.is_aborting = self.is_gone = False
        self._link = link
        self._told = told

    @property
    def reachable(self) -> set[int]:
        """Slots that the library may read or write now."""
        return {post.slot for post, _ in self.posted.values()}

    @property
    def is_dead(self) -> bool:
        """True if the process has ended since."""
        return not self.process.is_alive or self.process.life != self.life

    def post(self, post: Post, memory: memoryview) -> None:
        """Implements `Communicator.post`."""
        self.posted[post.id] = post, memory
        self._link.posted(post.id)

    def abort(self) -> None:
        """Implements `Communicator.abort`. Operations go on for a while."""
        if not self.is_aborting:
            self.is_aborting = True
            self._link.after(self, self._let_go, 4.0)

    def join(self, timeout_s: float) -> bool:
        """Implements `Communicator.join`. Not used: nobody blocks in virtual time."""
        raise NotImplementedError

    def report(self, event: CommunicatorEvent) -> None:
        """Report an event later, unless the rank is gone by then."""
        self._link.after(self, partial(self._report, event))

    def _report(self, event: CommunicatorEvent) -> None:
        if self.is_gone:
            return
        if isinstance(event, Completed):
            if event.id not in self.posted:
                return
            del self.posted[event.id]
        self._told(event)

    def _let_go(self) -> None:
        self.posted.clear()
        self._report(Aborted())
        self.is_gone = True


class _Link:
    """The two ranks of one channel."""

    def __init__(self, library: Library, name: str) -> None:
        self.name = name
        self._library = library
        self.ranks: dict[int, SimRank] = {}

    def join(self, rank: int, process: Process, patience: Patience, told: Report) -> SimRank:
        world, setting = self._library.world, self._library.setting
        made = self.ranks[rank] = SimRank(self, process, told)
        if len(self.ranks) == 2 and not world.chance(setting.join_failure):
            for each in self.ranks.values():
                each.report(Opened())
        else:
            world.after(patience.join_s, process, lambda: self._not_joined(made))
        return made

    def after(self, rank: SimRank, act: Callable[[], None], factor: float = 1.0) -> None:
        """Plan something that the library does in the process of a rank."""
        world = self._library.world
        if not rank.is_dead:
            world.after(world.random.random() * 2 * factor * self._library.setting.delay_s, rank.process, act)

    def posted(self, transfer: int) -> None:
        """One rank has posted a transfer: if the other has, too, the library moves it at some time."""
        if len(self.ranks) < 2 or any(transfer not in rank.posted for rank in self.ranks.values()):
            return
        world, setting = self._library.world, self._library.setting
        if world.chance(setting.hang):
            world.note(self.name, f"transfer {transfer} hangs")
            return
        if world.chance(setting.failure):
            world.note(self.name, f"transfer {transfer} fails")
            for rank in self.ranks.values():
                if world.chance(0.7):  # the other hears of it from its peer
                    rank.report(Failed("an error of the library"))
            if world.chance(0.5):
                return  # else it moves after all
        world.after(world.random.random() * 2 * setting.delay_s, None, lambda: self._move(transfer))

    def _move(self, transfer: int) -> None:
        source, destination = self.ranks[SOURCE], self.ranks[DESTINATION]
        if source.is_dead or destination.is_dead:
            survivor = destination if source.is_dead else source
            if self._library.world.chance(0.7):
                survivor.report(Failed("the other rank is gone"))
            return
        if transfer not in source.posted or transfer not in destination.posted:
            return  # aborted meanwhile
        planes, room = source.posted[transfer][1], destination.posted[transfer][1]
        room[:] = planes
        world = self._library.world
        if world.chance(self._library.setting.damage):
            room[world.random.randrange(len(room))] ^= 1 << world.random.randrange(8)
        self._library.num_moved += 1
        world.note(self.name, f"transfer {transfer} moves")
        source.report(Completed(transfer))
        destination.report(Completed(transfer))

    def _not_joined(self, rank: SimRank) -> None:
        if len(self.ranks) < 2 or self._library.setting.join_failure:
            rank.report(Failed("the other rank did not come"))


class Library:
    """All communicators of a schedule."""

    def __init__(self, world: World, setting: PairSetting) -> None:
        self.world, self.setting = world, setting
        self.num_moved = 0
        self._links: dict[int, _Link] = {}
        self._last = 0

    def number(self) -> int:
        """A number that no channel had yet."""
        self._last += 1
        return self._last

    def joining(self, number: int, process: Process, made: Callable[[SimRank], None]) -> Join:
        """How a process joins the communicator of a channel; `made` gets its rank."""

        def join(rank: int, patience: Patience, told: Report) -> SimRank:
            link = self._links.setdefault(number, _Link(self, f"channel {number}"))
            mine = link.join(rank, process, patience, told)
            made(mine)
            return mine

        return join
