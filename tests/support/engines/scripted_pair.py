"""Communicators that do what a script says, and a control stream within one process."""

from __future__ import annotations

import asyncio

from twostroke.kv.handover.paired_library import SOURCE, Aborted, Completed, Failed, Opened
from twostroke.kv.handover.transports.communicator import TwoRankCommunicator


class Wire:
    """Memory between the two ranks of a script: what was sent is received when both have posted it."""

    def __init__(self, *, hangs_at_init: bool = False, late_rank: int | None = None) -> None:
        """`late_rank`: one that learns later than the other that both have joined, by `open_late`."""
        self.hangs_at_init = hangs_at_init
        self.late_rank = late_rank
        self.holds_from: int | None = None  # operations of this transfer and later ones do not complete
        self.holds_abort = False  # the library does not let go
        self.ranks: dict[int, ScriptedRank] = {}

    def join(self, rank, patience, told):
        made = ScriptedRank(self, told)
        self.ranks[rank] = made
        if not self.hangs_at_init and len(self.ranks) == 2:
            for number, each in self.ranks.items():
                if number != self.late_rank:
                    each.told(Opened())
        return made

    def open_late(self) -> None:
        assert self.late_rank is not None
        self.ranks[self.late_rank].told(Opened())

    def let_go(self) -> None:
        """The library lets go of what it had."""
        self.holds_abort = False
        for rank in self.ranks.values():
            if rank.is_aborting:
                rank.let_go()

    def move(self) -> None:
        """Complete all operations that both ranks have posted."""
        source, destination = (self.ranks[rank] for rank in (SOURCE, 1 - SOURCE))
        for number in sorted(source.posted.keys() & destination.posted.keys()):
            if self.holds_from is not None and number >= self.holds_from:
                return
            destination.posted.pop(number).copy_(source.posted.pop(number))
            source.told(Completed(number))
            destination.told(Completed(number))


class ScriptedRank:
    """One rank. `fail` is an error that the library reports by itself."""

    def __init__(self, wire, told) -> None:
        self._wire, self.told = wire, told
        self.posted = {}
        self.is_aborting = self.is_gone = False

    def let_go(self) -> None:
        if not self.is_gone:
            self.is_gone = True
            self.told(Aborted())

    def post(self, post, memory) -> None:
        self.posted[post.id] = memory
        if len(self._wire.ranks) == 2:
            self._wire.move()

    def fail(self, reason: str) -> None:
        self.told(Failed(reason))

    def abort(self) -> None:
        if not self.is_aborting:
            self.is_aborting = True
            if not self._wire.holds_abort:
                self.let_go()

    def join(self, timeout_s: float) -> bool:
        return True


class Pipe:
    """One side of a control stream within one process; `cut` ends both directions."""

    def __init__(self) -> None:
        self.inbox: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.peer: Pipe | None = None
        self.is_cut = False

    async def send(self, envelope: bytes) -> None:
        if self.is_cut or self.peer is None or self.peer.is_cut:
            raise ConnectionError("the pipe is cut")
        self.peer.inbox.put_nowait(envelope)

    async def receive(self) -> bytes | None:
        return await self.inbox.get()

    async def finish(self) -> None:
        pass

    def close(self) -> None:
        """End both directions."""
        for side in (self, self.peer):
            if side is not None and not side.is_cut:
                side.is_cut = True
                side.inbox.put_nowait(None)


def pipes() -> tuple[Pipe, Pipe]:
    one, other = Pipe(), Pipe()
    one.peer, other.peer = other, one
    return one, other


class FailingCommunicator(TwoRankCommunicator):
    """The real one; the operation `FAILS_AT`, counted in the process, is an error of the library."""

    FAILS_AT = 0
    num_posted = 0

    def post(self, post, memory) -> None:
        cls = type(self)
        cls.num_posted += 1
        if cls.num_posted == cls.FAILS_AT:
            self._told(Failed("an error of the script"))
        else:
            super().post(post, memory)
