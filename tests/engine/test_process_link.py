"""The link between processes: a real second process, its death on either side, and what a stalled one is spared.

The lives of engines run over this link too: tests/engine/test_engine.py.
"""

import asyncio
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from twostroke.core.errors import Unavailable
from twostroke.core.request import FinishReason, SamplingParams, SequenceKey
from twostroke.engine.link import process_link
from twostroke.engine.link.messages import (
    AskSnapshot,
    BlocksFetched,
    Ended,
    FetchBlocks,
    LoadNews,
    Source,
    StepTokens,
    Stop,
    Submit,
)
from twostroke.engine.link.process_link import FaceEnd, serve_engine
from twostroke.engine.link.thread_link import ThreadLink
from twostroke.engine.link.wire import encode

PROGRAM = Path(__file__).parents[1] / "support" / "engines" / "engine_process.py"
KEY = SequenceKey("r", 0)
TIMEOUT_S = 120
LATE = Ended(KEY, FinishReason.ERROR, "internal", "broken")


def submit(num_tokens=20, max_tokens=5) -> Submit:
    ids = tuple(range(2, 2 + num_tokens))
    return Submit(KEY, Source.LOCAL, ids, (), b"root", SamplingParams(max_tokens))


@pytest.fixture
def other():
    """The engine's process, and our end of the socket."""
    ours, theirs = socket.socketpair()
    process = subprocess.Popen([sys.executable, str(PROGRAM), str(theirs.fileno())], pass_fds=[theirs.fileno()])
    theirs.close()
    yield process, ours
    process.kill()
    process.wait()
    ours.close()


async def until(face: FaceEnd, kind: type) -> list:
    heard = []
    async with asyncio.timeout(TIMEOUT_S):
        while not any(isinstance(event, kind) for event in heard):
            batch = await face.receive()
            assert batch, "the engine ended before"
            heard += batch
    return heard


async def test_an_engine_in_another_process_answers_and_stops(other):
    process, sock = other
    face = await FaceEnd.open(sock)
    face.send(submit())
    heard = await until(face, Ended)
    tokens = [id_ for event in heard if isinstance(event, StepTokens) for news in event.news for id_ in news.token_ids]
    assert tokens == [20, 21, 22, 23, 24]
    assert any(isinstance(event, LoadNews) for event in heard)
    face.send(Stop())
    async with asyncio.timeout(TIMEOUT_S):
        while await face.receive():
            pass
        assert await asyncio.to_thread(process.wait, TIMEOUT_S) == 0
    with pytest.raises(Unavailable):
        face.send(submit())
    face.send(AskSnapshot())  # means nothing any more


async def test_the_face_hears_the_end_of_an_engine_that_is_killed(other):
    process, sock = other
    face = await FaceEnd.open(sock)
    face.send(submit(max_tokens=900))
    await until(face, StepTokens)
    process.kill()
    async with asyncio.timeout(TIMEOUT_S):
        while await face.receive():
            pass
    with pytest.raises(Unavailable):
        face.send(submit())


async def test_an_engine_whose_face_is_gone_stops(other):
    process, sock = other
    face = await FaceEnd.open(sock)
    face.send(submit(max_tokens=900))
    await until(face, StepTokens)
    face._writer.transport.abort()
    assert await asyncio.wait_for(asyncio.to_thread(process.wait, TIMEOUT_S), TIMEOUT_S) == 0


@pytest.mark.parametrize("said", [b"???", encode(5), encode(None), encode([Stop()]), encode(LATE)])
async def test_bytes_that_are_no_command_stop_the_engine(said: bytes):
    ours, theirs = socket.socketpair()
    link = ThreadLink()
    carrying = serve_engine(theirs, link)
    with ours:
        ours.sendall(len(said).to_bytes(4, "little") + said)
        (command,) = await asyncio.to_thread(link.take, 1, TIMEOUT_S)
        assert command == Stop()
    link.close()
    await asyncio.to_thread(carrying.join, TIMEOUT_S)


async def test_new_work_is_refused_while_the_engine_reads_nothing(monkeypatch):
    monkeypatch.setattr(process_link, "MAX_UNSENT_BYTES", 1 << 20)
    ours, theirs = socket.socketpair()
    with theirs:
        face = await FaceEnd.open(ours)
        for _ in range(200):  # of 16 KB each
            face._writer.write(process_link._frame(submit(num_tokens=4_000)))
        with pytest.raises(Unavailable, match="takes no commands"):
            face.send(submit())
        waiting = asyncio.create_task(face.receive())
        await asyncio.sleep(0)
        for fetch_id in (7, 8):
            face.send(FetchBlocks(fetch_id, (), 0, b"root"))
        async with asyncio.timeout(TIMEOUT_S):  # the engine says nothing meanwhile
            assert await waiting == [BlocksFetched(7, 0, ()), BlocksFetched(8, 0, ())]
        face.send(AskSnapshot())  # what does not bring work always gets in


async def test_an_ended_engine_gives_out_its_last_events():
    ours, theirs = socket.socketpair()
    link = ThreadLink()
    carrying = serve_engine(theirs, link)
    face = await FaceEnd.open(ours)
    link.close([LATE])
    async with asyncio.timeout(TIMEOUT_S):
        assert await face.receive() == [LATE]
        assert await face.receive() == []
        assert await face.receive() == []
    await asyncio.to_thread(carrying.join, TIMEOUT_S)
    assert len(encode(LATE)) < 100


async def test_a_face_that_reads_late_gets_the_last_events_too():
    """More than the socket holds, and less than the other end would wait for before it goes on."""
    ours, theirs = socket.socketpair()
    for sock, option in ((ours, socket.SO_RCVBUF), (theirs, socket.SO_SNDBUF)):
        sock.setsockopt(socket.SOL_SOCKET, option, 4096)
    link = ThreadLink()
    carrying = serve_engine(theirs, link)
    events = [LATE] * 700
    link.close(events)
    await asyncio.to_thread(carrying.join, 1.0)  # a link that does not wait for its reader has ended by then
    face, heard = await FaceEnd.open(ours), []
    async with asyncio.timeout(TIMEOUT_S):
        while batch := await face.receive():
            heard += batch
    assert heard == events
    await asyncio.to_thread(carrying.join, TIMEOUT_S)


@pytest.mark.parametrize("said", [b"???", encode(5), encode("words"), encode((LATE,))])
async def test_bytes_that_are_no_events_count_as_the_engine_s_end(said: bytes):
    ours, theirs = socket.socketpair()
    with theirs:
        face = await FaceEnd.open(ours)
        theirs.sendall(len(said).to_bytes(4, "little") + said)
        async with asyncio.timeout(TIMEOUT_S):
            assert await face.receive() == []
        with pytest.raises(Unavailable):
            face.send(submit())


@pytest.mark.parametrize("head", [b"\xff\xff\xff\xff", b"\x01\x00\x00\x40", b"\x00\x00", b""])
async def test_a_frame_too_large_or_cut_is_the_end_on_both_sides(head: bytes):
    """What is too large ends it at once; of what is cut no more can come when the other side is gone."""
    ours, theirs = socket.socketpair()
    face = await FaceEnd.open(ours)
    theirs.sendall(head)
    if len(head) < 4:
        theirs.shutdown(socket.SHUT_WR)
    async with asyncio.timeout(TIMEOUT_S):
        assert await face.receive() == []
    theirs.close()
    ours, theirs = socket.socketpair()
    link = ThreadLink()
    carrying = serve_engine(theirs, link)
    ours.sendall(head)
    if len(head) < 4:
        ours.shutdown(socket.SHUT_WR)
    assert await asyncio.to_thread(link.take, 1, TIMEOUT_S) == [Stop()]
    link.close()
    ours.close()
    await asyncio.to_thread(carrying.join, TIMEOUT_S)


async def test_a_face_that_lives_and_reads_nothing_stops_the_engine(monkeypatch):
    monkeypatch.setattr(process_link, "STALL_S", 0.1)
    ours, theirs = socket.socketpair()
    link = ThreadLink()
    carrying = serve_engine(theirs, link)
    with ours:
        link.emit([LATE] * 20_000)  # of 50 bytes each, more than the socket holds
        assert await asyncio.to_thread(link.take, 1, TIMEOUT_S) == [Stop()]
        link.close()
        await asyncio.to_thread(carrying.join, TIMEOUT_S)
        assert not carrying.is_alive()


async def test_work_for_an_engine_that_is_gone_is_refused_before_its_end_is_read():
    ours, theirs = socket.socketpair()
    face = await FaceEnd.open(ours)
    theirs.close()
    face.send(AskSnapshot())
    with pytest.raises(Unavailable):
        face.send(submit())


async def test_a_reader_that_gives_up_waiting_loses_nothing():
    ours, theirs = socket.socketpair()
    with theirs:
        face = await FaceEnd.open(ours)
        frame = process_link._frame([LATE])
        theirs.sendall(frame[:7])
        for _ in range(2):
            reading = asyncio.create_task(face.receive())
            await asyncio.sleep(0.01)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        theirs.sendall(frame[7:])
        async with asyncio.timeout(TIMEOUT_S):
            assert await face.receive() == [LATE]
