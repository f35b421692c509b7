"""What loopback gives without us: a bare gRPC stream of raw bytes, and a TCP socket, from a process of their own."""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

import grpc
import grpc.aio

from twostroke.kv.handover.transports.grpc import CHANNEL_OPTIONS, SERVER_OPTIONS

METHOD = ("bench.Raw", "Stream")


class Loopback:
    """A child process that sends messages of any size over both; use it as a context manager."""

    def __enter__(self) -> Loopback:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._tcp_port, self._grpc_port = self._pipe.recv()
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()  # the child ends when its end of the pipe does
        self._process.join(10)

    def tcp_s(self, message_bytes: int, count: int) -> float:
        """Seconds to receive `count` messages with `recv_into`."""
        buffer = memoryview(bytearray(message_bytes))
        with socket.create_connection(("127.0.0.1", self._tcp_port)) as connection:
            connection.sendall(message_bytes.to_bytes(8, "little") + count.to_bytes(8, "little"))
            began_s = time.perf_counter()
            for _ in range(count):
                _receive(connection, buffer)
            return time.perf_counter() - began_s

    async def grpc_s(self, message_bytes: int, count: int) -> float:
        """Seconds to read `count` messages of one stream on a channel that is open already."""
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self._grpc_port}", options=CHANNEL_OPTIONS) as channel:
            await channel.channel_ready()
            began_s = time.perf_counter()
            call: Any = channel.unary_stream("/" + "/".join(METHOD))(b"%d %d" % (message_bytes, count))
            received = 0
            async for message in call:
                received += len(message)
            elapsed_s = time.perf_counter() - began_s
        assert received == message_bytes * count, f"{received} bytes of {message_bytes * count}"
        return elapsed_s


def _receive(connection: socket.socket, buffer: memoryview) -> None:
    filled = 0
    while filled < len(buffer):
        got = connection.recv_into(buffer[filled:])
        if not got:
            raise ConnectionError("the sender ended early")
        filled += got


def _serve(pipe: Connection) -> None:
    """The child: TCP in a thread, gRPC on the loop, until the parent closes the pipe."""
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_serve_tcp, args=(listener,), daemon=True).start()
    try:
        import uvloop  # as the worker process does

        factory = uvloop.new_event_loop
    except ImportError:
        factory = asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(_serve_grpc(pipe, listener.getsockname()[1]))


def _serve_tcp(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        with connection:
            order = bytearray(16)
            _receive(connection, memoryview(order))
            message = bytes(int.from_bytes(order[:8], "little"))
            for _ in range(int.from_bytes(order[8:], "little")):
                connection.sendall(message)


async def _serve_grpc(pipe: Connection, tcp_port: int) -> None:
    async def stream(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        size_bytes, count = map(int, request.split())
        message = bytes(size_bytes)
        for _ in range(count):
            await context.write(message)

    handler: Any = grpc.unary_stream_rpc_method_handler(stream)  # type: ignore[arg-type]
    server = grpc.aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(METHOD[0], {METHOD[1]: handler}),))
    grpc_port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    pipe.send((tcp_port, grpc_port))
    await asyncio.to_thread(_wait_for_end, pipe)
    await server.stop(0)


def _wait_for_end(pipe: Connection) -> None:
    try:
        pipe.recv()
    except EOFError:
        pass
