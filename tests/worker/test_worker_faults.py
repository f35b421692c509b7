"""What two real workers do when something breaks between them: the text stays, and every block comes back."""

import asyncio
import contextlib

import pytest
from support.engines.frames import damaged, is_frame

from twostroke.core.request import Role
from twostroke.kv.config import CacheConfig
from twostroke.kv.handover.transports.grpc import ServerStream
from twostroke.protos import common_pb2

LONG = 320
CANCELLED, STOP, LENGTH = (
    common_pb2.FINISH_REASON_CANCELLED,
    common_pb2.FINISH_REASON_STOP,
    common_pb2.FINISH_REASON_LENGTH,
)


class Tap:
    """Stands between every prefill worker and its streams: damages or holds back the frames that it is told to.

    `rings` is the pool of the decode worker whose shared memory is damaged.
    """

    def __init__(self, monkeypatch):
        self.damage = set()  # numbers of frames (from 1) to flip a byte in
        self.damage_when = lambda: True  # they wait for this
        self.hold_after = None  # so many frames pass, then nothing does
        self.num_frames = 0
        self.held = asyncio.Event()
        self.rings = None
        self._send = ServerStream.send
        tap = self

        async def send(stream, envelope):
            await tap.pass_on(stream, envelope)

        monkeypatch.setattr(ServerStream, "send", send)

    async def pass_on(self, stream, envelope):
        if is_frame(envelope):
            self.num_frames += 1
            if self.num_frames in self.damage:
                while not self.damage_when():
                    await asyncio.sleep(0.005)
                envelope = damaged(envelope, self.rings)
            if self.hold_after is not None and self.num_frames > self.hold_after:
                self.held.set()
                await asyncio.Event().wait()
        await self._send(stream, envelope)


@pytest.fixture
def tap(monkeypatch):
    return Tap(monkeypatch)


class Proxy:
    """A TCP proxy that can stop forwarding while both connections stay open."""

    def __init__(self):
        self.is_stopped = False
        self.address = ""
        self._tasks = set()

    async def start(self, target):
        host, port = target.split(":")

        async def connect(reader, writer):
            self._tasks.add(asyncio.current_task())
            with contextlib.suppress(OSError, asyncio.CancelledError):
                there, back = await asyncio.open_connection(host, int(port))
                pumps = [asyncio.create_task(self._pump(reader, back)), asyncio.create_task(self._pump(there, writer))]
                self._tasks.update(pumps)
                await asyncio.wait(pumps)

        self._server = await asyncio.start_server(connect, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _pump(self, reader, writer):
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                while self.is_stopped:
                    await asyncio.sleep(0.01)
                writer.write(data)
                await writer.drain()

    async def close(self):
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@pytest.fixture
async def proxy():
    made = Proxy()
    yield made
    await made.close()


@pytest.fixture(params=["grpc", "shm"])
async def pair(start_worker, router_of, make_prompt, tap, request):
    """Prefill worker, decode worker, a session with the latter, and the text that it all must give."""
    cache = CacheConfig(tokens=8192, frame_bytes=8192, transport=request.param)
    prefill, decode = [await start_worker(role, cache=cache) for role in (Role.PREFILL, Role.DECODE)]
    tap.rings = decode.faces.rings
    alone = await start_worker(Role.COMBINED)
    hand = await router_of(decode)
    expected = await (await (await router_of(alone)).submit("x", make_prompt(LONG))).ended()
    return prefill, decode, hand, expected


async def test_a_damaged_frame_is_fetched_again(pair, tap, make_prompt, all_free):
    prefill, decode, hand, expected = pair
    tap.damage = {2}
    answer = await (await hand.submit("r", make_prompt(LONG), [prefill])).ended()
    assert answer.token_ids == expected.token_ids
    assert answer.text == expected.text
    assert answer.end.handover.refetched_blocks > 0
    assert answer.end.handover.local_reason == ""
    assert decode.counters["kv_corrupted_frames"] == 1
    await all_free(prefill, decode)


async def test_what_arrives_damaged_twice_is_recomputed_here(pair, tap, make_prompt, all_free):
    prefill, decode, hand, expected = pair
    tap.damage = set(range(2, 100))
    tap.damage_when = lambda: any(
        run._pull is None or run._pull.receiver.stored_upto for run in decode.faces.decode.runs
    )
    answer = await (await hand.submit("r", make_prompt(LONG), [prefill])).ended()
    assert answer.token_ids == expected.token_ids
    assert answer.end.handover.local_reason == "peer_corrupted"
    assert 0 < answer.end.handover.recomputed_tokens < LONG  # the first frame was good and is kept
    await all_free(prefill, decode)


@pytest.mark.parametrize("is_lasting", [False, True])
async def test_memory_that_goes_bad_under_a_prefill_worker_changes_no_text(pair, make_prompt, all_free, is_lasting):
    prefill, decode, hand, expected = pair
    store = prefill.room.engine.store
    read, num_flips = store.read, 0

    def damaged(op):
        nonlocal num_flips
        planes = store._store.components[0].payload_view  # [layers, blocks, heads, block_tokens, row_bytes]
        row = planes[0, op.block_table[op.token_start // planes.shape[3]], 0, 0]
        row[0] ^= 0x40 * (is_lasting or num_flips == 0)
        sections = read(op)
        row[0] ^= 0x40 * (is_lasting or num_flips == 0)  # a reading error: the memory itself is whole
        num_flips += 1
        return sections

    store.read = damaged
    answer = await (await hand.submit("r", make_prompt(LONG), [prefill])).ended()
    assert answer.token_ids == expected.token_ids
    assert answer.text == expected.text
    corrupted = prefill.counters["kv_corrupted_reads"]
    assert corrupted >= 2 if is_lasting else corrupted == 1
    assert decode.counters["kv_corrupted_frames"] == 0
    assert answer.end.handover.local_reason == ("peer_refused" if is_lasting else "")
    await all_free(prefill, decode)


async def test_a_prefill_worker_that_goes_away_in_the_middle_does_not_change_the_text(pair, tap, make_prompt, all_free):
    prefill, decode, hand, expected = pair
    tap.hold_after = 2
    answer = await hand.submit("r", make_prompt(LONG), [prefill])
    await asyncio.wait_for(tap.held.wait(), 60)
    await prefill.stop(0.0)
    await answer.ended()
    assert answer.token_ids == expected.token_ids
    assert answer.text == expected.text
    assert answer.end.reason == expected.end.reason
    assert answer.end.handover.local_reason == "peer_closed"
    await all_free(decode)


async def test_an_unreachable_peer_gives_way_to_the_next(pair, make_prompt, all_free):
    prefill, decode, hand, expected = pair
    answer = await (await hand.submit("r", make_prompt(LONG), ["127.0.0.1:1", prefill])).ended()
    assert answer.token_ids == expected.token_ids
    assert answer.end.handover.prefill_worker == prefill.settings.worker_id
    await all_free(prefill, decode)


async def test_without_any_peer_left_the_prompt_is_computed_here(pair, make_prompt, all_free):
    prefill, decode, hand, expected = pair
    answer = await (await hand.submit("r", make_prompt(LONG), ["127.0.0.1:1"])).ended()
    assert answer.token_ids == expected.token_ids
    assert answer.end.handover.local_reason == "peer_closed"
    assert answer.end.handover.recomputed_tokens == LONG
    await all_free(prefill, decode)


async def test_a_refusing_peer_is_named_and_departed_from(pair, make_prompt, all_free):
    prefill, decode, hand, expected = pair
    prefill.set_role(Role.COMBINED)
    answer = await (await hand.submit("r", make_prompt(LONG), [prefill])).ended()
    assert answer.token_ids == expected.token_ids
    assert answer.end.handover.local_reason == "peer_refused"
    await all_free(prefill, decode)


async def test_cancel_frees_both_sides(pair, tap, make_prompt, all_free):
    prefill, decode, hand, _ = pair
    tap.hold_after = 2
    answer = await hand.submit("r", make_prompt(LONG), [prefill])
    await asyncio.wait_for(tap.held.wait(), 60)
    await hand.cancel("r")
    await all_free(prefill, decode)  # long before their leases end
    await answer.ended()
    assert answer.end.reason == CANCELLED


async def test_cancel_while_decoding_frees(pair, make_prompt, all_free):
    prefill, decode, hand, _ = pair
    answer = await hand.submit("r", make_prompt(48), [prefill], sampling={"max_tokens": 1500, "ignore_eos": True})
    await answer.until(lambda a: len(a.token_ids) > 3)
    await hand.cancel("r")
    await all_free(prefill, decode)
    await answer.ended()
    assert answer.end.reason == CANCELLED
    assert answer.end.usage.completion_tokens == len(answer.token_ids) < 1500


@pytest.mark.usefixtures("usual_leases")
async def test_a_silent_peer_is_given_up_on_both_sides(pair, proxy, tap, make_prompt, all_free):
    prefill, decode, hand, expected = pair
    await proxy.start(prefill.address)
    prefill._guard.audience = proxy.address  # by which it is known now
    tap.hold_after = 2
    answer = await hand.submit("r", make_prompt(LONG), [proxy.address])
    await asyncio.wait_for(tap.held.wait(), 60)
    proxy.is_stopped = True  # nobody says goodbye, TCP is fine
    await all_free(prefill)
    await answer.ended()
    assert answer.token_ids == expected.token_ids
    assert answer.end.handover.local_reason == "peer_silent"
    await all_free(decode)


async def test_a_lost_router_leaves_nothing_behind_after_the_grace(pair, make_prompt, all_free):
    prefill, decode, hand, _ = pair
    answer = await hand.submit("r", make_prompt(48), [prefill], sampling={"max_tokens": 1500, "ignore_eos": True})
    await answer.until(lambda a: len(a.token_ids) > 3)
    await hand.lose()
    await asyncio.sleep(0.1)
    assert decode.faces.decode.num_running == 1  # it runs on for the grace
    await all_free(prefill, decode)
    assert decode.counters["orphans_cancelled"] == 1


async def test_a_deadline_ends_a_request_with_its_type(pair, tap, make_prompt, all_free):
    prefill, decode, hand, _ = pair
    tap.hold_after = 2
    answer = await (await hand.submit("r", make_prompt(LONG), [prefill], timeout_ms=700)).ended()
    assert answer.end.error.code == "deadline_exceeded"
    await all_free(prefill, decode)
