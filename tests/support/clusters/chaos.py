"""A TCP proxy that does to a connection what networks do: cuts it up, holds it back, breaks it at a byte."""

import asyncio
import contextlib
import random
import socket
import struct
from dataclasses import dataclass
from enum import StrEnum

READ_BYTES = 1 << 16
RESET = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s: closing sends RST


class Fault(StrEnum):
    """Fault of one direction, lasting or at one byte."""

    SPLIT = "split"  # leave in small pieces
    COALESCE = "coalesce"  # gather for a while
    DELAY = "delay"  # every piece waits
    RESET = "reset"  # at the byte: RST on both sides
    HALF_CLOSE = "half-close"  # at the byte: this direction ends, the other goes on
    TRUNCATE = "truncate"  # at the byte: both directions end in order, and what follows is lost
    STALL = "stall"  # at the byte: nothing follows, and neither side is told


LASTING = (Fault.SPLIT, Fault.COALESCE, Fault.DELAY)


@dataclass
class Plan:
    """The next fault: which, in which direction ("up": to the target), and after how many bytes of it."""

    fault: Fault
    direction: str
    at_byte: int


class ChaosProxy:
    """A proxy in front of one target. `plan` applies to the bytes from when it is set; None: forward as it comes."""

    def __init__(self, seed: int = 0) -> None:
        self.address = ""
        self.num_bytes = {"up": 0, "down": 0}  # forwarded since the plan was set
        self.num_done = 0  # faults that came to their byte
        self._plan: Plan | None = None
        self._random = random.Random(seed)
        self._tasks: set[asyncio.Task[None]] = set()
        self._freed = asyncio.Event()
        self._freed.set()

    async def start(self, target: str) -> None:
        """Listen, and forward to `target` (host:port)."""
        host, port = target.split(":")

        async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                back, there = await asyncio.open_connection(host, int(port))
            except OSError:
                writer.close()
                return
            pair = (writer, there)
            for source, sink, direction in ((reader, there, "up"), (back, writer, "down")):
                task = asyncio.create_task(self._pump(source, sink, direction, pair))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

        self._server = await asyncio.start_server(connect, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def set(self, plan: Plan | None) -> None:
        """Change the plan. Directions that a stall held up are closed."""
        self._plan = plan
        self.num_bytes = {"up": 0, "down": 0}
        self._freed.set()
        self._freed = asyncio.Event()

    async def close(self) -> None:
        """Close every connection."""
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _pump(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        direction: str,
        pair: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(READ_BYTES):
                plan = self._plan
                if plan is None or plan.direction != direction:
                    await self._forward(sink, data, direction)
                elif plan.fault in LASTING:
                    await self._slowly(source, sink, data, plan)
                elif not await self._until(sink, data, plan, pair):
                    return
        with contextlib.suppress(OSError):
            sink.write_eof()

    async def _forward(self, sink: asyncio.StreamWriter, data: bytes, direction: str) -> None:
        self.num_bytes[direction] += len(data)
        sink.write(data)
        await sink.drain()

    async def _slowly(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, data: bytes, plan: Plan) -> None:
        self.num_done += 1
        rng = self._random
        if plan.fault is Fault.DELAY:
            await asyncio.sleep(rng.random() * 0.02)
        elif plan.fault is Fault.COALESCE:
            with contextlib.suppress(TimeoutError):
                data += await asyncio.wait_for(source.read(READ_BYTES), 0.02)
        else:
            while len(data) > 1:
                size = rng.randint(1, min(len(data), 2_000))
                await self._forward(sink, data[:size], plan.direction)
                data = data[size:]
                await asyncio.sleep(0)
        await self._forward(sink, data, plan.direction)

    async def _until(
        self,
        sink: asyncio.StreamWriter,
        data: bytes,
        plan: Plan,
        pair: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
    ) -> bool:
        """Forward up to the plan's byte; False: the fault happened, and this direction is over."""
        left = plan.at_byte - self.num_bytes[plan.direction]
        if len(data) < left:
            await self._forward(sink, data, plan.direction)
            return True
        await self._forward(sink, data[: max(0, left)], plan.direction)
        self._plan = None
        self.num_done += 1
        if plan.fault is Fault.STALL:
            await self._freed.wait()
        if plan.fault is Fault.HALF_CLOSE:
            sink.write_eof()
            return False
        for writer in pair:
            if plan.fault is Fault.RESET:
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                writer.transport.abort()
            else:
                writer.close()
        return False
