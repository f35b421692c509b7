"""Faulty network: ordered streams that lose, duplicate, truncate, garble, delay, break. Does not interpret messages.

Messages in one direction of a stream stay in order, except echoes; different streams have no order between them. After
a lost message the later ones still arrive. Bytes can be truncated or garbled at any place; other values, which TCP and
gRPC protect in production, cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .library import Library
from .rings import Host
from .world import Process, World

ECHO_S = 1.0  # longest delay of the second copy of a message
PROTECTED = 0.3  # factor on the rates of breaks, losses and duplicates for streams of protected values


@dataclass(frozen=True, slots=True)
class Weather:
    """Faults of the network: probabilities per message, and delays in seconds."""

    delay_s: float = 0.001  # mean
    drop: float = 0.0
    duplicate: float = 0.0
    truncate: float = 0.0
    flip: float = 0.0
    damage: float = 0.0  # in a frame's planes only; digests must find it
    break_: float = 0.0  # the whole stream
    stall: float = 0.0  # a message, and all behind it, wait up to stall_s
    stall_s: float = 0.5
    reset: float = 0.7  # the peer of a dead process sees the stream end; else it sees only silence


NO_FAULTS = Weather()


class End:
    """One process's end of a stream. Its owner sets both callbacks before anything can arrive."""

    def __init__(self, network: Network, process: Process, name: str) -> None:
        self.process = process
        self.on_message: Callable[[Any], None] = lambda _: None
        self.on_end: Callable[[], None] = lambda: None
        self.peer: End = self
        self.name = name
        self.life = process.life
        self.is_open = True  # this end may send
        self.is_deaf = False  # nothing arrives any more
        self.is_calm = False
        self.num_lost = 0  # messages sent here that never arrive
        self.echo = 0.0  # probability that a message sent here arrives a second time, after others
        self.planes: memoryview | None = None  # of the frame that is sent next, if they are beside the stream
        self._network = network
        self._arrival_s = 0.0  # arrival of the last message on its way to this end

    @property
    def arrival_s(self) -> float:
        """Virtual time at which the last message to this end arrives, or arrived."""
        return self._arrival_s

    def send(self, message: Any) -> None:
        """Send a message in order. It is dropped silently when the stream is over."""
        if self.is_open:
            self._network.carry(self, message)

    def finish(self) -> None:
        """End this direction; the peer sees the end after all messages."""
        if self.is_open:
            self.is_open = False
            self._network.end(self, overtaking=False)

    def abort(self) -> None:
        """End both directions. Messages under way may arrive or not; this end gets nothing any more."""
        self.is_deaf = True
        if self.is_open:
            self.is_open = False
            self._network.end(self, overtaking=True)

    def hear(self, message: Any) -> None:
        """Deliver a message to the owner."""
        if not self.is_deaf and self.process.life == self.life:
            self.on_message(message)

    def hear_end(self) -> None:
        """Tell the owner that the peer's direction ended, or that the stream broke."""
        if not self.is_deaf and self.process.life == self.life:
            self.is_deaf = True
            self.on_end()


class Network:
    """All streams and messages between processes."""

    def __init__(self, world: World, weather: Weather, host: Host) -> None:
        """`host` has the memory that processes share."""
        self.world = self._world = world
        self.host = host
        self.library: Library | None = None  # of paired channels; None: nobody has any
        self.weather = weather
        self._blocked_until_s: dict[tuple[str, str], float] = {}  # one-way partitions
        self._open: list[End] = []  # opening ends; swept at every crash

    def connect(self, client: Process, server: Process, name: str, *, is_calm: bool = False) -> tuple[End, End]:
        """Open a stream: (client's end, server's end). A stream to a dead server breaks soon. Calm: delays only."""
        near, far = End(self, client, name), End(self, server, name)
        near.is_calm = far.is_calm = is_calm
        near.peer, far.peer = far, near
        if server.is_alive:
            self._open.append(near)
            if len(self._open) > 256:
                self._open = [end for end in self._open if not (end.is_deaf and end.peer.is_deaf)]
        else:
            far.is_deaf, far.is_open, near.is_open = True, False, False
            self._world.after(self._delay_s(), client, near.hear_end)
        return near, far

    def cut(self, source: Process, target: Process, seconds: float) -> None:
        """Hold all messages from `source` to `target` for `seconds`; then deliver them in order."""
        self._blocked_until_s[source.name, target.name] = self._world.now_s() + seconds

    def crashed(self, process: Process) -> None:
        """End the streams of a process; some peers are not told. Call it before the process gets another life."""
        left = []
        for near in self._open:
            for end in (near, near.peer):
                if end.process is process:
                    is_told = end.is_open and not end.peer.is_deaf
                    end.is_open, end.is_deaf = False, True
                    if is_told and self._world.chance(self.weather.reset):
                        self._arrive(end.peer, end.peer.hear_end)
                    end.peer.is_open = False
            if not (near.is_deaf and near.peer.is_deaf):
                left.append(near)
        self._open = left

    def tell(self, source: Process, target: Process, act: Callable[[], None]) -> None:
        """Carry one small message outside any stream; it is delayed or lost."""
        world = self._world
        if not world.chance(self.weather.drop):
            blocked_s = self._blocked_until_s.get((source.name, target.name), 0.0) - world.now_s()
            world.after(max(self._delay_s(), blocked_s), target, act)

    # ------------------------------------------------------------------ for the ends

    def carry(self, source: End, message: Any) -> None:
        """Carry one message to the peer, with the faults that are drawn for it."""
        world, weather, target = self._world, self.weather, source.peer
        is_raw = isinstance(message, bytes)
        share = 1.0 if is_raw else 0.0 if source.is_calm else PROTECTED
        if world.chance(weather.break_ * share):
            source.num_lost += 1
            world.note(source.process, f"{source.name} breaks")
            for end in (source, target):
                end.is_open = False
                self._arrive(end, end.hear_end)
            return
        if world.chance(weather.drop * share):
            source.num_lost += 1
            world.note(source.process, f"{source.name} loses a message")
            return
        copies = 2 if world.chance(weather.duplicate * share) else 1
        if is_raw:
            message = self._harm(source, message)
        for _ in range(copies):
            self._arrive(target, lambda: target.hear(message))
        if world.chance(source.echo):
            world.after(world.random.random() ** 3 * ECHO_S, target.process, lambda: target.hear(message))

    def end(self, source: End, *, overtaking: bool) -> None:
        """Carry the end of a direction to the peer."""
        target = source.peer
        if overtaking:
            target.is_open = False
            if self._world.chance(0.5):
                self._world.after(self._delay_s(), target.process, target.hear_end)
                return
        self._arrive(target, target.hear_end)

    def _harm(self, source: End, envelope: bytes) -> bytes:
        world, weather = self._world, self.weather
        if world.chance(weather.truncate):
            world.note(source.process, f"{source.name} cuts a message short")
            return envelope[: world.random.randrange(len(envelope))]
        if world.chance(weather.flip):
            world.note(source.process, f"{source.name} garbles a message")
            return self._flipped(envelope, 0)
        if envelope[3] == 2 and world.chance(weather.damage):
            world.note(source.process, f"{source.name} damages planes")
            if source.planes is not None:
                source.planes[world.random.randrange(len(source.planes))] ^= 1 << world.random.randrange(8)
                return envelope
            return self._flipped(envelope, len(envelope) - 8)  # the last token's row
        return envelope

    def _flipped(self, envelope: bytes, first: int) -> bytes:
        damaged = bytearray(envelope)
        damaged[self._world.random.randrange(max(0, first), len(damaged))] ^= 1 << self._world.random.randrange(8)
        return bytes(damaged)

    def _arrive(self, target: End, act: Callable[[], None]) -> None:
        """Plan an arrival at the target, after everything sent earlier in the same direction."""
        world = self._world
        at_s = world.now_s() + self._delay_s()
        if not target.is_calm and world.chance(self.weather.stall):
            at_s += self.weather.stall_s * world.random.random()
        blocked_s = self._blocked_until_s.get((target.peer.process.name, target.process.name), 0.0)
        target._arrival_s = max(target._arrival_s, at_s, blocked_s)
        world.at(target._arrival_s, target.process, act)

    def _delay_s(self) -> float:
        return self._world.random.random() * 2 * self.weather.delay_s
