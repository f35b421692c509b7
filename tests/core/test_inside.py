"""Calls to a peer that does not prove the cluster's key: nothing of it is read, and none stays open."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from twostroke.core import inside
from twostroke.core.guard import Guard
from twostroke.core.inside import InsideChannel, StreamCall, Unproven
from twostroke.core.proof import ANSWER_HEADER, Claim, Direction, sign

CLAIM = Claim("/a.B/C", "10.0.0.7:8100", 1_700_000_000_000, b"n" * 16)


class Liar:
    """A call whose peer answers with these headers, or never with any, and has a message ready."""

    def __init__(self, metadata: Any) -> None:
        self.is_cancelled = False
        self._metadata = metadata

    async def initial_metadata(self) -> Any:
        if self._metadata is None:
            await asyncio.Event().wait()
        return self._metadata

    async def read(self) -> bytes:
        return b"trust me"

    def cancel(self) -> None:
        self.is_cancelled = True


async def test_a_peer_that_gave_a_wrong_proof_is_not_believed_at_the_second_read_either():
    call = StreamCall(Liar(((ANSWER_HEADER, b"w" * 32),)), CLAIM, b"k" * 32)
    for _ in range(2):
        with pytest.raises(Unproven, match="gave a wrong proof"):
            await call.read()


async def test_a_call_whose_peer_gives_no_proof_in_time_is_cancelled(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inside, "ANSWER_S", 0.01)
    silent = Liar(None)
    with pytest.raises(Unproven, match=r"within 0\.01 s"):
        await StreamCall(silent, CLAIM, b"k" * 32).read()
    assert silent.is_cancelled


class Late(Liar):
    """A call whose headers come, without a proof, when the test says so; its status never comes."""

    def __init__(self) -> None:
        super().__init__(None)
        self.headers = asyncio.get_running_loop().create_future()

    async def initial_metadata(self) -> Any:
        return await self.headers

    async def code(self) -> grpc.StatusCode:
        return await asyncio.get_running_loop().create_future()


@pytest.mark.parametrize("num_turns", range(5))
async def test_a_cancel_that_comes_together_with_the_headers_is_not_lost(num_turns: int):
    call = Late()
    reading = asyncio.create_task(StreamCall(call, CLAIM, b"k" * 32).read())
    for _ in range(3):
        await asyncio.sleep(0)
    call.headers.set_result(())
    for _ in range(num_turns):
        await asyncio.sleep(0)
    assert reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading


class Ended:
    """A call that ended well before its initial metadata could be seen: grpc.aio reports none then."""

    def __init__(self, trailing: Any) -> None:
        self._trailing = trailing

    async def initial_metadata(self) -> Any:
        return ()

    async def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.OK

    async def trailing_metadata(self) -> Any:
        return self._trailing

    async def read(self) -> Any:
        return grpc.aio.EOF

    def cancel(self) -> None:
        pass


async def test_a_stream_that_ended_at_once_is_proven_by_its_end():
    key = b"k" * 32
    answer = sign(key, CLAIM, Direction.ANSWER)
    assert await StreamCall(Ended(((ANSWER_HEADER, answer),)), CLAIM, key).read() is grpc.aio.EOF
    for trailing, words in ((((ANSWER_HEADER, b"w" * 32),), "wrong proof"), ((), "no proof")):
        with pytest.raises(Unproven, match=words):
            await StreamCall(Ended(trailing), CLAIM, key).read()


async def test_a_call_whose_channel_is_closed_fails_and_is_not_cancelled():
    key, came = b"k" * 32, asyncio.Event()
    guard = Guard(key, "the server")
    server = grpc.aio.server(interceptors=[guard])

    async def never(request: bytes, context: Any) -> bytes:
        came.set()
        await asyncio.Event().wait()
        return b""

    handler = grpc.unary_unary_rpc_method_handler(never)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("a.B", {"C": handler}),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    guard.audience = address
    await server.start()
    try:
        for is_cancelled in (False, True):
            came.clear()
            async with asyncio.timeout(240), InsideChannel(address, key) as channel:
                asking = asyncio.ensure_future(_asked(channel))
                await came.wait()
                if is_cancelled:
                    asking.cancel()
                await channel.close()
                with pytest.raises(asyncio.CancelledError if is_cancelled else grpc.aio.AioRpcError) as failure:
                    await asking
            if not is_cancelled:
                assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
    finally:
        await server.stop(0)


async def _asked(channel: InsideChannel) -> bytes:
    return await channel.unary_unary("/a.B/C")(b"")


async def test_a_server_proves_itself_at_the_beginning_and_at_the_end_of_a_stream_without_messages():
    key = b"k" * 32
    guard = Guard(key, "the server")
    server = grpc.aio.server(interceptors=[guard])

    async def nothing(request: bytes, context: Any) -> AsyncIterator[bytes]:
        for message in ():
            yield message

    handler = grpc.unary_stream_rpc_method_handler(nothing)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("a.B", {"C": handler}),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    guard.audience = address
    await server.start()
    try:
        async with asyncio.timeout(240), InsideChannel(address, key) as channel:
            calls = [channel.unary_stream("/a.B/C")(b"") for _ in range(100)]
            for call in calls:
                assert [message async for message in call] == []
                assert any(name == ANSWER_HEADER for name, _ in await call.trailing_metadata())
    finally:
        await server.stop(0)
