"""Paired channels of a simulated worker: production's ends and their owners, with streams and a library of ours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from ...decode_worker.paired_peers import PairedChannels, PairShape
from ...kv.handover.frames import slot_bytes
from ...kv.handover.paired_library import Join
from ...kv.handover.paired_transfers import DestinationTransfers, PairSlots, SourceTransfers
from ...kv.handover.plane_channel import Planes, SendingEnd, TransportPolicy
from ...prefill_worker.paired_peers import AcceptedChannels
from ...protos import handover_pb2 as pb
from ..invariants import Violation
from ..library import Library, PairSetting, SimMemory, SimRank
from ..network import End
from ..world import Timer

if TYPE_CHECKING:
    from .node import WorkerNode

HELLO_S = 1.0
Told = tuple[Callable[[], None], Callable[[str], None]]  # called when a channel is open, and when it is over
KEEPALIVE_S = 2.0  # after which a stream to a process that is gone ends, whatever was told


class PairedFace:
    """One end with its control stream. Implements `PairHost`."""

    transfers: SourceTransfers | DestinationTransfers

    def __init__(self, node: WorkerNode, end: End, over: Callable[[str], None]) -> None:
        """`over` is called once, with the reason, when the channel is over and its memory free."""
        self._node, self._end, self._over = node, end, over
        self.rank: SimRank | None = None
        self.is_over = False
        self._turn_due: Timer | None = None
        self._deadline: Timer | None = None
        end.on_message, end.on_end = self._hear, lambda: self.transfers.stop("the control stream ended")
        self._peer_life = end.peer.process.life
        self._look()

    def begin(self, number: int, library: Library) -> Join:
        """How this end joins."""

        def made(rank: SimRank) -> None:
            self.rank = rank

        return library.joining(number, self._node.process, made)

    def now_s(self) -> float:
        """Implements `PairHost.now_s`."""
        return self._node.world.now_s()

    def soon(self, act: Callable[[], None]) -> None:
        """Implements `PairHost.soon`."""
        self._node.world.after(0.0, self._node.process, act)

    def say(self, message: pb.PairMessage) -> None:
        """Implements `PairHost.say`."""
        self._end.send(message)

    def woken(self) -> None:
        """Implements `PairHost.woken`."""
        if self._turn_due is None:
            self._turn_due = self._node.world.after(0.0, self._node.process, self._turn)

    def check(self) -> None:
        """Check K3: no slot that this side may use can be reached by the library."""
        both = set() if self.rank is None else self.rank.reachable & self.transfers.usable_slots
        if both:
            raise Violation("K3", f"{self._node.process}: slots {sorted(both)} are used while a peer can reach them")
        if self.is_over and self.rank is not None and self.rank.posted:
            raise Violation("K3", f"{self._node.process}: memory of a channel is free while a peer can reach it")

    def _hear(self, message: pb.PairMessage) -> None:
        if not self.is_over:
            self.transfers.hear(message)
            self._turn()

    def _look(self) -> None:
        """The keepalive of the control stream."""
        peer = self._end.peer.process
        if self.is_over:
            return
        if peer.life != self._peer_life:
            self.transfers.stop("the peer is gone")
        self._node.world.after(KEEPALIVE_S, self._node.process, self._look)

    def _turn(self) -> None:
        self._turn_due = None
        if self.is_over:
            return
        self.transfers.turn()
        self._turned()
        if self.transfers.is_gone:
            self.is_over = True
            self._node.world.note(self._node.process, f"{self._end.name} is over: {self.transfers.reason}")
            self.transfers.leave()
            self._end.abort()
            self._over(self.transfers.reason)
            return
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        due_s = self.transfers.next_deadline_s
        if due_s is not None:
            self._deadline = self._node.world.at(due_s, self._node.process, self._turn)

    def _turned(self) -> None:
        """The end may have changed."""


class SimSource(PairedFace):
    """Prefill's end. Implements `SendingEnd`."""

    transfers: SourceTransfers

    def __init__(self, node: WorkerNode, end: End, hello: pb.PairHello, over: Callable[[str], None]) -> None:
        super().__init__(node, end, over)
        assert node.network.library is not None, "a channel without a library"
        join = self.begin(hello.number, node.network.library)
        memory, patience = _memory(hello.slots, hello.slot_bytes), node.network.library.setting.patience
        self.sent: dict[int, bytes] = {}  # planes by transfer, until their header leaves
        self.transfers = SourceTransfers(memory, join, patience, self)
        self.woken()

    @property
    def is_open(self) -> bool:
        """Implements `SendingEnd.is_open`."""
        return self.transfers.is_open

    def send(self, key: int, planes: Planes, num_bytes: int) -> int | None:
        """Implements `SendingEnd.send`."""
        transfer = self.transfers.send(key, planes, num_bytes)
        if transfer is not None:
            self.sent[transfer] = b"".join(planes)
        return transfer


class SimDestination(PairedFace):
    """Decode's end."""

    transfers: DestinationTransfers

    def __init__(self, node: WorkerNode, end: End, number: int, shape: PairShape, told: Told) -> None:
        super().__init__(node, end, told[1])
        self._opened: Callable[[], None] | None = told[0]
        assert node.network.library is not None, "a channel without a library"
        join, memory = self.begin(number, node.network.library), _memory(shape.slots, shape.slot_bytes)
        self.transfers = DestinationTransfers(number, memory, join, node.network.library.setting.patience, self)
        self.woken()

    def _turned(self) -> None:
        if self._opened is not None and self.transfers.is_open:
            opened, self._opened = self._opened, None
            opened()


class SimPairs(PairedChannels):
    """Decode's channels of a simulated worker."""

    def __init__(self, node: WorkerNode, setting: PairSetting) -> None:
        worker = node.worker
        shape = PairShape(worker.frame_slots, slot_bytes(node.spec, worker.frame_tokens * node.spec.bytes_per_token))
        max_bytes = setting.max_channels * shape.slots * shape.slot_bytes
        super().__init__(
            node.world,
            Counter(),
            shape=shape,
            max_bytes=max_bytes,
            worker_id=worker.worker_id,
            retry_s=setting.retry_s,
        )
        self._node = node
        self.faces: list[SimDestination] = []

    def _soon(self, act: Callable[[], None]) -> None:
        self._node.world.after(0.0, self._node.process, act)

    def _serve(self, peer: str) -> None:
        node = self._node
        assert node.network.library is not None
        near, far = node.connect(peer, f"pair>{peer}", is_calm=True)
        other, number = node.peer_at(peer), node.network.library.number()
        if other.process.is_alive:
            far.on_message = lambda message: other.paired.accept(far, message)
        is_answered = False

        def hear(answer: pb.PairMessage | None) -> None:
            nonlocal is_answered
            if is_answered:
                return
            is_answered = True
            why = self.why_not(answer)
            if why:
                near.abort()
                self.over(peer, why)
                return
            told = partial(self.opened, peer), partial(self.over, peer)
            face = SimDestination(node, near, number, self.shape, told)
            self.faces.append(face)
            self.made(peer, face.transfers)

        near.on_message, near.on_end = hear, lambda: hear(None)
        node.world.after(HELLO_S, node.process, lambda: hear(None))
        near.send(pb.PairMessage(hello=self.hello(number)))


class Paired:
    """All paired channels of one life of a worker, as decode and as prefill."""

    def __init__(self, node: WorkerNode, setting: PairSetting | None, policy: TransportPolicy) -> None:
        self._node = node
        self.pairs = None if setting is None else SimPairs(node, setting)
        size = 0 if self.pairs is None else self.pairs.shape.slots * self.pairs.shape.slot_bytes
        most = 0 if setting is None else setting.max_channels * 4 * size
        self.accepted: AcceptedChannels[SimSource] = AcceptedChannels(policy, most, Counter(), has_certificates=False)
        self.sources: dict[int, SimSource] = {}

    def accept(self, end: End, message: pb.PairMessage) -> None:
        """Take the first message of a control stream."""
        hello = message.hello
        answer = self.accepted.answer(hello)
        end.send(answer)
        if answer.HasField("refused"):
            end.finish()
            return
        source = self.sources[hello.number] = SimSource(self._node, end, hello, lambda _: self.accepted.over(hello))
        self.accepted.began(hello, source)

    def get(self, number: int) -> SendingEnd | None:
        """The open channel of a number."""
        return self.accepted.get(number)

    @property
    def is_idle(self) -> bool:
        """True if no transfer is under way, and no hand-over uses a channel."""
        destinations = [] if self.pairs is None else self.pairs.faces
        if any(face.transfers.num_keys for face in destinations):
            return False
        return all(face.is_over or face.transfers.is_idle for face in (*destinations, *self.sources.values()))

    def check(self) -> None:
        """Check K3 of all channels."""
        for face in () if self.pairs is None else self.pairs.faces:
            face.check()
        for source in self.sources.values():
            source.check()

    def check_drained(self) -> None:
        """Check K1 at the end: no hand-over has a key, every slot is usable, and memory is counted as it is held."""
        if not self.is_idle:
            raise Violation("K1", f"{self._node.process}: transfers or keys of paired channels are left")
        live = sum(not source.is_over for source in self.sources.values())
        if live != self.accepted.num_channels:
            raise Violation("K1", f"{self._node.process}: {self.accepted.num_channels} channels are held, {live} live")


def _memory(slots: int, size_bytes: int) -> PairSlots:
    memory = SimMemory(slots, size_bytes)
    return PairSlots(memory, memory.views, size_bytes)
